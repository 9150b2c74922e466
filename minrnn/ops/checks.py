"""What the operators demand of their arguments, said where a person passes them in."""

from itertools import pairwise

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_CANDIDATES = ("g", "identity", "tanh")


def check_gates(gates: dict[str, Tensor], candidate: str = "g") -> None:
    """All (B, T, D), of one supported dtype, on one device."""
    check_candidate(candidate)
    first_name, first = next(iter(gates.items()))
    for name, x in gates.items():
        check_tensor(name, x)
        if x.dtype not in DTYPES:
            known = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
            raise TypeError(f"`{name}` must have dtype {known}, got {x.dtype}")
        if x.dtype != first.dtype:
            raise TypeError(
                f"`{name}` must have the dtype of `{first_name}`, {first.dtype}, got {x.dtype}"
            )
        if x.dim() != 3:
            raise ValueError(f"`{name}` must have shape (B, T, D), got {tuple(x.shape)}")
        check_shape(name, x, "(B, T, D)", tuple(first.shape))
        refuse_forward_mode(x)
        _check_device(name, x, first)


def check_layout(
    x: Tensor,
    h0: Tensor | None,
    reset: Tensor | None,
    cu_seqlens: Tensor | None,
    fused: int = 1,
    time_first: bool = False,
) -> None:
    """`h0`, `reset` and `cu_seqlens` as they must be beside `x`, which holds `fused` gates."""
    B, T, D = x.shape[0], x.shape[1], x.shape[2] // fused
    if time_first:
        B, T = T, B
    rows, rows_name = B, "(B, D)"
    if cu_seqlens is not None:
        _check_cu_seqlens(cu_seqlens, B, T)
        _check_device("cu_seqlens", cu_seqlens, x)
        rows, rows_name = cu_seqlens.shape[0] - 1, "(N, D)"
    if h0 is not None:
        check_tensor("h0", h0)
        if not h0.is_floating_point():
            raise TypeError(f"`h0` must have a floating dtype, got {h0.dtype}")
        check_shape("h0", h0, rows_name, (rows, D))
        refuse_forward_mode(h0)
        _check_device("h0", h0, x)
    if reset is not None:
        check_tensor("reset", reset)
        if reset.dtype != torch.bool:
            raise TypeError(f"`reset` must have dtype torch.bool, got {reset.dtype}")
        check_shape("reset", reset, "(T, B)" if time_first else "(B, T)", tuple(x.shape[:2]))
        _check_device("reset", reset, x)


def refuse_forward_mode(x: Tensor) -> None:
    """`x` carries no tangent: the operators would drop it and answer with a derivative of zero."""
    if not torch.compiler.is_compiling() and unpack_dual(x).tangent is not None:
        raise NotImplementedError(
            "forward-mode derivatives are not supported: use reverse mode, or minrnn.ops.reference"
        )


def check_candidate(candidate: str) -> None:
    """`candidate` names one of the candidate activations."""
    if candidate not in _CANDIDATES:
        known = ", ".join(repr(name) for name in _CANDIDATES)
        raise ValueError(f"`candidate` must be one of {known}, got {candidate!r}")


def check_flag(name: str, flag: bool) -> None:
    """`flag` is a bool: torch takes None for False, and numbers by their truth."""
    if not isinstance(flag, bool):
        raise TypeError(f"`{name}` must be a bool, got {flag!r}")


def check_tensor(name: str, x: object) -> None:
    """`x` is a tensor."""
    if not isinstance(x, Tensor):
        raise TypeError(f"`{name}` must be a Tensor, got {type(x).__name__}")


def check_shape(name: str, x: Tensor, symbols: str, sizes: tuple[int, ...]) -> None:
    """`x` has the shape `sizes`, which a message calls by its `symbols`."""
    if tuple(x.shape) != sizes:
        raise ValueError(f"`{name}` must have shape {symbols} = {sizes}, got {tuple(x.shape)}")


def _check_device(name: str, x: Tensor, like: Tensor) -> None:
    if x.device != like.device:
        raise ValueError(f"`{name}` must be on {like.device} like the gates, got {x.device}")


def _check_cu_seqlens(cu_seqlens: Tensor, B: int, T: int) -> None:
    check_tensor("cu_seqlens", cu_seqlens)
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"`cu_seqlens` must have dtype int32 or int64, got {cu_seqlens.dtype}")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
        raise ValueError(f"`cu_seqlens` must have shape (N + 1,), got {tuple(cu_seqlens.shape)}")
    if B != 1:
        raise ValueError(f"`cu_seqlens` needs a batch of one row, B = 1, got B = {B}")
    # the values are read only where that neither waits for a device nor breaks a traced graph
    if cu_seqlens.device.type != "cpu" or torch.compiler.is_compiling():
        return
    check_bounds(cu_seqlens, T)


def check_bounds(cu_seqlens: Tensor, T: int) -> None:
    """The values of `cu_seqlens` rise from 0 to T."""
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0 or bounds[-1] != T or any(a > b for a, b in pairwise(bounds)):
        raise ValueError(f"`cu_seqlens` must rise from 0 to T = {T}, got {_short(bounds)}")


def _short(values: list[int]) -> str:
    return str(values) if len(values) <= 8 else f"[{values[0]}, {values[1]}, ..., {values[-1]}]"
