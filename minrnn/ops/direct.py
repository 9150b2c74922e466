"""What every kernel demands of a direct call of `torch.ops.minrnn`.

Public functions check their arguments in `checks.py`, with messages for people. A direct call, or a
traced graph with other inputs, comes past them: the compiled kernels check in C++ what could lead
them to foreign memory, and pure torch, Triton's kernels and the fake kernels check the same here.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minrnn.ops.checks import DTYPES, check_bounds, check_candidate, check_shape


class _Arguments(NamedTuple):
    gates: int
    """how many tensors the forward pass begins with"""
    saved: int
    """how many of them the gradient reads"""
    fused: int
    """how many gates lie side by side in a tensor"""


_ARGUMENTS = {
    "scan": _Arguments(2, 1, 1),
    "mingru": _Arguments(2, 2, 1),
    "minlstm": _Arguments(3, 3, 1),
    "mingru_fused": _Arguments(1, 1, 2),
    "minlstm_fused": _Arguments(1, 1, 3),
}


def check_call(name: str, args: Sequence[Any], *, read_bounds: bool) -> None:
    """Refuse arguments of the operator `name` that do not fit each other.

    Args:
        name: of an operator, `_backward` included.
        args: all of them, in the order of its schema.
        read_bounds: whether the values of `cu_seqlens` are read, too; a device would be waited for.

    Raises:
        ValueError: a shape, device, bound or option does not fit.
        TypeError: a dtype does not fit, or an argument is no tensor.
    """
    known = _ARGUMENTS[name.removesuffix("_backward")]
    if name.endswith("_backward"):
        dh, dh_T, *gates = args[: 2 + known.saved]
        h0, h, *options = args[2 + known.saved :]
        outputs, states = {"dh": dh, "h": h}, {"dh_T": dh_T}
    else:
        gates, (h0, *options) = args[: known.gates], args[known.gates :]
        outputs, states = {}, {}
    if h0 is not None:
        states["h0"] = h0
    *options, reset, cu_seqlens, _ = options
    B, T, D = _sizes(gates, known.fused)
    sizes = tuple(gates[0].shape[:2])
    if known.fused > 1 and options[-1]:
        B, T = T, B
    if options:
        check_candidate(options[0])
    rows = B
    if cu_seqlens is not None:
        _check_cu_seqlens(cu_seqlens, B, T, read_bounds)
        rows = cu_seqlens.shape[0] - 1
    for key, x in outputs.items():
        check_shape(key, x, "(B, T, D)", (*sizes, D))
        _check_dtype(key, x, gates[0].dtype)
    for key, x in states.items():
        _check_state(key, x, (rows, D))
    if reset is not None:
        check_shape("reset", reset, "(B, T)", sizes)
        _check_dtype("reset", reset, torch.bool)
    _check_devices((*gates, *outputs.values(), *states.values(), reset, cu_seqlens))


def _sizes(gates: Sequence[Tensor], fused: int) -> tuple[int, int, int]:
    first = gates[0]
    if first.dim() != 3 or first.shape[2] % fused:
        raise ValueError(f"gates must have shape (B, T, {fused} * D), got {tuple(first.shape)}")
    if first.dtype not in DTYPES:
        raise TypeError(f"gates must have one of {DTYPES}, got {first.dtype}")
    for x in gates[1:]:
        check_shape("gates", x, "(B, T, D)", tuple(first.shape))
        _check_dtype("gates", x, first.dtype)
    return first.shape[0], first.shape[1], first.shape[2] // fused


def _check_dtype(name: str, x: Tensor, dtype: torch.dtype) -> None:
    if x.dtype != dtype:
        raise TypeError(f"`{name}` must have dtype {dtype}, got {x.dtype}")


def _check_state(name: str, x: Tensor, sizes: tuple[int, int]) -> None:
    check_shape(name, x, "(rows, D)", sizes)
    if not x.dtype.is_floating_point:
        raise TypeError(f"`{name}` must have a floating dtype, got {x.dtype}")


def _check_cu_seqlens(cu_seqlens: Tensor, B: int, T: int, read_bounds: bool) -> None:
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"`cu_seqlens` must have dtype int32 or int64, got {cu_seqlens.dtype}")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1 or B != 1:
        raise ValueError(
            f"`cu_seqlens` must have shape (N + 1,) and the batch one row, got "
            f"{tuple(cu_seqlens.shape)}, B = {B}"
        )
    if read_bounds:
        check_bounds(cu_seqlens, T)


def _check_devices(tensors: Sequence[Tensor | None]) -> None:
    devices = {x.device for x in tensors if x is not None}
    if len(devices) > 1:
        raise ValueError(f"all tensors must be on one device, got {sorted(map(str, devices))}")
