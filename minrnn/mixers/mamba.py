"""S6, the selective state space of Mamba, and the Mamba block around it."""

import math
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

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

    def piece(u: Tensor, dt: Tensor, B: Tensor, C: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        # (B, T, D) and (D, N) to (B, T, D, N)
        exponent = dt[..., None] * A
        step = dt[..., None] if discretization == "euler" else torch.expm1(exponent) / A
        b = (step * u[..., None]) * B[:, :, None]
        h, h_T = scan(exponent.exp().flatten(2), b.flatten(2), h)
        return (h.unflatten(2, A.shape) @ C[..., None])[..., 0], h_T

    steps = max(1, _PIECE // max(1, h0.numel()))
    again = torch.is_grad_enabled() and u.shape[1] > steps
    pieces, h = [], h0
    for cut in zip(*(x.split(steps, dim=1) for x in (u, dt, B, C)), strict=True):
        run = partial(checkpoint, piece, use_reentrant=False) if again else piece
        y, h = run(*cut, h)  # pyright: ignore[reportGeneralTypeIssues, reportCallIssue]
        pieces.append(y)
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1), h


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
