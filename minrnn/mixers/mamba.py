"""S6, the selective state space of Mamba, and the Mamba block around it."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from minrnn.mixers.contract import DepthwiseConv, Mixer, state_dtype
from minrnn.ops.selective import Discretization, selective_scan
from minrnn.state import State

# of softplus(bias) at the start, log-uniform
_STEP_SIZES = (1e-3, 1e-1)


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

    # as its authors mark them
    no_weight_decay = ("A_log", "D")

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
        A = torch.arange(1, state_size + 1, dtype=torch.get_default_dtype()).log()
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
