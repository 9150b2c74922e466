"""S4D: a linear state space that is the same at every step, with a diagonal matrix."""

import math

import torch
from torch import Tensor, nn

from minrnn.mixers.contract import Mixer
from minrnn.mixers.hyena import long_convolution
from minrnn.state import State

# of dt at the start, log-uniform
_STEP_SIZES = (1e-3, 1e-1)


class S4D(Mixer):
    """A state space of each channel with complex decays in conjugate pairs.

        h_t[d, n] = exp(dt A) h_{t-1}[d, n] + (exp(dt A) - 1) / A * x_t[d]
        y_t[d] = 2 Re sum_n C[d, n] h_t[d, n] + D[d] x_t[d]

    Gu et al. 2022, arXiv:2206.11893 (S4D-Lin: A_n = -1/2 + i pi n at the start). A sequence is a
    convolution by Fourier transform with the kernel that this recurrence has, and what the state
    before it adds.

    Args:
        width: channels of x and y.
        state_size: N, numbers of state for each of them, even: pairs count twice.

    Raises:
        ValueError: `state_size` is odd.
    """

    # its authors exempt all of these but C, which is as much a part of the state space
    no_weight_decay = ("log_dt", "log_decay", "frequency", "C", "D")

    def __init__(self, width: int, state_size: int) -> None:
        super().__init__()
        if state_size % 2:
            raise ValueError(f"`state_size` must be even, got {state_size}")
        pairs = state_size // 2
        low, high = map(math.log, _STEP_SIZES)
        multiples = math.pi * torch.arange(pairs, dtype=torch.get_default_dtype())
        self.log_dt = nn.Parameter(torch.empty(width).uniform_(low, high))
        self.log_decay = nn.Parameter(torch.full((width, pairs), math.log(0.5)))
        self.frequency = nn.Parameter(multiples.repeat(width, 1))
        # (width, pairs, real and imaginary part)
        self.C = nn.Parameter(torch.randn(width, pairs, 2) * math.sqrt(0.5))
        self.D = nn.Parameter(torch.randn(width))

    def init_state(self, batch_size: int) -> State:
        """The state before the first step: zeros, (batch_size, width, state_size / 2, 2)."""
        dtype = torch.promote_types(self.C.dtype, torch.float32)
        return State({"h": self.C.new_zeros(batch_size, *self.C.shape, dtype=dtype)})

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Mix x (B, T, width); the state is {"h": (B, width, state_size / 2, 2)}."""
        T, dtype = x.shape[1], torch.promote_types(self.C.dtype, torch.float32)
        A = torch.complex(-self.log_decay.to(dtype).exp(), self.frequency.to(dtype))
        exponent = self.log_dt.to(dtype).exp()[:, None] * A
        # (width, pairs); expm1 is not there for complex numbers, and |dt A| is not small for all
        b = (exponent.exp() - 1) / A
        C = torch.view_as_complex(self.C.to(dtype))
        # exp(l dt A) for l = 0 .. T: (width, pairs, T + 1)
        powers = torch.exp(exponent[..., None] * torch.arange(T + 1, device=x.device))
        kernel = 2 * ((C * b)[:, None] @ powers[..., :T]).real[:, 0]
        u = x.to(dtype)
        y = long_convolution(u, kernel) + self.D.to(dtype) * u
        # what the inputs leave at the end, (width, pairs, B)
        left = (b[..., None] * powers[..., :T].flip(2)) @ torch.complex(
            u.permute(2, 1, 0), torch.zeros_like(u.permute(2, 1, 0))
        )
        if state is not None:
            # (B, width, pairs) to (width, pairs, B)
            h0 = torch.view_as_complex(state.tensor("h").to(dtype)).permute(1, 2, 0)
            carried = (C[..., None] * powers[..., 1:]).transpose(1, 2) @ h0
            y = y + 2 * carried.real.permute(2, 1, 0)
            left = left + powers[..., T:] * h0
        h_T = torch.view_as_real(left.permute(2, 0, 1).contiguous())
        return y.to(x.dtype), State({"h": h_T})
