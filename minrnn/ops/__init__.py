"""The three recurrences as torch operators: `scan`, `mingru`, `minlstm`.

Axes, here and in every file below: B batch, T time, D channels, N sequences laid end to end in
one row. Letters: k gate before its sigmoid, v candidate, f and i forget and input gate before
theirs, a and b the coefficients of `scan`, h the states, h0 the one before the first step, h_T the
one after the last; a d in front is a gradient.

Each operator is defined once as `minrnn::name` and `minrnn::name_backward`. torch's dispatcher
picks the kernel: pure torch serves every device, a compiled kernel takes over where there is one.
"""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minrnn.ops import torch_kernels
from minrnn.ops.checks import check_gates, check_layout

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
    |a| > 1, products of decays may overflow although no state does.

    Args:
        a: (B, T, D), the decay of each step. float32, float64, bfloat16 or float16; any strides.
        b: (B, T, D), what each step adds; dtype and device of `a`.
        h0: (B, D), floating, the state before the first step. None stands for zeros.
        reset: (B, T) bool. True at t lets step t start from zeros whatever was carried, `h0` too.
        cu_seqlens: (N + 1,) int32 or int64, the bounds 0 <= ... <= T of N sequences laid end to
            end in a batch of one; `h0` and `h_T` then have a row for each, (N, D).
        reverse: run from the last step to the first.

    Returns:
        h: (B, T, D), the state after every step.
        h_T: (B, D), the state after the last step processed, float32 (float64 for float64).

    Raises:
        ValueError: a shape, device or bound does not fit.
        TypeError: an argument is no tensor, or its dtype does not fit.
        NotImplementedError: an argument carries a forward-mode tangent.

    Example:
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
    return torch.ops.minrnn.scan(a, b, h0, reset, cu_seqlens, reverse)


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
            end in a batch of one; `h0` and `h_T` then have a row for each, (N, D).
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
        >>> k = torch.zeros(1, 3, 1)                     # every gate half open
        >>> v = torch.tensor([[[2.0], [4.0], [8.0]]])
        >>> h, h_T = mingru(k, v, candidate="identity")
        >>> h.flatten().tolist()
        [1.0, 2.5, 5.25]
    """
    check_gates({"k": k, "v": v}, candidate)
    check_layout(k, h0, reset, cu_seqlens)
    return torch.ops.minrnn.mingru(k, v, h0, candidate, reset, cu_seqlens, reverse)


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
        >>> f = i = torch.zeros(1, 3, 1)                 # equal gates: f' = i' = 1/2
        >>> v = torch.tensor([[[2.0], [4.0], [8.0]]])
        >>> minlstm(f, i, v, candidate="identity")[0].flatten().tolist()
        [1.0, 2.5, 5.25]
    """
    check_gates({"f": f, "i": i, "v": v}, candidate)
    check_layout(f, h0, reset, cu_seqlens)
    return torch.ops.minrnn.minlstm(f, i, v, h0, candidate, normalized, reset, cu_seqlens, reverse)


# Operators: schema, pure-torch kernel, shapes, gradient. The forward operators share one layout of
# arguments: gates (Tensor ...), h0, options, reset, cu_seqlens, reverse.

_GATES = {"scan": "a b", "mingru": "k v", "minlstm": "f i v"}
_OPTIONS = {"scan": "", "mingru": "str candidate, ", "minlstm": "str candidate, bool normalized, "}
# what the gradient reads besides h0 and h: scan's b only adds
_SAVED = {"scan": "a", "mingru": "k v", "minlstm": "f i v"}
_LAYOUT = "Tensor? reset, Tensor? cu_seqlens, bool reverse"

_library = torch.library.Library("minrnn", "DEF")


