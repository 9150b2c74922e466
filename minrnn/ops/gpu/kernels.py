"""scan, mingru and minlstm on the GPU, in Triton: one pass over memory, the state in registers.

Nothing is written but the results, and the backward pass computes the activations again. How a call
is spread over a GPU is decided by `plan_of`: step by step (`steps`) or over chunks of time
(`chunks`). Names, arguments and results are those of `torch_kernels`.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from minrnn.ops.gpu import chunks, steps

# through time: steps whose loads are under way; bytes that each thread of a warp loads at a time
STAGES, WIDE = 8, 16
# chunks of time: steps and channels of a program
STEPS, NARROW = 64, 32
# programs for each multiprocessor from which on no chunks are needed
FILLED = 4


class Device(NamedTuple):
    """What a launch depends on."""

    multiprocessors: int
    warp: int
    """its threads"""
    is_amd: bool = False


# tensors on the CPU are only met by the interpreter
INTERPRETED = Device(1, 32)


def scan(a: Tensor, b: Tensor, h0: Tensor | None, *layout: Any) -> tuple[Tensor, Tensor]:
    """h_t = a_t * h_{t-1} + b_t."""
    return _forward("scan", (a, b), h0, (), layout)


def scan_backward(
    dh: Tensor, dh_T: Tensor, a: Tensor, h0: Tensor | None, h: Tensor, *layout: Any
) -> tuple[Tensor, ...]:
    """The gradients of a, b and h0."""
    return _backward("scan", dh, dh_T, (a,), h0, h, (), layout)


def mingru(
    k: Tensor, v: Tensor, h0: Tensor | None, candidate: str, *layout: Any
) -> tuple[Tensor, Tensor]:
    """a = sigmoid(-k), b = sigmoid(k) * candidate(v)."""
    return _forward("mingru", (k, v), h0, (candidate,), layout)


def mingru_backward(
    dh: Tensor, dh_T: Tensor, k: Tensor, v: Tensor, h0: Tensor | None, h: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    """The gradients of k, v and h0."""
    return _backward("mingru", dh, dh_T, (k, v), h0, h, rest[:1], rest[1:])


def minlstm(
    f: Tensor, i: Tensor, v: Tensor, h0: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor]:
    """a = f', b = i' * candidate(v), with f' + i' = 1 if normalized."""
    return _forward("minlstm", (f, i, v), h0, rest[:2], rest[2:])


def minlstm_backward(
    dh: Tensor,
    dh_T: Tensor,
    f: Tensor,
    i: Tensor,
    v: Tensor,
    h0: Tensor | None,
    h: Tensor,
    *rest: Any,
) -> tuple[Tensor, ...]:
    """The gradients of f, i, v and h0."""
    return _backward("minlstm", dh, dh_T, (f, i, v), h0, h, rest[:2], rest[2:])


def mingru_fused(gates: Tensor, h0: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor]:
    """`mingru` over k and v side by side, and time first if the last option says so."""
    return _fused("mingru", 2, gates, h0, rest)


def mingru_fused_backward(
    dh: Tensor, dh_T: Tensor, gates: Tensor, h0: Tensor | None, h: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    """The gradients of k and v side by side, and of h0."""
    return _fused_backward("mingru", 2, dh, dh_T, gates, h0, h, rest)


def minlstm_fused(gates: Tensor, h0: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor]:
    """`minlstm` over f, i and v side by side, and time first if the last option says so."""
    return _fused("minlstm", 3, gates, h0, rest)


def minlstm_fused_backward(
    dh: Tensor, dh_T: Tensor, gates: Tensor, h0: Tensor | None, h: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    """The gradients of f, i and v side by side, and of h0."""
    return _fused_backward("minlstm", 3, dh, dh_T, gates, h0, h, rest)


def _fused(
    name: str, num: int, gates: Tensor, h0: Tensor | None, rest: tuple[Any, ...]
) -> tuple[Tensor, Tensor]:
    *options, time_first, reset, cu_seqlens, reverse = rest
    h = gates.new_empty(*gates.shape[:2], gates.shape[2] // num)
    gates, reset, own = (_swap(x, time_first) for x in (gates, reset, h))
    layout = (reset, cu_seqlens, reverse)
    _, h_T = _forward(name, gates.chunk(num, dim=2), h0, options, layout, own)
    return h, h_T


def _fused_backward(
    name: str,
    num: int,
    dh: Tensor,
    dh_T: Tensor,
    gates: Tensor,
    h0: Tensor | None,
    h: Tensor,
    rest: tuple[Any, ...],
) -> tuple[Tensor, ...]:
    *options, time_first, reset, cu_seqlens, reverse = rest
    grad = torch.empty_like(gates, memory_format=torch.contiguous_format)
    dh, gates, h, reset, own = (_swap(x, time_first) for x in (dh, gates, h, reset, grad))
    x, d = (each.chunk(num, dim=2) for each in (gates, own))
    layout = (reset, cu_seqlens, reverse)
    *_, dh0 = _backward(name, dh, dh_T, x, h0, h, options, layout, d)
    return grad, dh0


def _swap(x: Any, time_first: bool) -> Any:
    return x if x is None or not time_first else x.transpose(0, 1)


def _forward(
    name: str,
    gates: Sequence[Tensor],
    h0: Tensor | None,
    options: Sequence[Any],
    layout: Sequence[Any],
    h: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The states h, into what is given for them, and the last ones h_T (rows, D)."""
    cu_seqlens = layout[1]
    B, T, D = gates[0].shape
    rows = B if cu_seqlens is None else len(cu_seqlens) - 1
    h = gates[0].new_empty(B, T, D) if h is None else h
    h_T = h.new_empty(rows, D, dtype=_state_dtype(h.dtype))
    if rows and D:
        device = _device(h.device)
        forward_launch(name, gates, h0, h, h_T, options, layout, device).run()
    return h, h_T


