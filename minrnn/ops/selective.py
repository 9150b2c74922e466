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
        ValueError: a shape does not fit the others'.
        TypeError: the dtypes are not all float32 or all float64.

    Example:
        >>> x, A = torch.rand(2, 7, 3), -torch.rand(3, 4)
        >>> B, C, h0 = torch.randn(2, 7, 4), torch.randn(2, 7, 4), torch.zeros(2, 12)
        >>> y, h_T = selective_scan(x, x, A, B, C, h0)
        >>> y.shape, h_T.shape
        (torch.Size([2, 7, 3]), torch.Size([2, 12]))
    """
    _check(u, dt, A, B, C, h0)
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


def _forward(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, h0: Tensor, zoh: bool
) -> tuple[Tensor, Tensor]:
    # results are allocated first and written to: small blocks that stay, allocated between large
    # ones that go, would leave the allocator with holes too small for the next large one
    y, h = torch.empty_like(u), h0
    length = _piece_length(h0)
    for cut, y_piece in zip(_cut((u, dt, B, C), length), y.split(length, dim=1), strict=True):
        found, h = _piece(cut, A, h, zoh)
        y_piece.copy_(found)
    return y, h.clone() if h is h0 else h


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
    steps, dh = (u, dt, B, C), dh_T
    if torch.is_grad_enabled():
        # for second derivatives, all steps are one piece with a graph
        du, ddt, dB, dC, dA, dh = _gradients((*steps, A, h0), dy, dh, zoh, create_graph=True)
        return du, ddt, dA, dB, dC, dh
    length = _piece_length(h0)
    cuts, states = list(_cut(steps, length)), [h0]
    for cut in cuts[:-1]:
        states.append(_piece(cut, A, states[-1], zoh)[1])
    grads, dA = [torch.empty_like(x) for x in steps], torch.zeros_like(A)
    rows = zip(cuts, _cut((*grads, dy), length), states, strict=True)
    for cut, (*to, dy_piece), state in reversed(list(rows)):
        leaves = [x.detach().requires_grad_() for x in (*cut, A, state)]
        *found, dA_piece, dh = _gradients(leaves, dy_piece, dh, zoh)
        for piece, grad in zip(to, found, strict=True):
            piece.copy_(grad)
        dA += dA_piece
    du, ddt, dB, dC = grads
    return du, ddt, dA, dB, dC, dh.clone() if dh is dh_T else dh


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
    inputs: Sequence[Tensor], dy: Tensor, dh: Tensor, zoh: bool, create_graph: bool = False
) -> tuple[Tensor, ...]:
    """Of u, dt, B, C, A and the first state of a piece."""
    with torch.enable_grad():
        views = [x.view_as(x) if x.requires_grad else x.detach() for x in inputs]
        leaves = [x if x.requires_grad else x.requires_grad_() for x in views]
        outputs = _piece(leaves[:4], leaves[4], leaves[5], zoh)
        return torch.autograd.grad(
            outputs, leaves, (dy, dh), create_graph=create_graph, materialize_grads=True
        )


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

    def shapes(u: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
        return torch.empty_like(u), torch.empty_like(others[4])

    def gradient_shapes(dy: Tensor, dh_T: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(x) for x in inputs[:6])

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
