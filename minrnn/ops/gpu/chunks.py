"""The recurrences over chunks of time, for when rows and channels alone cannot fill a GPU.

A program has a row, a block of channels and a chunk of time. It reads its gates once, scans them in
registers, tells the chunks behind it what it does to a state, waits for the state that it begins
with, and applies it: as many bytes as one pass through time, but for one number pair per chunk.

Chunks are taken in the order of a counter, so a program waits only for programs that run already.
A pair is one 64-bit word, whole or not there yet: nothing has to be ordered around it. It is told
by an atomic exchange, as a plain store may stay where other programs do not see it. The states are
put together in one fixed order: the same bits every time. (Merrill and Garland 2016, "Single-pass
parallel prefix scan with decoupled look-back", with groups of chunks in place of their windows.)
"""

import triton
import triton.language as tl

from minrnn.ops.gpu.formulas import coefficients, derivatives

# chunks between two states that are told
GROUP = tl.constexpr(16)
# a word that is not there yet; the decay of a chunk with a reset, a NaN that no arithmetic makes
EMPTY, CUT = tl.constexpr(-1), tl.constexpr(0x7FC00001)
_IDENTITY = tl.constexpr("identity")


@triton.jit
def forward(
    x0_ptr, x1_ptr, x2_ptr, h0_ptr, h_ptr, h_T_ptr, reset_ptr, counter_ptr, totals_ptr, states_ptr,
    rows, T, D, blocks, x0_B, x0_T, x1_B, x1_T, x2_B, x2_T, h_B, h_T, reset_B, reset_T,
    OP: tl.constexpr, CANDIDATE: tl.constexpr, NORMALIZED: tl.constexpr, REVERSE: tl.constexpr,
    STEPS: tl.constexpr, BLOCK: tl.constexpr, IS_AMD: tl.constexpr,
):  # fmt: skip
    """h (rows, T, D) and h_T (rows, D)."""
    b, d, chunk, step, here, inside = _place(counter_ptr, rows, T, D, blocks, STEPS, BLOCK)
    t = T - 1 - step if REVERSE else step
    x0 = tl.load(x0_ptr + b * x0_B + t * x0_T + d, mask=here, other=0.0).to(tl.float32)
    x1 = tl.load(x1_ptr + b * x1_B + t * x1_T + d, mask=here, other=0.0).to(tl.float32)
    x2 = x0
    if OP == "minlstm":
        x2 = tl.load(x2_ptr + b * x2_B + t * x2_T + d, mask=here, other=0.0).to(tl.float32)
    a, add = coefficients(x0, x1, x2, OP, CANDIDATE, NORMALIZED)
    CUTS: tl.constexpr = reset_ptr is not None  # pyright: ignore[reportAssignmentType]
    cut = None
    if CUTS:
        cut = tl.load(reset_ptr + b * reset_B + t * reset_T, mask=step < T, other=0)
        cut = tl.broadcast_to(cut.to(tl.int32), [STEPS, BLOCK])
    # steps behind the end change nothing
    a, add = tl.where(step < T, a, 1.0), tl.where(step < T, add, 0.0)
    a, add, cut = _together(a, add, cut, CUTS)
    first = tl.zeros([1, BLOCK], tl.float32)
    if h0_ptr is not None:
        first = tl.load(h0_ptr + b * D + d, mask=inside, other=0.0).to(tl.float32)
    totals_ptr += b * D + d
    states_ptr += b * D + d
    board = (totals_ptr, states_ptr, rows * D)
    state = _carried(first, a, add, cut, chunk, inside, board, CUTS, STEPS, IS_AMD)
    h = _apply(a, add, cut, state, CUTS)
    tl.store(h_ptr + b * h_B + t * h_T + d, h.to(h_ptr.dtype.element_ty), mask=here)
    tl.store(h_T_ptr + b * D + d + 0 * step, h, mask=here & (step == T - 1))