def _backward(
    name: str,
    dh: Tensor,
    dh_T: Tensor,
    gates: Sequence[Tensor],
    h0: Tensor | None,
    h: Tensor,
    options: Sequence[Any],
    layout: Sequence[Any],
    grads: Sequence[Tensor] | None = None,
) -> tuple[Tensor, ...]:
    """The gradients of the gates, into what is given for them, and of h0 (rows, D)."""
    if grads is None:
        grads = [h.new_empty(h.shape) for _ in range(3 if name == "minlstm" else 2)]
    dh0 = dh_T.new_empty(dh_T.shape, dtype=dh_T.dtype if h0 is None else h0.dtype)
    if len(dh_T) and h.shape[2]:
        given, taken = (dh, dh_T, gates, h0, h), (grads, dh0)
        device = _device(h.device)
        backward_launch(name, *given, *taken, options, layout, device).run()
    return *grads, dh0


class Plan(NamedTuple):
    """How a call is spread over a GPU."""

    chunks: int
    """of time; 0 for one program per row and block, which goes through all of it"""
    blocks: int
    """of channels, BLOCK each"""
    BLOCK: int
    programs: int
    num_warps: int
    """of a program"""


def plan_of(rows: int, T: int, D: int, dtype: torch.dtype, is_packed: bool, device: Device) -> Plan:
    """Through time where rows and channels fill the GPU, else over chunks of time.

    A GPU is filled when each multiprocessor has `FILLED` programs of one warp. Sequences laid end
    to end, float64 and short sequences always go through time.
    """
    BLOCK = device.warp * WIDE // dtype.itemsize
    blocks = triton.cdiv(D, BLOCK)
    whole = Plan(0, blocks, BLOCK, rows * blocks, num_warps=1)
    if is_packed or dtype == torch.float64 or T < 4 * STEPS:
        return whole
    if whole.programs >= FILLED * device.multiprocessors:
        return whole
    num, blocks = triton.cdiv(T, STEPS), triton.cdiv(D, NARROW)
    return Plan(num, blocks, NARROW, rows * blocks * num, num_warps=4)


class Launch(NamedTuple):
    """A kernel and all that it is launched with."""

    kernel: Any
    plan: Plan
    args: tuple[Any, ...]
    options: dict[str, Any]

    def run(self) -> None:
        """Launch it, on the device of its tensors."""
        # Triton's choice is the current device
        with torch.cuda.device_of(self.args[0]):
            self.kernel[(self.plan.programs,)](*self.args, **self.options)


