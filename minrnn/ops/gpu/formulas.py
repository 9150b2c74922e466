"""What scan, mingru and minlstm compute in one step, and its derivatives, on blocks of channels.

The same formulas as in `ops/cpu/formulas.h`, in the same letters; see `docs/equations.md`,
section 10. OP, CANDIDATE and NORMALIZED are known when a kernel is compiled.

GPUs have 2^x and 1/x in float32 to a few units of the last place, not always to the same side: in a
decay near 1 that would be taken to the power of the number of steps. What may matter so is made
good here (`_gate_exponential`, `_share`).
"""

import triton
import triton.language as tl

_LOG2_E, _LN_2 = tl.constexpr(1.4426950408889634), tl.constexpr(0.6931471805599453)
# ln 2 less its float32
_LN_2_REST = tl.constexpr(-1.904654299957768e-09)


@triton.jit
def _exponential(x):
    """exp(-|x|), which never overflows."""
    e = tl.exp(-tl.abs(x))
    if x.dtype == tl.float32:
        # a GPU's own instruction, and nothing around it for numbers below 2^-126
        e = tl.exp2(-tl.abs(x) * _LOG2_E)
    return e


@triton.jit
def _gate_exponential(x):
    """The same with what the rounding of |x| log2(e) loses, |x| / 2 ulp: exp(c) = 1 + c."""
    e = _exponential(x)
    if x.dtype == tl.float32:
        # 0 below; and no difference of infinities
        x = tl.maximum(-tl.abs(x), -104.0, propagate_nan=tl.PropagateNan.ALL)
        y = x * _LOG2_E
        c = tl.fma(y, -_LN_2_REST, tl.fma(y, -_LN_2, x))
        e = tl.exp2(y)
        e = tl.fma(e, c, e)
    return e


@triton.jit
def _reciprocal(x):
    """1 / x for x > 0 not far from 1: a GPU's own root, and a step of Newton's to the last bit."""
    r = 1.0 / x
    if x.dtype == tl.float32:
        r = tl.rsqrt(x)
        r = r * r
        r = tl.fma(tl.fma(-x, r, 1.0), r, r)
    return r


@triton.jit
def _tanh(x):
    """As `hyperbolic_tangent` in vector_math.h: a polynomial where the quotient loses digits."""
    e = _exponential(2.0 * x)
    large = (1.0 - e) / (1.0 + e)
    y = x * x
    p = -929569.0 / 638512875.0
    p = p * y + 21844.0 / 6081075.0
    p = p * y - 1382.0 / 155925.0
    p = p * y + 62.0 / 2835.0
    p = p * y - 17.0 / 315.0
    p = p * y + 2.0 / 15.0
    p = p * y - 1.0 / 3.0
    threshold = 0.1 if x.dtype == tl.float64 else 0.3
    return tl.where(tl.abs(x) < threshold, x + x * y * p, tl.where(x < 0.0, -large, large))


@triton.jit
def _activation(v, CANDIDATE: tl.constexpr):
    """The candidate at v as top / bottom."""
    top, bottom = v, tl.full(v.shape, 1.0, v.dtype)
    if CANDIDATE == "g":
        e = _exponential(v)
        # written so that NaN takes the branch v + 0.5
        top, bottom = tl.where(v < 0.0, e, v + 0.5), tl.where(v < 0.0, 1.0 + e, 1.0)
    if CANDIDATE == "tanh":
        top = _tanh(v)
    return top, bottom


@triton.jit
def _slope(v, value, inverse, CANDIDATE: tl.constexpr):
    """Of the candidate, from v, its value and 1 / bottom; that of g at 0 is its right side's."""
    slope = tl.full(v.shape, 1.0, v.dtype)
    if CANDIDATE == "g":
        slope = tl.where(v < 0.0, value * inverse, 1.0)
    if CANDIDATE == "tanh":
        slope = 1.0 - value * value
    return slope


