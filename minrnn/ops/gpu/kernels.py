"""scan, mingru and minlstm on the GPU, in Triton: what is launched, and how it is spread.

The state is in registers, and the backward pass computes the activations again. `plan_of` decides:
one pass through time (`steps`), or one over chunks of time (`chunks`) and then one through each.
Names, arguments and results are those of `torch_kernels`.
"""

from collections.abc import Sequence
from functools import cache
from math import isqrt
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minrnn.ops.gpu import chunks, steps

# steps whose loads are under way, and channels of a thread, at most
STAGES, EACH = 8, 4
# programs for each multiprocessor, times the bytes of an element, from which on no chunks of time
# are needed; programs that there are to be where they are; and the least steps of a chunk. Measured
# on an H200: docs/results.md.
FILLED, CHUNKED, LEAST = 7, 16, 32
# named, since Triton warns where they are left to its default
OPTIONS = {"num_warps": 1, "enable_fp_fusion": True}


class Device(NamedTuple):
    """What a launch depends on."""

    multiprocessors: int
    warp: int
    """its threads"""


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
        plan = plan_of(rows, T, D, h.dtype, cu_seqlens is not None, device_of(h.device))
        for launch in forward_launches(name, gates, h0, h, h_T, options, layout, plan):
            launch.run()
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
    # what arithmetic is done in
    dh_T = dh_T.to(_state_dtype(h.dtype))
    dh0 = dh_T.new_empty(dh_T.shape, dtype=dh_T.dtype if h0 is None else h0.dtype)
    rows, T, D = len(dh_T), *h.shape[1:]
    if rows and D:
        plan = plan_of(rows, T, D, h.dtype, layout[1] is not None, device_of(h.device))
        given, taken = (dh, dh_T, gates, h0, h), (grads, dh0)
        for launch in backward_launches(name, *given, *taken, options, layout, plan):
            launch.run()
    return *grads, dh0


class Plan(NamedTuple):
    """How a call is spread over a GPU; a program is one warp."""

    BLOCK: int
    """channels of a program"""
    blocks: int
    chunks: int
    """of time, one after the other"""
    chunk_steps: int
    programs: int


def plan_of(rows: int, T: int, D: int, dtype: torch.dtype, is_packed: bool, device: Device) -> Plan:
    """Through time where rows and channels fill the GPU, else over chunks of time.

    Sequences laid end to end and short ones always go through time. Of chunks there are at most
    2 sqrt(T), as each goes through the totals of those before it.
    """
    whole = plan_with(1, rows, T, D, device)
    filled = FILLED * device.multiprocessors
    if is_packed or whole.programs * dtype.itemsize >= filled or T < 2 * LEAST:
        return whole
    wanted = _whole_parts(CHUNKED * device.multiprocessors, whole.programs)
    return plan_with(min(wanted, T // LEAST, isqrt(4 * T)), rows, T, D, device)


def plan_with(chunks: int, rows: int, T: int, D: int, device: Device) -> Plan:
    """A plan with so many chunks of time, or a few less: each has as many steps, but the last."""
    BLOCK = device.warp * EACH
    while max(D, device.warp) <= BLOCK // 2:
        BLOCK //= 2
    blocks = _whole_parts(D, BLOCK)
    chunk_steps = _whole_parts(max(T, 1), chunks)
    chunks = _whole_parts(max(T, 1), chunk_steps)
    return Plan(BLOCK, blocks, chunks, chunk_steps, rows * blocks * chunks)


class Launch(NamedTuple):
    """A kernel and all that it is launched with."""

    kernel: Any
    plan: Plan
    args: tuple[Any, ...]

    def run(self) -> None:
        """Launch it, on the device of its tensors."""
        # Triton's choice is the current device
        with torch.cuda.device_of(self.args[0]):
            self.kernel[(self.plan.programs,)](*self.args, **OPTIONS)


def forward_launches(
    name: str,
    gates: Sequence[Tensor],
    h0: Tensor | None,
    h: Tensor,
    h_T: Tensor,
    options: Sequence[Any],
    layout: Sequence[Any],
    plan: Plan,
) -> list[Launch]:
    """What computes h and h_T; the tensors need not be there, "meta" will do."""
    reset, cu_seqlens, reverse = layout
    (rows, D), T = h_T.shape, h.shape[1]
    x = _three([_dense(gate) for gate in gates])
    sizes = (rows, T, D, plan.blocks, plan.chunk_steps)
    tail = (*_reset_strides(reset), name, *_constants(options), reverse, plan.BLOCK, STAGES)
    totals = _Totals.of(plan, h_T, reset)
    tensors = (*x, _whole(h0), h, h_T, _bytes(reset), cu_seqlens, *totals)
    last = Launch(steps.forward, plan, (*tensors, *sizes, *_strides(*x, h), *tail))
    if plan.chunks == 1:
        return [last]
    tensors = (*x, None, _bytes(reset), *totals)
    args = (*tensors, *sizes, *_strides(*x), 0, 0, *tail)
    return [Launch(chunks.totals, plan, args), last]


def backward_launches(
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
    plan: Plan,
) -> list[Launch]:
    """What computes `grads` and dh0, likewise."""
    reset, cu_seqlens, reverse = layout
    (rows, D), T = dh_T.shape, h.shape[1]
    dh, h = _dense(dh), _dense(h)
    x, d = _three([_dense(gate) for gate in gates]), _three(grads)
    sizes = (rows, T, D, plan.blocks, plan.chunk_steps)
    tail = (*_reset_strides(reset), name, *_constants(options), reverse, plan.BLOCK, STAGES)
    totals = _Totals.of(plan, dh_T, reset)
    tensors = (dh, dh_T.contiguous(), *x, _whole(h0), h, *d, dh0)
    tensors = (*tensors, _bytes(reset), cu_seqlens, *totals)
    last = Launch(steps.backward, plan, (*tensors, *sizes, *_strides(*x, dh, h, *d), *tail))
    if plan.chunks == 1:
        return [last]
    args = (*x, dh, _bytes(reset), *totals, *sizes, *_strides(*x, dh), *tail)
    return [Launch(chunks.totals, plan, args), last]


class _Totals(NamedTuple):
    """What each chunk does to a state; nothing where there is one chunk."""

    decays: Tensor | None
    rests: Tensor | None
    cuts: Tensor | None

    @classmethod
    def of(cls, plan: Plan, state: Tensor, reset: Tensor | None) -> "_Totals":
        """Room for them, in the dtype of the state (rows, D)."""
        if plan.chunks == 1:
            return cls(None, None, None)
        rows, D = state.shape
        # the last chunk's are not needed, but have a place
        decays, rests = state.new_empty(2, plan.chunks, rows, D)
        cuts = None if reset is None else state.new_empty(plan.chunks, rows, dtype=torch.int32)
        return cls(decays, rests, cuts)


def _whole_parts(whole: int, part: int) -> int:
    """How many parts hold the whole; Triton's own takes as long as a launch on the host."""
    return -(-whole // part)


def device_of(device: torch.device) -> Device:
    """What a launch on `device` depends on."""
    return INTERPRETED if device.type == "cpu" else _gpu(device)


@cache
def _gpu(device: torch.device) -> Device:
    found = torch.cuda.get_device_properties(device)
    return Device(found.multi_processor_count, found.warp_size)


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
