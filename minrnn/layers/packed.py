"""A PackedSequence as sequences laid end to end: what an operator with `cu_seqlens` takes.

torch packs time first: step 0 of all sequences, then step 1 of those that still run. Laid end to
end, each sequence is one stretch of memory, and nothing is computed for padding.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor


class EndToEnd(NamedTuple):
    """How S rows of packed data and of N sequences end to end correspond."""

    order: Tensor
    """(S,) the packed row of each step"""
    inverse: Tensor
    """(S,) the step of each packed row"""
    cu_seqlens: Tensor
    """(N + 1,) where each sequence begins and ends, longest first"""

    @classmethod
    def of(cls, batch_sizes: Tensor, device: torch.device) -> "EndToEnd":
        """From how many sequences run at each step, (T,), on the CPU."""
        T, here = batch_sizes.shape[0], batch_sizes.device
        sequences = torch.arange(num_sequences(batch_sizes), device=here)
        # sequence n runs while more than n sequences do
        lengths = T - torch.searchsorted(batch_sizes.flip(0), sequences, right=True)
        cu_seqlens = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
        owner = torch.repeat_interleave(sequences, lengths)
        steps = torch.arange(owner.shape[0], device=here)
        order = (batch_sizes.cumsum(0) - batch_sizes)[steps - cu_seqlens[owner]] + owner
        inverse = torch.empty_like(order)
        inverse[order] = steps
        return cls(order.to(device), inverse.to(device), cu_seqlens.to(device))

    def lay_out(self, data: Tensor) -> Tensor:
        """Packed rows (S, ...) as one row of sequences, (1, S, ...)."""
        return permute(data, self.order, self.inverse)[None]

    def pack(self, x: Tensor) -> Tensor:
        """The other way."""
        return permute(x[0], self.inverse, self.order)


def num_sequences(batch_sizes: Tensor) -> Any:
    """N, an int; while torch.jit traces, a tensor, or every later call would have the first N."""
    return batch_sizes[0] if torch.jit.is_tracing() else int(batch_sizes[0])


class _Permute(torch.autograd.Function):
    """The gradient of a permutation is its inverse: no sums over rows, as for an index."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        return x.index_select(0, order)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        order, inverse = ctx.saved_tensors
        return permute(grad_outputs[0], inverse, order), None, None


def permute(x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
    """Rows `order` of `x`, each once; `inverse` is the way back."""
    if torch.jit.is_tracing():
        # a trace with Python in it cannot be saved
        return x.index_select(0, order)
    return _Permute.apply(x, order, inverse)