@triton.jit
def _sigmoid(x):
    """sigmoid(x) = open / sum and sigmoid(-x) = shut / sum, both to full relative precision."""
    e = _gate_exponential(x)
    return tl.where(x < 0.0, e, 1.0), tl.where(x < 0.0, 1.0, e), 1.0 + e


@triton.jit
def _share(keep, lose, scale):
    """keep / (keep + lose) by scale = 1 / (keep + lose), which may be a little off."""
    small = tl.minimum(keep, lose) * scale
    return tl.where(keep > lose, 1.0 - small, small)


@triton.jit
def _raised(f, i, NORMALIZED: tl.constexpr):
    """Both gates raised by the same: normalised, far below 0, only f - i counts, and 0/0 is near.

    The larger is subtracted first: beside it -40 would be rounded away.
    """
    if NORMALIZED:
        larger = tl.maximum(f, i)
        raise_both = larger < -40.0
        f = tl.where(raise_both, (f - larger) - 40.0, f)
        i = tl.where(raise_both, (i - larger) - 40.0, i)
    return f, i


@triton.jit
def coefficients(x0, x1, x2, OP: tl.constexpr, CANDIDATE: tl.constexpr, NORMALIZED: tl.constexpr):
    """a and b of h = a h' + b. Quotients share one division."""
    a, b = x0, x1
    if OP == "mingru":
        z_open, z_shut, z_sum = _sigmoid(x0)
        top, bottom = _activation(x1, CANDIDATE)
        scale = _reciprocal(z_sum * bottom)
        a, b = _share(z_shut, z_open, bottom * scale), z_open * top * scale
    if OP == "minlstm":
        f, i = _raised(x0, x1, NORMALIZED)
        f_open, f_shut, f_sum = _sigmoid(f)
        i_open, _, i_sum = _sigmoid(i)
        keep, take = f_open * i_sum, i_open * f_sum
        total = keep + take if NORMALIZED else f_sum * i_sum
        lose = take if NORMALIZED else f_shut * i_sum
        top, bottom = _activation(x2, CANDIDATE)
        scale = _reciprocal(total * bottom)
        a, b = _share(keep, lose, bottom * scale), take * top * scale
    return a, b


@triton.jit
def derivatives(
    x0, x1, x2, p, OP: tl.constexpr, CANDIDATE: tl.constexpr, NORMALIZED: tl.constexpr
):  # fmt: skip
    """Of the state after a step by each gate, and by the state p before it."""
    dx0, dx1, dx2, a = p, tl.full(p.shape, 1.0, p.dtype), p, x0
    if OP == "mingru":
        k_open, k_shut, k_sum = _sigmoid(x0)
        top, bottom = _activation(x1, CANDIDATE)
        scale = _reciprocal(k_sum * bottom)
        inverse, rest = k_sum * scale, bottom * scale
        value, z, a = top * inverse, k_open * rest, _share(k_shut, k_open, rest)
        dx0, dx1 = (value - p) * z * a, z * _slope(x1, value, inverse, CANDIDATE)
    if OP == "minlstm":
        f, i = _raised(x0, x1, NORMALIZED)
        f_open, f_shut, f_sum = _sigmoid(f)
        i_open, i_shut, i_sum = _sigmoid(i)
        keep, take = f_open * i_sum, i_open * f_sum
        total = keep + take if NORMALIZED else f_sum * i_sum
        top, bottom = _activation(x2, CANDIDATE)
        sums, rest = f_sum * i_sum, total * bottom
        scale = _reciprocal(sums * rest)
        shut_f, shut_i = f_shut * i_sum * rest * scale, i_shut * f_sum * rest * scale
        inverse = sums * total * scale
        value = top * inverse
        part = bottom * sums * scale
        lose = take if NORMALIZED else f_shut * i_sum
        a, take = _share(keep, lose, part), take * part
        dd = (value - p) * a * take
        dx0 = -dd * shut_f if NORMALIZED else p * a * shut_f
        dx1 = dd * shut_i if NORMALIZED else value * take * shut_i
        dx2 = take * _slope(x2, value, inverse, CANDIDATE)
    return dx0, dx1, dx2, a
