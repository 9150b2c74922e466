"""What chunks of time do to a state, for when rows and channels alone cannot fill a GPU.

A chunk takes the state before it to decay * state + rest. One kernel here goes through the chunks
of all rows and channels side by side and writes these two for each; then those in `steps` begin
each chunk with the state that the chunks before it lead to. Gates are read twice, nobody waits for
anybody, and states are put together in one order: the same bits every time. (Merrill and Garland
2016, section 2, call it reduce-then-scan. Their single pass, which reads once, was measured to be
slower here: docs/results.md.)
"""

import triton
import triton.language as tl

from minrnn.ops.gpu.formulas import coefficients
from minrnn.ops.gpu.steps import place

_IDENTITY = tl.constexpr("identity")


@triton.jit(do_not_specialize=["T", "chunk_steps"])
def totals(
    x0_ptr, x1_ptr, x2_ptr, dh_ptr, reset_ptr, decays_ptr, rests_ptr, cuts_ptr,
    rows, T, D, blocks, chunk_steps,
    x0_B, x0_T, x1_B, x1_T, x2_B, x2_T, dh_B, dh_T, reset_B, reset_T,
    OP: tl.constexpr, CANDIDATE: tl.constexpr, NORMALIZED: tl.constexpr, REVERSE: tl.constexpr,
    BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The decay and the rest of each chunk (chunks, rows, D), and whether it has a reset.

    With `dh` they are those of the gradient: s = a (dh + s'), from the last step to the first.
    """
    C: tl.constexpr = decays_ptr.dtype.element_ty
    n, chunk, d = place(rows, blocks, BLOCK)
    inside = d < D
    begin = chunk * chunk_steps
    decay, rest, cut = tl.full([BLOCK], 1.0, C), tl.zeros([BLOCK], C), 0
    BACKWARD: tl.constexpr = dh_ptr is not None  # pyright: ignore[reportAssignmentType]
    for s in tl.range(begin, tl.minimum(begin + chunk_steps, T), num_stages=STAGES):  # pyright: ignore[reportGeneralTypeIssues]
        t = T - 1 - s if REVERSE != BACKWARD else s
        x0 = tl.load(x0_ptr + n * x0_B + t * x0_T + d, mask=inside, other=0.0).to(C)
        x1, x2, dh = x0, x0, x0
        if OP == "minlstm" or not BACKWARD:
            x1 = tl.load(x1_ptr + n * x1_B + t * x1_T + d, mask=inside, other=0.0).to(C)
        if OP == "minlstm" and not BACKWARD:
            x2 = tl.load(x2_ptr + n * x2_B + t * x2_T + d, mask=inside, other=0.0).to(C)
        if BACKWARD:
            dh = tl.load(dh_ptr + n * dh_B + t * dh_T + d, mask=inside, other=0.0).to(C)
            a, add = coefficients(x0, x1, x2, OP, _IDENTITY, NORMALIZED)
        else:
            a, add = coefficients(x0, x1, x2, OP, CANDIDATE, NORMALIZED)
        if BACKWARD:
            rest = a * (dh + rest)
        if reset_ptr is not None:
            reset = tl.load(reset_ptr + n * reset_B + t * reset_T) != 0
            cut = cut | reset.to(tl.int32)
            rest = tl.where(reset, 0.0, rest)
        if not BACKWARD:
            rest = a * rest + add
        decay = decay * a
    at = chunk * rows + n
    tl.store(decays_ptr + at * D + d, decay, mask=inside)
    tl.store(rests_ptr + at * D + d, rest, mask=inside)
    if reset_ptr is not None:
        tl.store(cuts_ptr + at, cut)
