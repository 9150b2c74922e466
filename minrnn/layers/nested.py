"""A nested tensor of jagged layout as sequences laid end to end, and back."""

from typing import Any

import torch
from torch import Tensor

from minrnn.layers.checks import SizeError


def end_to_end(input: Any) -> tuple[Tensor, Tensor]:
    """The steps of all sequences of a nested (B, T, input_size), (S, input_size), and bounds."""
    if input.layout != torch.jagged:
        raise ValueError(f"`input` must be nested with layout=torch.jagged, got {input.layout}")
    if input.dim() != 3 or input._ragged_idx != 1:
        raise SizeError(
            f"`input` must be nested as (B, T, input_size), each its own T, got {input.shape}"
        )
    # without the gaps that torch.nested.narrow leaves
    input = input.contiguous()
    return input.values(), input.offsets()


def resets(reset: Any, cu_seqlens: Tensor) -> Tensor:
    """The `reset` of a nested input: nested as (B, T), with the same bounds."""
    if isinstance(reset, Tensor) and reset.is_nested and reset.layout == torch.jagged:
        reset = reset.contiguous()
        bounds: Any = reset.offsets()
        if reset.dim() == 2 and (bounds is cu_seqlens or torch.equal(bounds, cu_seqlens)):
            return reset.values()
    raise ValueError("`reset` must be nested like `input`, a bool for each step")


def nest(y: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Steps end to end, (S, ...), as a nested tensor whose T is that of the input."""
    return torch.nested.nested_tensor_from_jagged(y, cu_seqlens)
