"""The recurrences step by step, for when rows and channels fill a GPU.

A program has a row and a block of channels and goes through time, the state in registers; its
loads run several steps ahead.
"""

import triton
import triton.language as tl

from minrnn.ops.gpu.formulas import coefficients, derivatives


@triton.jit(do_not_specialize=["T"])
def forward(
    x0_ptr, x1_ptr, x2_ptr, h0_ptr, h_ptr, h_T_ptr, reset_ptr, cu_seqlens_ptr,
    T, D, blocks, x0_B, x0_T, x1_B, x1_T, x2_B, x2_T, h_B, h_T, reset_B, reset_T,
    OP: tl.constexpr, CANDIDATE: tl.constexpr, NORMALIZED: tl.constexpr, REVERSE: tl.constexpr,
    BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """h (rows, T, D) and h_T (rows, D)."""
    n, b, d, inside, start, stop = _place(cu_seqlens_ptr, T, D, blocks, BLOCK)
    C: tl.constexpr = h_T_ptr.dtype.element_ty
    h = tl.zeros([BLOCK], C)
    if h0_ptr is not None:
        h = tl.load(h0_ptr + n * D + d, mask=inside, other=0.0).to(C)
    for s in tl.range(0, stop - start, num_stages=STAGES):  # pyright: ignore[reportGeneralTypeIssues]
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
def backward(
    dh_ptr, dh_T_ptr, x0_ptr, x1_ptr, x2_ptr, h0_ptr, h_ptr, d0_ptr, d1_ptr, d2_ptr, dh0_ptr,
    reset_ptr, cu_seqlens_ptr,
    T, D, blocks, x0_B, x0_T, x1_B, x1_T, x2_B, x2_T, dh_B, dh_T, h_B, h_T,
    d0_B, d0_T, d1_B, d1_T, d2_B, d2_T, reset_B, reset_T,
    OP: tl.constexpr, CANDIDATE: tl.constexpr, NORMALIZED: tl.constexpr, REVERSE: tl.constexpr,
    BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The gradients of the gates (rows, T, D), and dh0 (rows, D)."""
    n, b, d, inside, start, stop = _place(cu_seqlens_ptr, T, D, blocks, BLOCK)
    C: tl.constexpr = dh_T_ptr.dtype.element_ty
    S: tl.constexpr = d0_ptr.dtype.element_ty
    # of the loss by the state after step t, then through the step to the one before
    g = tl.load(dh_T_ptr + n * D + d, mask=inside, other=0.0)
    h0 = tl.zeros([BLOCK], C)
    if h0_ptr is not None:
        h0 = tl.load(h0_ptr + n * D + d, mask=inside, other=0.0).to(C)
    for s in tl.range(0, stop - start, num_stages=STAGES):  # pyright: ignore[reportGeneralTypeIssues]
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
    # 32 bits until a stride is met: there is no instruction that divides 64
    program = tl.program_id(0)
    n = (program // blocks).to(tl.int64)
    d = program % blocks * BLOCK + tl.arange(0, BLOCK)
    b, start, stop = n, T.to(tl.int64) * 0, T.to(tl.int64)
    if cu_seqlens_ptr is not None:
        b = n * 0
        start = tl.load(cu_seqlens_ptr + n).to(tl.int64)
        stop = tl.load(cu_seqlens_ptr + n + 1).to(tl.int64)
    return n, b, d, d < D, start, stop
