"""S6, the selective state space of Mamba, and the Mamba block around it."""

import math
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from minrnn.mixers.contract import DepthwiseConv, Mixer, state_dtype
from minrnn.ops import scan
from minrnn.state import State

Discretization = Literal["euler", "zoh"]
# of softplus(bias) at the start, log-uniform
_STEP_SIZES = (1e-3, 1e-1)
# numbers of the state that are worked on at a time: they stay in the cache
_PIECE = 1 << 20


def selective_scan(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    h0: Tensor,
    discretization: Discretization = "euler",
) -> tuple[Tensor, Tensor]:
    """The selective state space for each channel d and state n.

        h_t[d, n] = exp(dt_t[d] A[d, n]) h_{t-1}[d, n] + w_t[d, n] B_t[n] u_t[d]
        y_t[d] = sum_n C_t[n] h_t[d, n]
        w_t = dt_t, or (exp(dt_t A) - 1) / A with "zoh"

    Gu and Dao 2023, arXiv:2312.00752, section 3; their code has w_t = dt_t. Works through time in
    pieces; the gradient computes each once more, so that memory is for one piece and u, dt, B, C.

    Args:
        u: (B, T, D), the input.
        dt: (B, T, D), positive.
        A: (D, N), negative.
        B, C: (B, T, N).
        h0: (B, D * N), the state before the first step.
        discretization: what w_t is.

    Returns:
        y (B, T, D) and h_T (B, D * N).
    """
    return _InPieces.apply(u, dt, B, C, A, h0, discretization)


def _piece(
    steps: Sequence[Tensor], A: Tensor, h: Tensor, discretization: Discretization
) -> tuple[Tensor, Tensor]:
    """y and the last state of some steps (u, dt, B, C), all their states at once."""
    u, dt, B, C = steps
    # (B, T, D) and (D, N) to (B, T, D, N)
    exponent = dt[..., None] * A
    step = dt[..., None] if discretization == "euler" else torch.expm1(exponent) / A
    b = (step * u[..., None]) * B[:, :, None]
    h, h_T = scan(exponent.exp().flatten(2), b.flatten(2), h)
    return (h.unflatten(2, A.shape) @ C[..., None])[..., 0], h_T


