"""What layers and cells refuse, with the classes of error that torch's raise, and why."""

from itertools import pairwise
from types import NoneType
from typing import Any

import torch
from torch import Tensor, nn

from minrnn.layers.states import autocasts, one_state
from minrnn.ops.checks import check_tensor

# what layers are made of, and what of it autocast casts
_FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_CAST = (torch.float32, torch.bfloat16, torch.float16)


class SizeError(ValueError, RuntimeError):
    """A shape does not fit: a ValueError, and the RuntimeError that torch's layers raise."""


class DeviceError(ValueError, RuntimeError):
    """A tensor is on another device: a ValueError, and torch's RuntimeError."""


class DTypeError(TypeError, ValueError, RuntimeError):
    """A dtype does not fit: a TypeError, and what torch's layers raise, which differs by layer."""


def fx_module_name(module: nn.Module) -> str:
    """The `__module__` of an object that torch.fx makes a leaf of its graphs, as nn.GRU is one.

    By default a Tracer traces into what does not name torch.nn as its module. The class keeps its
    own name, which is the one that pickle reads.
    """
    return f"torch.nn ({type(module).__module__})"


def check_sizes(sizes: dict[str, int], at_least: int = 1) -> None:
    """Each an int that is large enough; a bool is a flag in the place of a size."""
    for name, size in sizes.items():
        if not isinstance(size, int) or isinstance(size, bool):
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
    if input.device != weight.device:
        raise DeviceError(
            f"`input` must be on {weight.device} like the weights, got {input.device}"
        )
    if autocasts(input.device):
        if input.dtype not in _CAST:
            raise DTypeError(f"`input` must have a dtype that autocast casts, got {input.dtype}")
    elif input.dtype != weight.dtype:
        raise DTypeError(
            f"`input` must have the dtype of the weights, {weight.dtype}, got {input.dtype}"
        )


def check_packed(data: Tensor, batch_sizes: Tensor) -> None:
    """As many rows as steps, of which no sequence has one more after it has ended."""
    if data.dim() != 2:
        raise SizeError(f"`input` must pack rows (S, input_size), got {tuple(data.shape)}")
    sizes = batch_sizes.tolist()
    rising = any(before < after for before, after in pairwise(sizes))
    if not sizes or rising or sizes[-1] < 1 or sum(sizes) != len(data):
        raise SizeError(
            f"`input` must have batch_sizes >= 1 that never rise and sum to S = {len(data)}, "
            f"got {sizes if len(sizes) <= 10 else [*sizes[:10], '...']}"
        )


def check_state_kind(hx: Tensor, input: Tensor) -> None:
    """`hx` has the dtype of `input` or of the state, or one that autocast casts; and its device."""
    state = torch.float64 if input.dtype == torch.float64 else torch.float32
    known = _CAST if autocasts(input.device) else (input.dtype, state)
    if hx.dtype not in known:
        names = " or ".join(dict.fromkeys(str(dtype) for dtype in known))
        raise DTypeError(f"`hx` must have dtype {names}, got {hx.dtype}")
    if hx.device != input.device:
        raise DeviceError(f"`hx` must be on {input.device} like `input`, got {hx.device}")


def check_flags(flags: dict[str, bool]) -> None:
    for name, flag in flags.items():
        if not isinstance(flag, bool):
            raise TypeError(f"`{name}` must be a bool, got {type(flag).__name__}")


def check_placement(device: Any, dtype: Any) -> None:
    """Of weights: a device, and a dtype that the operators take."""
    if not isinstance(device, (str, torch.device, int, NoneType)) or isinstance(device, bool):
        raise TypeError(f"`device` must be a torch.device or a str, got {type(device).__name__}")
    if not isinstance(dtype, (torch.dtype, NoneType)):
        raise TypeError(f"`dtype` must be a torch.dtype, got {type(dtype).__name__}")
    if dtype is not None and dtype not in _FLOATS:
        known = ", ".join(str(known) for known in _FLOATS)
        raise DTypeError(f"`dtype` must be one of {known}, got {dtype}")


def check_options(
    sizes: dict[str, int], flags: dict[str, bool], dropout: float, proj_size: int
) -> None:
    check_flags(flags)
    check_sizes(sizes)
    check_sizes({"proj_size": proj_size}, at_least=0)
    if isinstance(dropout, bool) or not isinstance(dropout, (int, float)) or not 0 <= dropout <= 1:
        raise ValueError(f"`dropout` must be a number from 0 to 1, got {dropout!r}")


def cell_state(hx: Any, proj_size: int = 0) -> Tensor | None:
    """The one state of a pair (h_0, c_0) that fit each other; what is no pair is itself.

    h_0 has the shape of c_0, or as many features as y where that is projected.
    """
    if not isinstance(hx, (tuple, list)):
        return hx
    if len(hx) != 2:
        raise ValueError(f"`hx` must be a tensor or the pair (h_0, c_0), got {len(hx)} parts")
    h_0, c_0 = hx
    for x in hx:
        check_tensor("hx", x)
    # sizes are compared one by one: while torch.jit traces they are tensors, which hash by identity
    fits = h_0.dim() == c_0.dim() and h_0.shape[:-1] == c_0.shape[:-1]
    if fits and c_0.dim():
        fits = h_0.shape[-1] in (c_0.shape[-1], proj_size or c_0.shape[-1])
    if not fits:
        shapes = f"{tuple(h_0.shape)} and {tuple(c_0.shape)}"
        raise SizeError(f"`hx` must be a pair (h_0, c_0) of one shape, got {shapes}")
    fits = h_0.dtype == c_0.dtype
    fits = fits or (autocasts(c_0.device) and h_0.dtype in _CAST and c_0.dtype in _CAST)
    if h_0.device != c_0.device or not fits:
        kinds = f"{h_0.dtype} on {h_0.device} and {c_0.dtype} on {c_0.device}"
        error = DTypeError if h_0.device == c_0.device else DeviceError
        raise error(f"`hx` must be a pair (h_0, c_0) of one dtype and device, got {kinds}")
    return one_state(h_0, c_0)
