"""scan, mingru and minlstm on the GPU, in Triton: one pass over memory, the state in registers.

A program has a row and a block of channels and goes through time; its loads run several steps
ahead. Nothing is written but the results, and the backward pass computes the activations again.
Names, arguments and results are those of `torch_kernels`.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from minrnn.ops.gpu import chunks
from minrnn.ops.gpu.formulas import coefficients, derivatives

# through time: steps whose loads are under way; bytes that each thread of a warp loads at a time
STAGES, _WIDE, _THREADS = 8, 16, 32
# chunks of time: steps and channels of a program
STEPS, NARROW = 64, 32
# programs for each multiprocessor from which on no chunks are needed
FILLED = 4


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
    pairs = (x.chunk(num, dim=2) for x in (gates, own))
    x, d = pairs
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
    reset, cu_seqlens, reverse = layout
    B, T, D = gates[0].shape
    rows = B if cu_seqlens is None else len(cu_seqlens) - 1
    h = gates[0].new_empty(B, T, D) if h is None else h
    h_T = h.new_empty(rows, D, dtype=_state_dtype(h.dtype))
    x = _three([_dense(gate) for gate in gates])
    strides = (*_strides(*x, h), *_reset_strides(reset))
    constants = (name, *_constants(options), reverse)
    plan = plan_of(rows, T, D, h, cu_seqlens)
    if rows and D and plan.chunks:
        chunks.forward[(plan.programs,)](
            *x, _whole(h0), h, h_T, _bytes(reset), *_board(plan, rows, D, h),
            rows, T, D, plan.blocks, *strides, *constants, STEPS, plan.BLOCK, num_warps=4,
        )  # fmt: skip
    elif rows and D:
        _forward_kernel[(plan.programs,)](
            *x, _whole(h0), h, h_T, _bytes(reset), cu_seqlens,
            T, D, plan.blocks, *strides, *constants, plan.BLOCK, STAGES, num_warps=1,
        )  # fmt: skip
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
    reset, cu_seqlens, reverse = layout
    T, D = h.shape[1:]
    if grads is None:
        grads = [h.new_empty(h.shape) for _ in range(3 if name == "minlstm" else 2)]
    dh0 = dh_T.new_empty(dh_T.shape, dtype=dh_T.dtype if h0 is None else h0.dtype)
    dh, h = _dense(dh), _dense(h)
    x, d = _three([_dense(gate) for gate in gates]), _three(grads)
    rows = len(dh_T)
    strides = (*_strides(*x, dh, h, *d), *_reset_strides(reset))
    constants = (name, *_constants(options), reverse)
    plan = plan_of(rows, T, D, h, cu_seqlens)
    if rows and D and plan.chunks:
        chunks.backward[(plan.programs,)](
            dh, dh_T.contiguous(), *x, _whole(h0), h, *d, dh0,
            _bytes(reset), *_board(plan, rows, D, h),
            rows, T, D, plan.blocks, *strides, *constants, STEPS, plan.BLOCK, num_warps=4,
        )  # fmt: skip
    elif rows and D:
        _backward_kernel[(plan.programs,)](
            dh, dh_T.contiguous(), *x, _whole(h0), h, *d, dh0, _bytes(reset), cu_seqlens,
            T, D, plan.blocks, *strides, *constants, plan.BLOCK, STAGES, num_warps=1,
        )  # fmt: skip
    return *grads, dh0


class Plan(NamedTuple):
    """How a call is spread over a GPU."""

    chunks: int
    """of time; 0 for one program per row and block, which goes through all of it"""
    blocks: int
    """of channels, BLOCK each"""
    BLOCK: int
    programs: int


def plan_of(rows: int, T: int, D: int, x: Tensor, cu_seqlens: Tensor | None) -> Plan:
    """Through time where rows and channels fill the GPU, else over chunks of time.

    A GPU is filled when each multiprocessor has `FILLED` programs of one warp. Sequences laid end
    to end, float64 and short sequences always go through time.
    """
    BLOCK = _THREADS * _WIDE // x.element_size()
    blocks = triton.cdiv(D, BLOCK)
    whole = Plan(0, blocks, BLOCK, rows * blocks)
    if cu_seqlens is not None or x.dtype == torch.float64 or T < 4 * STEPS:
        return whole
    if whole.programs >= FILLED * _multiprocessors(x.device):
        return whole
    num, blocks = triton.cdiv(T, STEPS), triton.cdiv(D, NARROW)
    return Plan(num, blocks, NARROW, rows * blocks * num)


def _multiprocessors(device: torch.device) -> int:
    # tensors on the CPU are only met by the interpreter
    if device.type == "cpu":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


def _board(plan: Plan, rows: int, D: int, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Where programs tell each other: a counter, totals of chunks, states of their groups."""
    counter = torch.zeros(1, dtype=torch.int64, device=x.device)
    groups = triton.cdiv(plan.chunks, chunks.GROUP.value)
    words = torch.full((plan.chunks + groups, rows, D), chunks.EMPTY.value, device=x.device)
    return counter, words[: plan.chunks], words[plan.chunks :]


