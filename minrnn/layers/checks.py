"""What layers and cells refuse, with the classes of error that torch's raise, and why."""

from typing import Any

import torch
from torch import Tensor


class SizeError(ValueError, RuntimeError):
    """A tensor does not fit: a ValueError, and the RuntimeError that torch's layers raise."""


def check_sizes(sizes: dict[str, int], at_least: int = 1) -> None:
    """Each an int that is large enough."""
    for name, size in sizes.items():
        if not isinstance(size, int):
            raise TypeError(f"`{name}` must be an int, got {type(size).__name__}")
        if size < at_least:
            raise ValueError(f"`{name}` must be >= {at_least}, got {size}")


def check_input(input: Tensor, weight: Tensor, symbols: str) -> None:
    """`input` has the features, dtype and device of the first layer's weight."""
    if input.shape[-1] != weight.shape[1]:
        raise SizeError(
            f"`input` must have shape {symbols} with input_size = {weight.shape[1]}, "
            f"got {tuple(input.shape)}"
        )
    if input.dtype != weight.dtype and not torch.is_autocast_enabled(input.device.type):
        raise SizeError(
            f"`input` must have the dtype of the weights, {weight.dtype}, got {input.dtype}"
        )
    if input.device != weight.device:
        raise SizeError(f"`input` must be on {weight.device} like the weights, got {input.device}")


def check_state_kind(hx: Tensor, input: Tensor) -> None:
    """`hx` has the dtype of `input` or of the state, and its device."""
    state = torch.float64 if input.dtype == torch.float64 else torch.float32
    if hx.dtype not in (input.dtype, state):
        known = " or ".join(dict.fromkeys((str(input.dtype), str(state))))
        raise SizeError(f"`hx` must have dtype {known}, got {hx.dtype}")
    if hx.device != input.device:
        raise SizeError(f"`hx` must be on {input.device} like `input`, got {hx.device}")


def check_options(
    sizes: dict[str, int], bias: bool, batch_first: bool, dropout: float, proj_size: int
) -> None:
    for name, flag in (("bias", bias), ("batch_first", batch_first)):
        if not isinstance(flag, bool):
            raise TypeError(f"`{name}` must be a bool, got {type(flag).__name__}")
    check_sizes(sizes)
    check_sizes({"proj_size": proj_size}, at_least=0)
    if isinstance(dropout, bool) or not isinstance(dropout, (int, float)) or not 0 <= dropout <= 1:
        raise ValueError(f"`dropout` must be a number from 0 to 1, got {dropout!r}")


def cell_state(hx: Any) -> Tensor | None:
    """The c_0 of a pair (h_0, c_0); what is no pair is itself."""
    if not isinstance(hx, (tuple, list)):
        return hx
    if len(hx) != 2:
        raise ValueError(f"`hx` must be a tensor or the pair (h_0, c_0), got {len(hx)} parts")
    return hx[1]
