"""The three recurrences on tensors: `scan`, `mingru`, `minlstm`.

Axes, here and in every file below: B batch, T time, D channels, N sequences laid end to end in
one row of S steps, E the axis of `torch.func.vmap`. Letters: k gate before its sigmoid, v
candidate, f and i forget and input gate before theirs, a and b the coefficients of `scan`, h the
states, h0 the one before the first step, h_T the one after the last; a d in front is a gradient.

Here they are described and their arguments checked; `operators.py` defines them for torch.
"""

from torch import Tensor

from minrnn.ops import operators as operators  # defines torch.ops.minrnn
from minrnn.ops.checks import check_flag, check_gates, check_layout
from minrnn.ops.transforms import call

__all__ = ["mingru", "minlstm", "scan"]


def scan(
    a: Tensor,
    b: Tensor,
    h0: Tensor | None = None,
    *,
    reset: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    reverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """Run the linear recurrence that all the others are made of.

        h_t = a_t * h_{t-1} + b_t

    Blelloch 1990, section 1.4 (first-order recurrences). The state is kept in float32, in float64
    for float64 inputs; h is rounded to the inputs' dtype, h_T is not. For long memories in half
    precision prefer `mingru` or `minlstm`: a rounded `a` near 1 is a different decay. Where
    |a| > 1, pure torch may meet products of decays that overflow or underflow although no state
    does; the compiled kernels form none there.

    Args:
        a: (B, T, D), the decay of each step. float32, float64, bfloat16 or float16; any strides.
        b: (B, T, D), what each step adds; dtype and device of `a`.
        h0: (B, D), floating, the state before the first step. None stands for zeros.
        reset: (B, T) bool. True at t lets step t start from zeros whatever was carried, `h0` too.
        cu_seqlens: (N + 1,) int32 or int64, the bounds 0 <= ... <= T of N sequences laid end to
            end in a batch of one; `h0` and `h_T` then have a row for each, (N, D). Their values
            are checked on the CPU; on a GPU they are clamped to this, not read back.
        reverse: run from the last step to the first.

    Returns:
        h: (B, T, D), the state after every step.
        h_T: (B, D), the state after the last step processed, float32 (float64 for float64).

    Raises:
        ValueError: a shape, device or bound does not fit.
        TypeError: an argument is no tensor, or its dtype does not fit.
        NotImplementedError: an argument carries a forward-mode tangent.

    Example:
        >>> import torch
        >>> a, b = torch.full((1, 4, 1), 0.5), torch.ones(1, 4, 1)
        >>> h, h_T = scan(a, b)
        >>> h.flatten().tolist()
        [1.0, 1.5, 1.75, 1.875]
        >>> _, half = scan(a[:, :2], b[:, :2])           # the same in two pieces
        >>> torch.equal(scan(a[:, 2:], b[:, 2:], half)[1], h_T)
        True
    """
    check_gates({"a": a, "b": b})
    check_layout(a, h0, reset, cu_seqlens)
    check_flag("reverse", reverse)
    return call("scan", a, b, h0, reset, cu_seqlens, reverse)


def mingru(
    k: Tensor,
    v: Tensor,
    h0: Tensor | None = None,
    *,
    candidate: str = "g",
    reset: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    reverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """Run a minGRU over a sequence, or carry one on from `h0`.

        z_t = sigmoid(k_t)
        h_t = (1 - z_t) * h_{t-1} + z_t * candidate(v_t)

    Feng et al. 2024, arXiv:2410.01201, section 3.1. `k` is the paper's Linear_z(x) before its
    sigmoid, `v` its candidate state before any activation. Arithmetic and state are float32 for
    half-precision input, float64 for float64; 1 - z is computed as sigmoid(-k).

    Args:
        k: (B, T, D), the gate. float32, float64, bfloat16 or float16; any strides.
        v: (B, T, D), the candidate; dtype and device of `k`.
        h0: (B, D), floating, the state before the first step. None stands for zeros.
        candidate: "g", g(v) = v + 0.5 for v >= 0, else sigmoid(v), the paper's log-space cell;
            "identity", its vanilla cell; or "tanh".
        reset: (B, T) bool. True at t lets step t start from zeros whatever was carried, `h0` too.
        cu_seqlens: (N + 1,) int32 or int64, the bounds 0 <= ... <= T of N sequences laid end to
            end in a batch of one; `h0` and `h_T` then have a row for each, (N, D). Their values
            are checked on the CPU; on a GPU they are clamped to this, not read back.
        reverse: run from the last step to the first.

    Returns:
        h: (B, T, D), the state after every step.
        h_T: (B, D), the state after the last step processed, float32 (float64 for float64).
            As `h0` of the next call it goes on where this one stopped.

    Raises:
        ValueError: a shape, device or bound does not fit, or `candidate` is unknown.
        TypeError: an argument is no tensor, or its dtype does not fit.
        NotImplementedError: an argument carries a forward-mode tangent.

    Example:
        >>> import torch
        >>> k = torch.zeros(1, 3, 1)                     # every gate half open
        >>> v = torch.tensor([[[2.0], [4.0], [8.0]]])
        >>> h, h_T = mingru(k, v, candidate="identity")
        >>> h.flatten().tolist()
        [1.0, 2.5, 5.25]
    """
    check_gates({"k": k, "v": v}, candidate)
    check_layout(k, h0, reset, cu_seqlens)
    check_flag("reverse", reverse)
    return call("mingru", k, v, h0, candidate, reset, cu_seqlens, reverse)


def minlstm(
    f: Tensor,
    i: Tensor,
    v: Tensor,
    h0: Tensor | None = None,
    *,
    candidate: str = "g",
    normalized: bool = True,
    reset: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    reverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """Run a minLSTM over a sequence, or carry one on from `h0`.

        f_t = sigmoid(f~_t),  i_t = sigmoid(i~_t)
        f'_t = f_t / (f_t + i_t),  i'_t = i_t / (f_t + i_t)
        h_t = f'_t * h_{t-1} + i'_t * candidate(v_t)

    Feng et al. 2024, arXiv:2410.01201, section 3.2; `f` and `i` are the paper's gates before their
    sigmoid (f~, i~). f' is computed as sigmoid(log sigmoid(f~) - log sigmoid(i~)), which no
    finite pair of gates turns into 0/0. Precision is that of `mingru`.

    Args:
        f: (B, T, D), the forget gate. float32, float64, bfloat16 or float16; any strides.
        i: (B, T, D), the input gate; dtype and device of `f`.
        v: (B, T, D), the candidate; dtype and device of `f`.
        h0: (B, D), floating, the state before the first step. None stands for zeros.
        candidate: "g", "identity" or "tanh", as in `mingru`.
        normalized: divide both gates by their sum. False leaves them as they are: f + i may then
            exceed 1, and h may grow with T.
        reset: (B, T) bool. True at t lets step t start from zeros whatever was carried, `h0` too.
        cu_seqlens: (N + 1,) int32 or int64, as in `mingru`.
        reverse: run from the last step to the first.

    Returns:
        h: (B, T, D), the state after every step.
        h_T: (B, D), the state after the last step processed, float32 (float64 for float64).

    Raises:
        ValueError: a shape, device or bound does not fit, or `candidate` is unknown.
        TypeError: an argument is no tensor, or its dtype does not fit.
        NotImplementedError: an argument carries a forward-mode tangent.

    Example:
        >>> import torch
        >>> f = i = torch.zeros(1, 3, 1)                 # equal gates: f' = i' = 1/2
        >>> v = torch.tensor([[[2.0], [4.0], [8.0]]])
        >>> minlstm(f, i, v, candidate="identity")[0].flatten().tolist()
        [1.0, 2.5, 5.25]
    """
    check_gates({"f": f, "i": i, "v": v}, candidate)
    check_layout(f, h0, reset, cu_seqlens)
    check_flag("normalized", normalized)
    check_flag("reverse", reverse)
    return call("minlstm", f, i, v, h0, candidate, normalized, reset, cu_seqlens, reverse)


def mingru_fused(
    gates: Tensor,
    h0: Tensor | None,
    candidate: str,
    *,
    time_first: bool,
    reset: Tensor | None,
    cu_seqlens: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    """`mingru` over k and v side by side, (B, T, 2 * D), or (T, B, 2 * D) with `time_first`.

    h, `reset` and the gradient have that layout, too: nothing is cut, joined or transposed by a
    copy. For the layers.
    """
    check_gates({"gates": gates}, candidate)
    check_layout(gates, h0, reset, cu_seqlens, fused=2, time_first=time_first)
    return call("mingru_fused", gates, h0, candidate, time_first, reset, cu_seqlens, reverse)


def minlstm_fused(
    gates: Tensor,
    h0: Tensor | None,
    candidate: str,
    normalized: bool,
    *,
    time_first: bool,
    reset: Tensor | None,
    cu_seqlens: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    """`minlstm` over f, i and v side by side, (B, T, 3 * D) or (T, B, 3 * D), as `mingru_fused`."""
    check_gates({"gates": gates}, candidate)
    check_layout(gates, h0, reset, cu_seqlens, fused=3, time_first=time_first)
    return call(
        "minlstm_fused", gates, h0, candidate, normalized, time_first, reset, cu_seqlens, reverse
    )
