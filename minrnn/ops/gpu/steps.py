"""The recurrences step by step, through all of time or through a chunk of it.

A program has a row and a block of channels and goes through time, the state in registers; its
loads run several steps ahead. Where time is in chunks, it begins with the state that the totals of
the chunks before it lead to (`chunks`).
"""

import triton
import triton.language as tl

from minrnn.ops.gpu.formulas import coefficients, derivatives

# chunks whose totals are read at a time
TOGETHER = tl.constexpr(4)


@triton.jit(do_not_specialize=["T", "chunk_steps"])
def forward(
    x0_ptr, x1_ptr, x2_ptr, h0_ptr, h_ptr, h_T_ptr, reset_ptr, cu_seqlens_ptr,
    decays_ptr, rests_ptr, cuts_ptr, rows, T, D, blocks, chunk_steps,
    x0_B, x0_T, x1_B, x1_T, x2_B, x2_T, h_B, h_T, reset_B, reset_T,
    OP: tl.constexpr, CANDIDATE: tl.constexpr, NORMALIZED: tl.constexpr, REVERSE: tl.constexpr,
    BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """h (rows, T, D) and h_T (rows, D)."""
    n, chunk, d = place(rows, blocks, BLOCK)
    b, first, end, begin, steps = _span(cu_seqlens_ptr, n, chunk, T, chunk_steps, REVERSE)
    inside = d < D
    C: tl.constexpr = h_T_ptr.dtype.element_ty
    h = tl.zeros([BLOCK], C)
    if h0_ptr is not None:
        h = tl.load(h0_ptr + n * D + d, mask=inside, other=0.0).to(C)
    if decays_ptr is not None:
        h = _after(h, chunk, n, d, inside, decays_ptr, rests_ptr, cuts_ptr, rows, D)
    for s in tl.range(0, steps, num_stages=STAGES):  # pyright: ignore[reportGeneralTypeIssues]
        t = begin - s if REVERSE else begin + s
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
    if _is_last(first, end, begin, steps, REVERSE):
        tl.store(h_T_ptr + n * D + d, h, mask=inside)


@triton.jit(do_not_specialize=["T", "chunk_steps"])
def backward(
    dh_ptr, dh_T_ptr, x0_ptr, x1_ptr, x2_ptr, h0_ptr, h_ptr, d0_ptr, d1_ptr, d2_ptr, dh0_ptr,
    reset_ptr, cu_seqlens_ptr, decays_ptr, rests_ptr, cuts_ptr, rows, T, D, blocks, chunk_steps,
    x0_B, x0_T, x1_B, x1_T, x2_B, x2_T, dh_B, dh_T, h_B, h_T,
    d0_B, d0_T, d1_B, d1_T, d2_B, d2_T, reset_B, reset_T,
    OP: tl.constexpr, CANDIDATE: tl.constexpr, NORMALIZED: tl.constexpr, REVERSE: tl.constexpr,
    BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The gradients of the gates (rows, T, D), and dh0 (rows, D)."""
    n, chunk, d = place(rows, blocks, BLOCK)
    # from the last step to the first
    BACK: tl.constexpr = not REVERSE  # pyright: ignore[reportAssignmentType]
    b, first, end, begin, steps = _span(cu_seqlens_ptr, n, chunk, T, chunk_steps, BACK)
    inside = d < D
    C: tl.constexpr = dh_T_ptr.dtype.element_ty
    S: tl.constexpr = d0_ptr.dtype.element_ty
    # of the loss by the state after step t, then through the step to the one before
    g = tl.load(dh_T_ptr + n * D + d, mask=inside, other=0.0)
    if decays_ptr is not None:
        g = _after(g, chunk, n, d, inside, decays_ptr, rests_ptr, cuts_ptr, rows, D)
    h0 = tl.zeros([BLOCK], C)
    if h0_ptr is not None:
        h0 = tl.load(h0_ptr + n * D + d, mask=inside, other=0.0).to(C)
    for s in tl.range(0, steps, num_stages=STAGES):  # pyright: ignore[reportGeneralTypeIssues]
        t = begin - s if BACK else begin + s
        has_earlier = t > first if BACK else t < end - 1
        earlier = tl.where(has_earlier, t - 1 if BACK else t + 1, t)
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
    if _is_last(first, end, begin, steps, BACK):
        tl.store(dh0_ptr + n * D + d, g.to(dh0_ptr.dtype.element_ty), mask=inside)


@triton.jit
def place(rows, blocks, BLOCK: tl.constexpr):
    """The row n, chunk and channels d (BLOCK) of a program."""
    # 32 bits until a stride is met: there is no instruction that divides 64
    program = tl.program_id(0)
    n, chunk = program // blocks % rows, program // blocks // rows
    return n.to(tl.int64), chunk.to(tl.int64), program % blocks * BLOCK + tl.arange(0, BLOCK)


@triton.jit
def _span(cu_seqlens_ptr, n, chunk, T, chunk_steps, BACK: tl.constexpr):
    """Of row n: its batch row b, and where it begins and ends in time; of a chunk of it, which is
    all of it where `cu_seqlens` is: the step to begin with, and how many to take.

    Nobody has read the bounds on the host, which would wait for the GPU: clamped, they never lead
    beyond the row, whatever they say.
    """
    b, first, end = n, T.to(tl.int64) * 0, T.to(tl.int64)
    if cu_seqlens_ptr is not None:
        b = n * 0
        first = tl.maximum(tl.minimum(tl.load(cu_seqlens_ptr + n).to(tl.int64), end), 0)
        bound = tl.load(cu_seqlens_ptr + n + 1).to(tl.int64)
        end = tl.maximum(tl.minimum(bound, end), first)
    away = chunk * chunk_steps
    steps = tl.minimum(end - first - away, chunk_steps)
    return b, first, end, end - 1 - away if BACK else first + away, steps


@triton.jit
def _is_last(first, end, begin, steps, BACK: tl.constexpr):
    """Whether a chunk is a row's last, as it is gone through."""
    return begin - steps < first if BACK else begin + steps >= end


@triton.jit
def _after(state, chunks, n, d, inside, decays_ptr, rests_ptr, cuts_ptr, rows, D):
    """The state behind so many chunks."""
    for first in tl.range(0, chunks, TOGETHER, num_stages=3):  # pyright: ignore[reportGeneralTypeIssues]
        for i in tl.static_range(TOGETHER):  # pyright: ignore[reportGeneralTypeIssues]
            # behind the last: nothing, decay 1 and rest 0
            at, here = (first + i) * rows + n, inside & (first + i + 0 * d < chunks)
            decay = tl.load(decays_ptr + at * D + d, mask=here, other=1.0)
            rest = tl.load(rests_ptr + at * D + d, mask=here, other=0.0)
            after = decay * state + rest
            if cuts_ptr is not None:
                # a reset drops what was before it, broken or not
                cut = tl.load(cuts_ptr + tl.minimum(first + i, chunks - 1) * rows + n)
                after = tl.where(here & (cut != 0), rest, after)
            state = after
    return state