class _InPieces(torch.autograd.Function):
    """`_piece` after `_piece`, each computed again for its gradient.

    What stays is allocated first and written to: small blocks that stay, allocated between large
    ones that go, would leave the allocator with holes too small for the next large one.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        *steps, A, h, ctx.discretization = inputs
        ctx.length = max(1, _PIECE // max(1, h.numel()))
        y = torch.empty_like(steps[0])
        cuts = list(_cut(steps, ctx.length))
        states = h.new_empty(len(cuts), *h.shape)
        for number, (cut, y_piece) in enumerate(zip(cuts, y.split(ctx.length, dim=1), strict=True)):
            states[number] = h
            found, h = _piece(cut, A, h, ctx.discretization)
            y_piece.copy_(found)
        ctx.save_for_backward(*steps, A, inputs[5], states)
        return y, h

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        dy, dh = grad_outputs
        *steps, A, h0, states = ctx.saved_tensors
        if torch.is_grad_enabled():
            # for second derivatives, all steps are one piece with a graph
            inputs = [x.view_as(x) for x in (*steps, A, h0)]
            leaves = [x if x.requires_grad else x.requires_grad_() for x in inputs]
            found = _gradients(leaves, dy, dh, ctx.discretization, create_graph=True)
            return *found, None
        grads = [torch.empty_like(x) for x in steps]
        dA = torch.zeros_like(A)
        cuts = zip(*(_cut((*x, dy), ctx.length) for x in (steps, grads)), states, strict=True)
        for (*cut, dy_piece), (*to, _), state in reversed(list(cuts)):
            leaves = [x.detach().requires_grad_() for x in (*cut, A, state)]
            *found, dA_piece, dh = _gradients(leaves, dy_piece, dh, ctx.discretization)
            for piece, grad in zip(to, found, strict=True):
                piece.copy_(grad)
            dA += dA_piece
        return *grads, dA, dh, None


def _cut(tensors: Sequence[Tensor], length: int) -> Iterator[tuple[Tensor, ...]]:
    """Pieces of so many steps, of all tensors (B, T, ...) side by side."""
    return zip(*(x.split(length, dim=1) for x in tensors), strict=True)


def _gradients(
    leaves: Sequence[Tensor],
    dy: Tensor,
    dh: Tensor,
    discretization: Discretization,
    create_graph: bool = False,
) -> tuple[Tensor, ...]:
    """Of u, dt, B, C, A and the first state of a piece."""
    with torch.enable_grad():
        outputs = _piece(leaves[:4], leaves[4], leaves[5], discretization)
        return torch.autograd.grad(
            outputs, leaves, (dy, dh), create_graph=create_graph, materialize_grads=True
        )


class S6(Mixer):
    """A selective state space of each channel, whose step size, B and C come from the input.

        dt, B, C = split(W x);  dt = softplus(W' dt + bias)
        y = selective_scan(x, dt, A, B, C) + D x

    Gu and Dao 2023, arXiv:2312.00752, algorithm 2; A = -exp(A_log), at the start -1 .. -N.

    Args:
        width: channels of x and y.
        state_size: N, numbers of state for each of them.
        rank: of the map that makes dt; 0 for width / 16, rounded up.
        discretization: of B, as in `selective_scan`.
    """

    def __init__(
        self,
        width: int,
        state_size: int,
        rank: int = 0,
        discretization: Discretization = "euler",
    ) -> None:
        super().__init__()
        self.discretization: Discretization = discretization
        self.rank = rank or math.ceil(width / 16)
        self.x_proj = nn.Linear(width, self.rank + 2 * state_size, bias=False)
        self.dt_proj = nn.Linear(self.rank, width)
        A = torch.arange(1, state_size + 1, dtype=torch.float32).log()
        self.A_log = nn.Parameter(A.repeat(width, 1))
        self.D = nn.Parameter(torch.ones(width))
        low, high = map(math.log, _STEP_SIZES)
        dt = torch.empty(width).uniform_(low, high).exp()
        with torch.no_grad():
            nn.init.uniform_(self.dt_proj.weight, -(self.rank**-0.5), self.rank**-0.5)
            # the inverse of softplus
            self.dt_proj.bias.copy_(dt + torch.log(-torch.expm1(-dt)))

    def init_state(self, batch_size: int) -> State:
        """The state before the first step: zeros, (batch_size, width * state_size)."""
        dtype = state_dtype(self.A_log)
        return State({"h": self.A_log.new_zeros(batch_size, self.A_log.numel(), dtype=dtype)})

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Mix x (B, T, width); the state is {"h": (B, width * state_size)}."""
        h0 = (self.init_state(x.shape[0]) if state is None else state).tensor("h")
        N = self.A_log.shape[1]
        low_rank, B, C = self.x_proj(x).split([self.rank, N, N], dim=2)
        dt = F.softplus(self.dt_proj(low_rank).to(h0.dtype))
        A = -self.A_log.to(h0.dtype).exp()
        u, B, C = (part.to(h0.dtype) for part in (x, B, C))
        y, h_T = selective_scan(u, dt, A, B, C, h0, self.discretization)
        return (y + self.D * u).to(x.dtype), State({"h": h_T})


class Mamba(Mixer):
    """The Mamba block: a convolution and an inner layer, gated by a second branch.

        u, g = split(W x);  u = silu(conv(u))
        y = W' (inner(u) * silu(g))

    Gu and Dao 2023, arXiv:2312.00752, figure 3.

    Args:
        width: features of x and y.
        expansion: channels of the inner layer for each of them.
        inner: maps width * expansion channels to as many, e.g. an `S6`.
    """

    def __init__(self, width: int, expansion: int, inner: Mixer) -> None:
        super().__init__()
        self.in_proj = nn.Linear(width, 2 * width * expansion, bias=False)
        self.conv = DepthwiseConv(width * expansion, conv_width=4)
        self.inner = inner
        self.out_proj = nn.Linear(width * expansion, width, bias=False)

    def init_state(self, batch_size: int) -> State:
        """The state before the first step."""
        conv = self.conv.init_state(batch_size)
        return State({"conv": conv, "inner": self.inner.init_state(batch_size)})

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Mix x (B, T, width); the state is {"conv", "inner"}."""
        u, gate = self.in_proj(x).chunk(2, dim=2)
        u, conv = self.conv(u, None if state is None else state.tensor("conv"))
        y, inner = self.inner(F.silu(u), None if state is None else state.inner("inner"))
        return self.out_proj(y * F.silu(gate)), State({"conv": conv, "inner": inner})
