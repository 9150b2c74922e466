"""The operators under `torch.func`: grad, vmap, and what is made of them.

Operators registered with a Python gradient do not take part in torch's function transforms; a
`torch.autograd.Function` with `setup_context` does. So there is one for each operator, used while
a transform is active and at no other time. Its gradient is the formula in pure torch, which rests
on `scan` and can be transformed again; its batching rule lays the new axis along the batch, or
along the sequences that `cu_seqlens` bounds.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

functions: dict[str, type[torch.autograd.Function]] = {}


def call(name: str, *args: Any) -> Any:
    """`torch.ops.minrnn.name`, whatever transform is active."""
    if torch.compiler.is_compiling() or not torch._C._are_functorch_transforms_active():
        return getattr(torch.ops.minrnn, name)(*args)
    return functions[name].apply(*args)


def define(
    name: str,
    num_gates: int,
    setup: Callable[..., None],
    formula: Callable[..., tuple[Tensor, ...]],
    time_first: Callable[[tuple[Any, ...]], bool],
) -> None:
    """Make the function of an operator.

    Args:
        name: of the operator.
        num_gates: how many tensors (B, T, ...) it begins with.
        setup: saves what the gradient needs, as for `torch.library.register_autograd`.
        formula: dh, dh_T and what was saved -> the gradients of the gates and of h0.
        time_first: of the arguments: do they have time before batch?
    """

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(*args: Any) -> Any:
            return getattr(torch.ops.minrnn, name)(*args)

        setup_context = staticmethod(setup)

        @staticmethod
        def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
            dh, dh_T = grad_outputs
            *saved, h0, h, reset, cu_seqlens = ctx.saved_tensors
            layout = (reset, cu_seqlens, ctx.reverse)
            *grads, dh0 = formula(dh, dh_T, *saved, h0, h, *ctx.options, *layout)
            return *grads, None if h0 is None else dh0, *[None] * (len(ctx.options) + 3)

        @staticmethod
        def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> Any:
            wide = [_first(x, dim, info.batch_size) for x, dim in zip(args, in_dims, strict=True)]
            h, h_T = call(name, *_along_batch(wide, num_gates, time_first(args)))
            V, reset, cu_seqlens = info.batch_size, args[-3], args[-2]
            del reset
            if cu_seqlens is None and time_first(args):
                h = h.unflatten(1, (V, -1)).transpose(0, 1)
            else:
                h = h.unflatten(0 if cu_seqlens is None else 1, (V, -1))
            h = h if cu_seqlens is None else h.transpose(0, 1)
            return (h, h_T.unflatten(0, (V, -1))), (0, 0)

    functions[name] = Function


def _first(x: Any, dim: int | None, size: int) -> Any:
    """A tensor with the new axis, of this size, in front."""
    if not isinstance(x, Tensor):
        return x
    return x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)


def _along_batch(args: list[Any], num_gates: int, time_first: bool) -> list[Any]:
    """Arguments whose tensors have an axis V in front, as those of one call without it."""
    rows, h0 = args[:num_gates], args[num_gates]
    *options, reset, cu_seqlens, reverse = args[num_gates + 1 :]
    if cu_seqlens is None:

        def flat(x: Tensor) -> Tensor:
            # (V, B, T, ...) -> (V * B, T, ...), or (V, T, B, ...) -> (T, V * B, ...)
            return x.transpose(0, 1).flatten(1, 2) if time_first else x.flatten(0, 1)

    else:
        T = rows[0].shape[2]
        V = rows[0].shape[0]
        shift = torch.arange(V, device=cu_seqlens.device, dtype=cu_seqlens.dtype)[:, None] * T
        starts = (cu_seqlens[:, :-1] + shift).flatten()
        cu_seqlens = torch.cat([starts, (cu_seqlens[-1:, -1] + shift[-1])])

        def flat(x: Tensor) -> Tensor:
            # (V, 1, T, ...) -> (1, V * T, ...)
            return x.transpose(0, 1).flatten(1, 2)

    reset = None if reset is None else flat(reset)
    h0 = None if h0 is None else h0.flatten(0, 1)
    return [*[flat(x) for x in rows], h0, *options, reset, cu_seqlens, reverse]