def forward_launch(
    name: str,
    gates: Sequence[Tensor],
    h0: Tensor | None,
    h: Tensor,
    h_T: Tensor,
    options: Sequence[Any],
    layout: Sequence[Any],
    device: Device,
) -> Launch:
    """What computes h and h_T on a device; the tensors need not be there, "meta" will do."""
    reset, cu_seqlens, reverse = layout
    (rows, D), T = h_T.shape, h.shape[1]
    x = _three([_dense(gate) for gate in gates])
    strides = (*_strides(*x, h), *_reset_strides(reset))
    constants = (name, *_constants(options), reverse)
    plan = plan_of(rows, T, D, h.dtype, cu_seqlens is not None, device)
    tensors = (*x, _whole(h0), h, h_T, _bytes(reset))
    kernel = chunks.forward if plan.chunks else steps.forward
    sizes = (rows, T, D)
    return _launch(kernel, plan, device, tensors, cu_seqlens, sizes, strides, constants)


def backward_launch(
    name: str,
    dh: Tensor,
    dh_T: Tensor,
    gates: Sequence[Tensor],
    h0: Tensor | None,
    h: Tensor,
    grads: Sequence[Tensor],
    dh0: Tensor,
    options: Sequence[Any],
    layout: Sequence[Any],
    device: Device,
) -> Launch:
    """What computes `grads` and dh0, likewise."""
    reset, cu_seqlens, reverse = layout
    (rows, D), T = dh_T.shape, h.shape[1]
    dh, h = _dense(dh), _dense(h)
    x, d = _three([_dense(gate) for gate in gates]), _three(grads)
    strides = (*_strides(*x, dh, h, *d), *_reset_strides(reset))
    constants = (name, *_constants(options), reverse)
    plan = plan_of(rows, T, D, h.dtype, cu_seqlens is not None, device)
    tensors = (dh, dh_T.contiguous(), *x, _whole(h0), h, *d, dh0, _bytes(reset))
    kernel = chunks.backward if plan.chunks else steps.backward
    sizes = (rows, T, D)
    return _launch(kernel, plan, device, tensors, cu_seqlens, sizes, strides, constants)


def _launch(
    kernel: Any,
    plan: Plan,
    device: Device,
    tensors: tuple[Any, ...],
    cu_seqlens: Tensor | None,
    sizes: tuple[int, int, int],
    strides: Sequence[int],
    constants: Sequence[Any],
) -> Launch:
    rows, T, D = sizes
    # named, since Triton warns where it is left to its default
    options = {"num_warps": plan.num_warps, "enable_fp_fusion": True}
    if plan.chunks:
        board = _board(plan, rows, D, tensors[0].device)
        tail = (STEPS, plan.BLOCK, device.is_amd)
        args = (*tensors, *board, rows, T, D, plan.blocks, *strides, *constants, *tail)
    else:
        tail = (plan.BLOCK, STAGES)
        args = (*tensors, cu_seqlens, T, D, plan.blocks, *strides, *constants, *tail)
    return Launch(kernel, plan, args, options)


def _device(device: torch.device) -> Device:
    if device.type == "cpu":
        return INTERPRETED
    found = torch.cuda.get_device_properties(device)
    return Device(found.multi_processor_count, found.warp_size, torch.version.hip is not None)


def _board(plan: Plan, rows: int, D: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Where programs tell each other: a counter, totals of chunks, states of their groups."""
    counter = torch.zeros(1, dtype=torch.int32, device=device)
    groups = triton.cdiv(plan.chunks, chunks.GROUP.value)
    words = torch.full((plan.chunks + groups, rows, D), chunks.EMPTY.value, device=device)
    return counter, words[: plan.chunks], words[plan.chunks :]


def _state_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _dense(x: Tensor) -> Tensor:
    """`x` with its channels side by side, as the kernels read them."""
    return x if x.stride(2) == 1 or x.shape[2] <= 1 else x.contiguous()


def _whole(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _three(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Three of them: a kernel that has fewer gates leaves the others alone."""
    return [*tensors, *[tensors[0]] * (3 - len(tensors))]


def _strides(*tensors: Tensor) -> list[int]:
    return [stride for x in tensors for stride in x.stride()[:2]]


def _bytes(reset: Tensor | None) -> Tensor | None:
    return None if reset is None else reset.view(torch.uint8)


def _reset_strides(reset: Tensor | None) -> tuple[int, int]:
    return (0, 0) if reset is None else (reset.stride(0), reset.stride(1))


def _constants(options: Sequence[Any]) -> tuple[str, bool]:
    """CANDIDATE and NORMALIZED, for operators that lack them too."""
    candidate, normalized = [*options, *("identity", True)[len(options) :]]
    return candidate, normalized