@triton.jit
def backward(
    dh_ptr, dh_T_ptr, x0_ptr, x1_ptr, x2_ptr, h0_ptr, h_ptr, d0_ptr, d1_ptr, d2_ptr, dh0_ptr,
    reset_ptr, counter_ptr, totals_ptr, states_ptr,
    rows, T, D, blocks, x0_B, x0_T, x1_B, x1_T, x2_B, x2_T, dh_B, dh_T, h_B, h_T,
    d0_B, d0_T, d1_B, d1_T, d2_B, d2_T, reset_B, reset_T,
    OP: tl.constexpr, CANDIDATE: tl.constexpr, NORMALIZED: tl.constexpr, REVERSE: tl.constexpr,
    STEPS: tl.constexpr, BLOCK: tl.constexpr, IS_AMD: tl.constexpr,
):  # fmt: skip
    """The gradients of the gates (rows, T, D), and dh0 (rows, D)."""
    S: tl.constexpr = d0_ptr.dtype.element_ty
    b, d, chunk, step, here, inside = _place(counter_ptr, rows, T, D, blocks, STEPS, BLOCK)
    # from the last step to the first; the steps before and after each, as the forward pass went
    t = step if REVERSE else T - 1 - step
    earlier, later = (t + 1, t - 1) if REVERSE else (t - 1, t + 1)
    is_first, is_last = step == T - 1, step == 0
    x0 = tl.load(x0_ptr + b * x0_B + t * x0_T + d, mask=here, other=0.0).to(tl.float32)
    y0 = tl.load(x0_ptr + b * x0_B + later * x0_T + d, mask=here & (step > 0), other=0.0)
    y0 = y0.to(tl.float32)
    x1, y1, x2 = x0, y0, x0
    if OP != "scan":
        x1 = tl.load(x1_ptr + b * x1_B + t * x1_T + d, mask=here, other=0.0).to(tl.float32)
    if OP == "minlstm":
        x2 = tl.load(x2_ptr + b * x2_B + t * x2_T + d, mask=here, other=0.0).to(tl.float32)
        y1 = tl.load(x1_ptr + b * x1_B + later * x1_T + d, mask=here & (step > 0), other=0.0)
        y1 = y1.to(tl.float32)
    p = tl.load(h_ptr + b * h_B + earlier * h_T + d, mask=here & (step < T - 1), other=0.0)
    p = p.to(tl.float32)
    if h0_ptr is not None:
        h0 = tl.load(h0_ptr + b * D + d, mask=inside, other=0.0).to(tl.float32)
        p = tl.where(is_first, h0, p)
    # g_t = dh_t + a_{t+1} g_{t+1}, whose first state is dh_T
    dh = tl.load(dh_ptr + b * dh_B + t * dh_T + d, mask=here, other=0.0).to(tl.float32)
    a_later, _ = coefficients(y0, y1, y0, OP, _IDENTITY, NORMALIZED)
    a_later = tl.where(is_last, 1.0, a_later)
    keep = tl.full([STEPS, 1], 1, tl.int1)
    CUTS: tl.constexpr = reset_ptr is not None  # pyright: ignore[reportAssignmentType]
    cut = None
    if CUTS:
        reset_ptr += b * reset_B
        cut = tl.load(reset_ptr + later * reset_T, mask=(step > 0) & (step < T), other=0)
        cut = tl.broadcast_to(cut.to(tl.int32), [STEPS, BLOCK])
        keep = tl.load(reset_ptr + t * reset_T, mask=step < T, other=0) == 0
        p = tl.where(keep, p, 0.0)
    a_later, dh = tl.where(step < T, a_later, 1.0), tl.where(step < T, dh, 0.0)
    a_later, dh, cut = _together(a_later, dh, cut, CUTS)
    first = tl.load(dh_T_ptr + b * D + d, mask=inside, other=0.0).to(tl.float32)
    totals_ptr += b * D + d
    states_ptr += b * D + d
    board = (totals_ptr, states_ptr, rows * D)
    state = _carried(first, a_later, dh, cut, chunk, inside, board, CUTS, STEPS, IS_AMD)
    g = _apply(a_later, dh, cut, state, CUTS)
    dx0, dx1, dx2, a = derivatives(x0, x1, x2, p, OP, CANDIDATE, NORMALIZED)
    tl.store(d0_ptr + b * d0_B + t * d0_T + d, (g * dx0).to(S), mask=here)
    tl.store(d1_ptr + b * d1_B + t * d1_T + d, (g * dx1).to(S), mask=here)
    if OP == "minlstm":
        tl.store(d2_ptr + b * d2_B + t * d2_T + d, (g * dx2).to(S), mask=here)
    dh0 = tl.where(keep, a * g, 0.0).to(dh0_ptr.dtype.element_ty)
    tl.store(dh0_ptr + b * D + d + 0 * step, dh0, mask=here & is_first)


