"""What scan, mingru and minlstm compute in one step, and its derivatives, on blocks of channels.

The same formulas as in `ops/cpu/formulas.h`, in the same letters; see `docs/equations.md`,
section 10. OP, CANDIDATE and NORMALIZED are known when a kernel is compiled.
"""

import triton
import triton.language as tl


@triton.jit
def _exponential(x):
    """exp(-|x|), which never overflows."""
    return tl.exp(-tl.abs(x))


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
    e = _exponential(x)
    return tl.where(x < 0.0, e, 1.0), tl.where(x < 0.0, 1.0, e), 1.0 + e


@triton.jit
def _lift(f, i, NORMALIZED: tl.constexpr):
    """What raises both gates: normalised, far below 0, only f - i counts, and 0/0 is near."""
    larger = tl.maximum(f, i)
    lift = tl.zeros_like(f)
    if NORMALIZED:
        lift = tl.where(larger < -40.0, -40.0 - larger, 0.0)
    return lift


@triton.jit
def coefficients(x0, x1, x2, OP: tl.constexpr, CANDIDATE: tl.constexpr, NORMALIZED: tl.constexpr):
    """a and b of h = a h' + b. Quotients share one division."""
    a, b = x0, x1
    if OP == "mingru":
        z_open, z_shut, z_sum = _sigmoid(x0)
        top, bottom = _activation(x1, CANDIDATE)
        scale = 1.0 / (z_sum * bottom)
        a, b = z_shut * bottom * scale, z_open * top * scale
    if OP == "minlstm":
        lift = _lift(x0, x1, NORMALIZED)
        f_open, _, f_sum = _sigmoid(x0 + lift)
        i_open, _, i_sum = _sigmoid(x1 + lift)
        keep, take = f_open * i_sum, i_open * f_sum
        total = keep + take if NORMALIZED else f_sum * i_sum
        top, bottom = _activation(x2, CANDIDATE)
        scale = 1.0 / (total * bottom)
        a, b = keep * bottom * scale, take * top * scale
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
        scale = 1.0 / (k_sum * bottom)
        inverse = k_sum * scale
        value, z = top * inverse, k_open * bottom * scale
        a = k_shut * bottom * scale
        dx0, dx1 = (value - p) * z * a, z * _slope(x1, value, inverse, CANDIDATE)
    if OP == "minlstm":
        lift = _lift(x0, x1, NORMALIZED)
        f_open, f_shut, f_sum = _sigmoid(x0 + lift)
        i_open, i_shut, i_sum = _sigmoid(x1 + lift)
        keep, take = f_open * i_sum, i_open * f_sum
        total = keep + take if NORMALIZED else f_sum * i_sum
        top, bottom = _activation(x2, CANDIDATE)
        sums, rest = f_sum * i_sum, total * bottom
        scale = 1.0 / (sums * rest)
        shut_f, shut_i = f_shut * i_sum * rest * scale, i_shut * f_sum * rest * scale
        inverse = sums * total * scale
        value = top * inverse
        a, take = keep * bottom * sums * scale, take * bottom * sums * scale
        dd = (value - p) * a * take
        dx0 = -dd * shut_f if NORMALIZED else p * a * shut_f
        dx1 = dd * shut_i if NORMALIZED else value * take * shut_i
        dx2 = take * _slope(x2, value, inverse, CANDIDATE)
    return dx0, dx1, dx2, a