def _define(name: str) -> None:
    num_gates, num_saved = len(_GATES[name].split()), len(_SAVED[name].split())
    tensors = ", ".join(f"Tensor {gate}" for gate in _GATES[name].split())
    saved = ", ".join(f"Tensor {gate}" for gate in _SAVED[name].split())
    options = _OPTIONS[name] + _LAYOUT
    grads = ", ".join(["Tensor"] * (num_gates + 1))
    tag = torch.Tag.pt2_compliant_tag
    _library.define(f"{name}({tensors}, Tensor? h0, {options}) -> (Tensor, Tensor)", tags=(tag,))
    _library.define(
        f"{name}_backward(Tensor dh, Tensor dh_T, {saved}, Tensor? h0, Tensor h, {options})"
        f" -> ({grads})",
        tags=(tag,),
    )
    forward = getattr(torch_kernels, name)
    backward = getattr(torch_kernels, f"{name}_backward")
    _library.impl(name, _contiguous(forward), "CompositeExplicitAutograd")
    _library.impl(f"{name}_backward", _contiguous(backward), "CompositeExplicitAutograd")

    def forward_shapes(*args: Any) -> tuple[Tensor, Tensor]:
        gate, h0, cu_seqlens = args[0], args[num_gates], args[-2]
        rows = gate.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        state_dtype = torch.float64 if gate.dtype == torch.float64 else torch.float32
        h = torch.empty_like(gate, memory_format=torch.contiguous_format)
        assert h0 is None or h0.shape[0] == rows
        return h, gate.new_empty(rows, gate.shape[2], dtype=state_dtype)

    def backward_shapes(dh: Tensor, dh_T: Tensor, *args: Any) -> tuple[Tensor, ...]:
        gate, h0 = args[0], args[num_saved]
        grads = [torch.empty_like(gate, memory_format=torch.contiguous_format)] * num_gates
        dtype = dh_T.dtype if h0 is None else h0.dtype
        return *[torch.empty_like(g) for g in grads], torch.empty_like(dh_T, dtype=dtype)

    torch.library.register_fake(f"minrnn::{name}", forward_shapes, lib=_library)
    torch.library.register_fake(f"minrnn::{name}_backward", backward_shapes, lib=_library)
    _register_gradient(name, num_gates, num_saved)
    _register_second_gradient(name, backward)


def _contiguous(kernel: Callable[..., tuple[Tensor, ...]]) -> Callable[..., tuple[Tensor, ...]]:
    """`kernel` with contiguous results, whatever the strides of its inputs: what the fake says."""

    def run(*args: Any) -> tuple[Tensor, ...]:
        if args[0].device.type == "cpu":
            # only reached where the compiled kernels are missing
            warnings.warn("minrnn runs on pure torch: its CPU kernels were not built", stacklevel=1)
        return tuple(x.contiguous() for x in kernel(*args))

    return run


def _register_gradient(name: str, num_gates: int, num_saved: int) -> None:
    """The gradient of `minrnn::name` is one call of `minrnn::name_backward`."""
    backward_op = getattr(torch.ops.minrnn, f"{name}_backward")

    def setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        h0, *options, reset, cu_seqlens, ctx.reverse = inputs[num_gates:]
        ctx.options = options
        ctx.save_for_backward(*inputs[:num_saved], h0, output[0], reset, cu_seqlens)

    def backward(ctx: Any, dh: Tensor, dh_T: Tensor) -> tuple[Tensor | None, ...]:
        *saved, h0, h, reset, cu_seqlens = ctx.saved_tensors
        layout = (reset, cu_seqlens, ctx.reverse)
        *grads, dh0 = backward_op(dh, dh_T, *saved, h0, h, *ctx.options, *layout)
        return *grads, None if h0 is None else dh0, *[None] * (len(ctx.options) + 3)

    torch.library.register_autograd(f"minrnn::{name}", backward, setup_context=setup, lib=_library)


def _register_second_gradient(name: str, formula: Callable[..., tuple[Tensor, ...]]) -> None:
    """The gradient of `minrnn::name_backward` is taken of its formula in pure torch."""

    def setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        floating = [isinstance(x, Tensor) and x.is_floating_point() for x in inputs]
        ctx.floating = floating
        ctx.others = [None if keep else x for x, keep in zip(inputs, floating, strict=True)]
        ctx.save_for_backward(*[x for x, keep in zip(inputs, floating, strict=True) if keep])

    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        again = torch.is_grad_enabled()
        with torch.enable_grad():
            # views, so that differentiation stops at these inputs and not at what they came from
            views = [x.view_as(x) if again else x.detach() for x in ctx.saved_tensors]
            inputs = [x if x.requires_grad else x.requires_grad_() for x in views]
            given = iter(inputs)
            pairs = zip(ctx.others, ctx.floating, strict=True)
            outputs = formula(*[next(given) if keep else x for x, keep in pairs])
            found = torch.autograd.grad(
                outputs, inputs, grads, create_graph=again, allow_unused=True
            )
        left = iter(found)
        return tuple(next(left) if keep else None for keep in ctx.floating)

    torch.library.register_autograd(
        f"minrnn::{name}_backward", backward, setup_context=setup, lib=_library
    )


for _name in _GATES:
    _define(_name)

# the compiled kernels, registered for the CPU by loading them
for _path in Path(__file__).parent.glob("_native.*"):
    torch.ops.load_library(_path)