@triton.jit(do_not_specialize=["T"])
def _forward_kernel(
    x0_ptr, x1_ptr, x2_ptr, h0_ptr, h_ptr, h_T_ptr, reset_ptr, cu_seqlens_ptr,
    T, D, blocks, x0_B, x0_T, x1_B, x1_T, x2_B, x2_T, h_B, h_T, reset_B, reset_T,
    OP: tl.constexpr, CANDIDATE: tl.constexpr, NORMALIZED: tl.constexpr, REVERSE: tl.constexpr,
    BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    n, b, d, inside, start, stop = _place(cu_seqlens_ptr, T, D, blocks, BLOCK)
    C: tl.constexpr = h_T_ptr.dtype.element_ty
    h = tl.zeros([BLOCK], C)
    if h0_ptr is not None:
        h = tl.load(h0_ptr + n * D + d, mask=inside, other=0.0).to(C)
    for s in tl.range(0, stop - start, num_stages=STAGES):
        t = stop - 1 - s if REVERSE else start + s
        x0 = tl.load(x0_ptr + b * x0_B + t * x0_T + d, mask=inside, other=0.0).to(C)
        x1 = tl.load(x1_ptr + b * x1_B + t * x1_T + d, mask=inside, other=0.0).to(C)
        x2 = x0
        if OP == "minlstm":
            x2 = tl.load(x2_ptr + b * x2_B + t * x2_T + d, mask=inside, other=0.0).to(C)
        if reset_ptr is not None:
            h = tl.where(tl.load(reset_ptr + b * reset_B + t * reset_T) != 0, 0.0, h)
        a, add = coefficients(x0, x1, x2, OP, CANDIDATE, NORMALIZED)
        h = a * h + add
        tl.store(h_ptr + b * h_B + t * h_T + d, h.to(h_ptr.dtype.element_ty), mask=inside)
    tl.store(h_T_ptr + n * D + d, h, mask=inside)


@triton.jit(do_not_specialize=["T"])
def _backward_kernel(
    dh_ptr, dh_T_ptr, x0_ptr, x1_ptr, x2_ptr, h0_ptr, h_ptr, d0_ptr, d1_ptr, d2_ptr, dh0_ptr,
    reset_ptr, cu_seqlens_ptr,
    T, D, blocks, x0_B, x0_T, x1_B, x1_T, x2_B, x2_T, dh_B, dh_T, h_B, h_T,
    d0_B, d0_T, d1_B, d1_T, d2_B, d2_T, reset_B, reset_T,
    OP: tl.constexpr, CANDIDATE: tl.constexpr, NORMALIZED: tl.constexpr, REVERSE: tl.constexpr,
    BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    n, b, d, inside, start, stop = _place(cu_seqlens_ptr, T, D, blocks, BLOCK)
    C: tl.constexpr = dh_T_ptr.dtype.element_ty
    S: tl.constexpr = d0_ptr.dtype.element_ty
    # of the loss by the state after step t, then through the step to the one before
    g = tl.load(dh_T_ptr + n * D + d, mask=inside, other=0.0)
    h0 = tl.zeros([BLOCK], C)
    if h0_ptr is not None:
        h0 = tl.load(h0_ptr + n * D + d, mask=inside, other=0.0).to(C)
    for s in tl.range(0, stop - start, num_stages=STAGES):
        t = start + s if REVERSE else stop - 1 - s
        has_earlier = s + 1 < stop - start
        earlier = tl.where(has_earlier, t + 1 if REVERSE else t - 1, t)
        dh = tl.load(dh_ptr + b * dh_B + t * dh_T + d, mask=inside, other=0.0).to(C)
        x0 = tl.load(x0_ptr + b * x0_B + t * x0_T + d, mask=inside, other=0.0).to(C)
        x1, x2 = x0, x0
        if OP != "scan":
            x1 = tl.load(x1_ptr + b * x1_B + t * x1_T + d, mask=inside, other=0.0).to(C)
        if OP == "minlstm":
            x2 = tl.load(x2_ptr + b * x2_B + t * x2_T + d, mask=inside, other=0.0).to(C)
        p = tl.load(h_ptr + b * h_B + earlier * h_T + d, mask=inside, other=0.0)
        p = tl.where(has_earlier, p.to(C), h0)
        g += dh
        keep = 1.0
        if reset_ptr is not None:
            keep = tl.where(tl.load(reset_ptr + b * reset_B + t * reset_T) != 0, 0.0, 1.0)
            p = tl.where(keep == 0.0, 0.0, p)
        dx0, dx1, dx2, a = derivatives(x0, x1, x2, p, OP, CANDIDATE, NORMALIZED)
        tl.store(d0_ptr + b * d0_B + t * d0_T + d, (g * dx0).to(S), mask=inside)
        tl.store(d1_ptr + b * d1_B + t * d1_T + d, (g * dx1).to(S), mask=inside)
        if OP == "minlstm":
            tl.store(d2_ptr + b * d2_B + t * d2_T + d, (g * dx2).to(S), mask=inside)
        g = tl.where(keep == 0.0, 0.0, a * g)
    tl.store(dh0_ptr + n * D + d, g.to(dh0_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _place(cu_seqlens_ptr, T, D, blocks, BLOCK: tl.constexpr):
    """The sequence n of a program, its batch row b, channels d, and steps from start to stop."""
    program = tl.program_id(0).to(tl.int64)
    n = program // blocks
    d = program % blocks * BLOCK + tl.arange(0, BLOCK)
    b, start, stop = n, T.to(tl.int64) * 0, T.to(tl.int64)
    if cu_seqlens_ptr is not None:
        b = n * 0
        start = tl.load(cu_seqlens_ptr + n).to(tl.int64)
        stop = tl.load(cu_seqlens_ptr + n + 1).to(tl.int64)
    return n, b, d, d < D, start, stop


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
    candidate, normalized = (*options, *("identity", True)[len(options) :])
    return candidate, normalized