@triton.jit
def _place(counter_ptr, rows, T, D, blocks, STEPS: tl.constexpr, BLOCK: tl.constexpr):
    """The row b, channels d (1, BLOCK), chunk and steps (STEPS, 1) of the next program."""
    # in the order in which programs begin, whatever their number
    program = tl.atomic_add(counter_ptr, 1, sem="relaxed")
    # 32 bits until a stride is met: there is no instruction that divides 64
    chunk = (program // (rows * blocks)).to(tl.int64)
    b = (program // blocks % rows).to(tl.int64)
    d = program % blocks * BLOCK + tl.arange(0, BLOCK)[None, :]
    step = chunk * STEPS + tl.arange(0, STEPS)[:, None]
    return b, d, chunk, step, (step < T) & (d < D), d < D


@triton.jit
def _together(a, b, cut, CUTS: tl.constexpr):
    """What each row and all before it do to a state, and whether there is a reset among them."""
    if CUTS:
        a, b, cut = tl.associative_scan((a, b, cut), 0, _join_cut)
    else:
        a, b = tl.associative_scan((a, b), 0, _join)
    return a, b, cut


@triton.jit
def _join(a, b, a_later, b_later):
    """Two spans of steps as one."""
    return a * a_later, a_later * b + b_later


@triton.jit
def _join_cut(a, b, cut, a_later, b_later, cut_later):
    """The same, where a reset drops what was before it, broken or not."""
    return a * a_later, tl.where(cut_later != 0, b_later, a_later * b + b_later), cut | cut_later


@triton.jit
def _apply(a, b, cut, state, CUTS: tl.constexpr):
    """The state behind a span of steps."""
    after = a * state + b
    if CUTS:
        after = tl.where(cut != 0, b, after)
    return after


@triton.jit
def _carried(
    first, a, b, cut, chunk, inside, board,
    CUTS: tl.constexpr, STEPS: tl.constexpr, IS_AMD: tl.constexpr,
):  # fmt: skip
    """The state that a chunk begins with; what it does itself is told first."""
    totals_ptr, states_ptr, stride = board
    a_all, b_all, cut_all = _last(a, STEPS), _last(b, STEPS), None
    # first what needs no state: from group to group the way is then one word, not a whole group
    a_before, b_before = tl.full(first.shape, 1.0, tl.float32), tl.zeros_like(first)
    cut_before = None
    if CUTS:
        cut_all, cut_before = _last(cut, STEPS), tl.zeros(first.shape, tl.int32)
    _tell(totals_ptr + chunk * stride, a_all, b_all, cut_all, inside, CUTS)
    begin = chunk // GROUP * GROUP
    for earlier in range(begin, chunk):
        a_next, b_next, cut_next = _wait(totals_ptr + earlier * stride, inside, IS_AMD)
        if CUTS:
            a_before, b_before, cut_before = _join_cut(
                a_before, b_before, cut_before, a_next, b_next, cut_next
            )
        else:
            a_before, b_before = _join(a_before, b_before, a_next, b_next)
    state = first
    if begin > 0:
        _, state, _ = _wait(states_ptr + (begin // GROUP - 1) * stride, inside, IS_AMD)
    state = _apply(a_before, b_before, cut_before, state, CUTS)
    if chunk % GROUP == GROUP - 1:
        after = _apply(a_all, b_all, cut_all, state, CUTS)
        _tell(states_ptr + chunk // GROUP * stride, a_all, after, cut_all, inside, CUTS)
    return state


@triton.jit
def _last(x, STEPS: tl.constexpr):
    """The last row, (1, BLOCK)."""
    is_last = tl.arange(0, STEPS)[:, None] == STEPS - 1
    return tl.sum(tl.where(is_last, x, 0), axis=0, keep_dims=True)


@triton.jit
def _tell(words_ptr, a, b, cut, inside, CUTS: tl.constexpr):
    """Let other programs have two float32, as one word that is never EMPTY."""
    # NaN of any kind becomes one of them
    a = tl.where(a == a, a, float("nan")).to(tl.int32, bitcast=True)
    b = tl.where(b == b, b, float("nan")).to(tl.int32, bitcast=True).to(tl.int64)
    if CUTS:
        a = tl.where(cut != 0, CUT, a)
    word = (a.to(tl.int64) << 32) | (b & 0xFFFFFFFF)
    tl.atomic_xchg(words_ptr, word, mask=inside, sem="relaxed")


@triton.jit
def _wait(words_ptr, inside, IS_AMD: tl.constexpr):
    """What other programs told, as soon as all is there: a, b, and whether there is a reset."""
    words = _look(words_ptr, inside, IS_AMD)
    while tl.max(tl.max((words == EMPTY).to(tl.int32), axis=1), axis=0) > 0:  # pyright: ignore[reportOperatorIssue]
        words = _look(words_ptr, inside, IS_AMD)
    a = (words >> 32).to(tl.int32)
    cut = (a == CUT).to(tl.int32)
    return a.to(tl.float32, bitcast=True), words.to(tl.int32).to(tl.float32, bitcast=True), cut


@triton.jit
def _look(words_ptr, inside, IS_AMD: tl.constexpr):
    """The words as they are by now."""
    if IS_AMD:
        # Triton's loads from buffers are never volatile there: one would be taken out of the loop
        words = tl.atomic_add(words_ptr, 0, mask=inside, sem="relaxed")
        return tl.where(inside, words, 0)
    return tl.load(words_ptr, mask=inside, other=0, volatile=True)
