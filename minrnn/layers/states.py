"""States and outputs as torch's layers take and return them: pairs, dtypes, memory of their own."""

import math

import torch
from torch import Tensor, nn


def one_state(h_0: Tensor, c_0: Tensor) -> Tensor:
    """The state that a pair (h_0, c_0) on one device stands for.

    Entry by entry the two agree, or one of them is zero and the other one counts. Entries that
    differ otherwise are refused. Where values cannot be read without breaking a graph (while
    compiling, exporting, tracing, under `torch.func`, in a CUDA graph, on meta tensors, in
    subclasses of Tensor) such entries become NaN instead.

    An h_0 of other features, that of an nn.LSTM with `proj_size`, must be zeros.

    Gradients go to the tensor whose entry is used. Where both agree, they go to the one that
    requires them, or half to each: equal learned states stay equal.
    """
    if h_0 is c_0:
        return c_0
    if h_0.dtype != c_0.dtype:
        # under autocast only
        wide = torch.promote_types(h_0.dtype, c_0.dtype)
        h_0, c_0 = h_0.to(wide), c_0.to(wide)
    readable = _readable(h_0, c_0)
    if h_0.shape != c_0.shape:
        clash = (h_0 != 0).any(-1, keepdim=True)
        if readable and clash.any():
            raise ValueError(
                "`hx` must be a pair (h_0, c_0) whose h_0 is zeros where it has not the features "
                f"of the state, got other values of shape {tuple(h_0.shape)}; pass c_0 alone"
            )
        return c_0 if readable else c_0.masked_fill(clash, math.nan)
    both = h_0.requires_grad and c_0.requires_grad
    state, other = (h_0, c_0) if h_0.requires_grad and not both else (c_0, h_0)
    if readable and torch.equal(h_0, c_0):
        return 0.5 * h_0 + 0.5 * c_0 if both else state
    clash = (state != 0) & (other != 0) & (state != other)
    if readable:
        # NaN in both is a state that the caller's `reset` may yet drop
        _refuse(clash & ~(state.isnan() & other.isnan()))
    mean = 0.5 * state + 0.5 * other if both else state
    state = torch.where(state == other, mean, torch.where(state == 0, other, state))
    return state if readable else state.masked_fill(clash, math.nan)


def _refuse(clash: Tensor) -> None:
    found = int(clash.sum())
    if found:
        raise ValueError(
            "`hx` must be one state: a tensor, or a pair (h_0, c_0) of which each entry agrees or "
            f"is zero in one, got {found} of {clash.numel()} entries that differ; pass one of the "
            "two"
        )


def _readable(*tensors: Tensor) -> bool:
    """Whether values can be looked at here without an error, a warning or a broken graph."""
    if torch.compiler.is_compiling() or torch._C._is_tracing():
        return False
    if torch._C._are_functorch_transforms_active() or torch._C._len_torch_dispatch_stack():
        return False
    if any(type(x) not in (Tensor, nn.Parameter) or x.is_meta for x in tensors):
        return False
    return not (tensors[0].is_cuda and torch.cuda.is_current_stream_capturing())


def autocasts(device: torch.device) -> bool:
    """Autocast is enabled for this device."""
    kind = device.type
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)


def returned(h_n: Tensor, input: Tensor, hx: Tensor | None) -> Tensor:
    """States as a call returns them: in the dtype of `hx`, or of `input` without one.

    Under autocast as they are computed, float32: autocast casts them where it uses them.
    """
    dtype = input.dtype if hx is None else hx.dtype
    return h_n if h_n.dtype == dtype or autocasts(input.device) else h_n.to(dtype)


def writable(y: Tensor) -> Tensor:
    """`y`, which autograd has saved, for work in place, as nn.GRU's on the CPU.

    Copied only if somebody writes to it; in a graph that is compiled or transformed, at once. On
    other devices autograd refuses such work.
    """
    if not y.requires_grad or y.device.type != "cpu":
        return y
    if _readable(y):
        return torch.ops.aten._lazy_clone(y)
    # what is exported or traced runs without autograd
    if torch.compiler.is_compiling():
        return y if torch.compiler.is_exporting() else y.clone()
    return y if torch._C._is_tracing() else y.clone()
