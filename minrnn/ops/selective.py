"""The selective state space of Mamba as an operator: `torch.ops.minrnn.selective_scan`.

Pure torch serves every device, piece by piece of time; a compiled kernel takes over on the CPU.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from minrnn.ops.operators import register_second_gradient

Discretization = Literal["euler", "zoh"]
# numbers of the state that pure torch works on at a time: they stay in the cache
_PIECE = 1 << 20
_INPUTS = "Tensor u, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor h0, bool zoh"
_library = torch.library.Library("minrnn", "FRAGMENT")


def selective_scan(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    h0: Tensor,
    discretization: Discretization = "euler",
) -> tuple[Tensor, Tensor]:
    """Run the selective state space for each channel d and state n.

        h_t[d, n] = exp(dt_t[d] A[d, n]) h_{t-1}[d, n] + w_t[d, n] B_t[n] u_t[d]
        y_t[d] = sum_n C_t[n] h_t[d, n]
        w_t = dt_t, or (exp(dt_t A) - 1) / A with "zoh"

    Gu and Dao 2023, arXiv:2312.00752, section 3; their code has w_t = dt_t. The states of all steps
    are never in memory at once: the gradient computes them again.

    Args:
        u: (B, T, D), the input; float32 or float64, as all others.
        dt: (B, T, D), positive.
        A: (D, N), negative.
        B, C: (B, T, N).
        h0: (B, D * N), the state before the first step.
        discretization: what w_t is.

    Returns:
        y (B, T, D) and h_T (B, D * N).

    Raises:
        ValueError: a shape does not fit the others', or `discretization` is unknown.
        TypeError: the dtypes are not all float32 or all float64.

    Example:
        >>> x, A = torch.rand(2, 7, 3), -torch.rand(3, 4)
        >>> B, C, h0 = torch.randn(2, 7, 4), torch.randn(2, 7, 4), torch.zeros(2, 12)
        >>> y, h_T = selective_scan(x, x, A, B, C, h0)
        >>> y.shape, h_T.shape
        (torch.Size([2, 7, 3]), torch.Size([2, 12]))
    """
    _check(u, dt, A, B, C, h0)
    if discretization not in ("euler", "zoh"):
        raise ValueError(f"`discretization` must be 'euler' or 'zoh', got {discretization!r}")
    inputs = (x.contiguous() for x in (u, dt, A, B, C, h0))
    return torch.ops.minrnn.selective_scan(*inputs, discretization == "zoh")


def _check(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, h0: Tensor) -> None:
    if u.dim() != 3 or A.dim() != 2:
        raise ValueError(
            f"`u` must have shape (B, T, D) and `A` (D, N), got {tuple(u.shape)}, {tuple(A.shape)}"
        )
    (batch, T, D), N = u.shape, A.shape[1]
    rows = (("dt", dt, (batch, T, D)), ("A", A, (D, N)), ("h0", h0, (batch, D * N)))
    for name, x, shape in (*rows, ("B", B, (batch, T, N)), ("C", C, (batch, T, N))):
        if tuple(x.shape) != shape:
            raise ValueError(f"`{name}` must have shape {shape}, got {tuple(x.shape)}")
        if x.dtype != u.dtype or u.dtype not in (torch.float32, torch.float64):
            raise TypeError(
                f"`u` and `{name}` must both be float32 or float64, got {u.dtype}, {x.dtype}"
            )


def _check_gradient(dy: Tensor, dh_T: Tensor, u: Tensor, *others: Tensor) -> None:
    _check(u, *others)
    for name, x, like in (("dy", dy, u), ("dh_T", dh_T, others[-1])):
        if x.shape != like.shape or x.dtype != u.dtype:
            raise ValueError(
                f"`{name}` must have shape {tuple(like.shape)} and dtype {u.dtype}, got "
                f"{tuple(x.shape)}, {x.dtype}"
            )


def _forward(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, h0: Tensor, zoh: bool
) -> tuple[Tensor, Tensor]:
    # results are allocated first and written to: small blocks that stay, allocated between large
    # ones that go, would leave the allocator with holes too small for the next large one
    _check(u, dt, A, B, C, h0)
    y, h = torch.empty_like(u, memory_format=torch.contiguous_format), h0
    length = _piece_length(h0)
    for cut, y_piece in zip(_cut((u, dt, B, C), length), y.split(length, dim=1), strict=True):
        found, h = _piece(cut, A, h, zoh)
        y_piece.copy_(found)
    return y, h.clone(memory_format=torch.contiguous_format) if h is h0 else h


def _backward(
    dy: Tensor,
    dh_T: Tensor,
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    h0: Tensor,
    zoh: bool,
) -> tuple[Tensor, ...]:
    _check_gradient(dy, dh_T, u, dt, A, B, C, h0)
    steps, dh = (u, dt, B, C), dh_T
    if torch.is_grad_enabled():
        # for second derivatives, all steps are one piece with a graph
        du, ddt, dB, dC, dA, dh = _gradients(steps, A, h0, dy, dh, zoh)
        return du, ddt, dA, dB, dC, dh
    length = _piece_length(h0)
    cuts, states = list(_cut(steps, length)), [h0]
    for cut in cuts[:-1]:
        states.append(_piece(cut, A, states[-1], zoh)[1])
    grads = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in steps]
    dA = A.new_zeros(A.shape)
    rows = zip(cuts, _cut((*grads, dy), length), states, strict=True)
    for cut, (*to, dy_piece), state in reversed(list(rows)):
        *found, dA_piece, dh = _gradients(cut, A, state, dy_piece, dh, zoh)
        for piece, grad in zip(to, found, strict=True):
            piece.copy_(grad)
        dA += dA_piece
    du, ddt, dB, dC = grads
    dh = dh.clone(memory_format=torch.contiguous_format) if dh is dh_T else dh
    return du, ddt, dA, dB, dC, dh


def _piece(steps: Sequence[Tensor], A: Tensor, h: Tensor, zoh: bool) -> tuple[Tensor, Tensor]:
    """y and the last state of some steps (u, dt, B, C), all their states at once."""
    u, dt, B, C = steps
    # (B, T, D, N)
    exponent = dt[..., None] * A
    step = torch.expm1(exponent) / A if zoh else dt[..., None]
    b = (step * u[..., None]) * B[:, :, None]
    a, options = exponent.exp().flatten(2), (None, None, False)
    h, h_T = torch.ops.minrnn.scan(a, b.flatten(2), h, *options)
    return (h.unflatten(2, A.shape) @ C[..., None])[..., 0], h_T


def _gradients(
    steps: Sequence[Tensor], A: Tensor, h0: Tensor, dy: Tensor, dh_T: Tensor, zoh: bool
) -> tuple[Tensor, ...]:
    """Of u, dt, B, C, A and the first state of a piece.

    Written out: below the dispatcher nothing is recorded that autograd could go back through.
    """
    u, dt, B, C = steps
    # (B, T, D, N)
    exponent = dt[..., None] * A
    decay = exponent.exp()
    size = torch.expm1(exponent) / A if zoh else dt[..., None]
    added = u[..., None] * B[:, :, None]
    a, options = decay.flatten(2), (None, None, False)
    h, _ = torch.ops.minrnn.scan(a, (size * added).flatten(2), h0, *options)
    dh = (dy[..., None] * C[:, :, None]).flatten(2)
    found = torch.ops.minrnn.scan_backward(dh, dh_T, a, h0, h, *options)
    da, db, h = (x.unflatten(2, A.shape) for x in (*found[:2], h))
    by_exponent, by_size, by_added = da * decay, db * added, db * size
    dA = (by_exponent * dt[..., None]).sum((0, 1))
    if zoh:
        # size = expm1(x) / A: by x it is exp(x) / A, by A itself -size / A
        by_exponent = by_exponent + by_size * decay / A
        dA = (by_exponent * dt[..., None] - by_size * size / A).sum((0, 1))
    ddt = (by_exponent * A).sum(3) if zoh else (by_exponent * A + by_size).sum(3)
    du, dB = (by_added * B[:, :, None]).sum(3), (by_added * u[..., None]).sum(2)
    dC = (dy[..., None] * h).sum(2)
    return du, ddt, dB, dC, dA, found[2]


def _piece_length(h: Tensor) -> int:
    return max(1, _PIECE // max(1, h.numel()))


def _cut(tensors: Sequence[Tensor], length: int) -> Iterator[tuple[Tensor, ...]]:
    """Pieces of so many steps, of all tensors (B, T, ...) side by side."""
    return zip(*(x.split(length, dim=1) for x in tensors), strict=True)


def _define() -> None:
    tags = (torch.Tag.pt2_compliant_tag,)
    grads = ", ".join(["Tensor"] * 6)
    _library.define(f"selective_scan({_INPUTS}) -> (Tensor, Tensor)", tags=tags)
    _library.define(
        f"selective_scan_backward(Tensor dy, Tensor dh_T, {_INPUTS}) -> ({grads})", tags=tags
    )
    _library.impl("selective_scan", _forward, "CompositeExplicitAutograd")
    _library.impl("selective_scan_backward", _backward, "CompositeExplicitAutograd")

    def shapes(*inputs: Any) -> tuple[Tensor, Tensor]:
        _check(*inputs[:6])
        u, h0 = inputs[0], inputs[5]
        return u.new_empty(u.shape), h0.new_empty(h0.shape)

    def gradient_shapes(dy: Tensor, dh_T: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
        _check_gradient(dy, dh_T, *inputs[:6])
        return tuple(x.new_empty(x.shape) for x in inputs[:6])

    def setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        *tensors, ctx.zoh = inputs
        ctx.save_for_backward(*tensors)

    def backward(ctx: Any, dy: Tensor, dh_T: Tensor) -> tuple[Tensor | None, ...]:
        grads = (x.contiguous() for x in (dy, dh_T))
        op = torch.ops.minrnn.selective_scan_backward
        return *op(*grads, *ctx.saved_tensors, ctx.zoh), None

    torch.library.register_fake("minrnn::selective_scan", shapes, lib=_library)
    torch.library.register_fake("minrnn::selective_scan_backward", gradient_shapes, lib=_library)
    torch.library.register_autograd(
        "minrnn::selective_scan", backward, setup_context=setup, lib=_library
    )
    register_second_gradient("selective_scan_backward", _backward)


_define()
