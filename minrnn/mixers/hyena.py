"""Convolutions as long as the sequence: by Fourier transform, with a filter made from positions."""

import math

import torch
from torch import Tensor, nn

from minrnn.mixers.contract import Mixer
from minrnn.state import State

# hidden units of the network that makes the filter, and frequencies of its positional features
_UNITS, _BANDS = 64, 8
# the sine of the network's layers: so many periods at the start
_FREQUENCY = 10.0


def long_convolution(u: Tensor, kernel: Tensor) -> Tensor:
    """y_t = sum_{s <= t} kernel_{t-s} * u_s for each channel.

    Args:
        u: (B, T, D).
        kernel: (D, T).

    Returns:
        (B, T, D), the dtype of `u`.
    """
    T = u.shape[1]
    # twice as long, so that the end does not come round to the beginning
    spectrum = torch.fft.rfft(u.transpose(1, 2), n=2 * T) * torch.fft.rfft(kernel, n=2 * T)
    return torch.fft.irfft(spectrum, n=2 * T)[..., :T].transpose(1, 2)


class LongConvolution(Mixer):
    """The convolution of a Hyena: its filter is a function of how many steps ago.

        y_t = sum_{s <= t} K(t - s) * x_s + D * x_t
        K(l) = network(l / length) * exp(-rate * l / length)

    Poli et al. 2023, arXiv:2302.10866, section 3: a network with sines, on the position and a few
    of its frequencies. The state holds all inputs: it grows by `width` numbers a step.

    Args:
        width: channels of x and y.
        length: the unit of l; longer sequences are possible.
    """

    # as its authors have it: the network is a filter, and decay would smooth it
    no_weight_decay = ("hidden", "filter", "D")

    def __init__(self, width: int, length: int = 1024) -> None:
        super().__init__()
        self.length = length
        self.hidden = nn.ModuleList(nn.Linear(n, _UNITS) for n in (2 * _BANDS + 1, _UNITS))
        self.filter = nn.Linear(_UNITS, width, bias=False)
        # from a memory of a few steps to one of the whole length
        rates = torch.linspace(math.log(1.5), math.log(0.3 * length), width).exp()
        self.register_buffer("rates", rates)
        self.D = nn.Parameter(torch.ones(width))

    def init_state(self, batch_size: int) -> State:
        """No inputs yet: (batch_size, 0, width)."""
        return State({"u": self.D.new_empty(batch_size, 0, self.D.shape[0])})

    def kernel(self, T: int) -> Tensor:
        """K(0), ..., K(T - 1): (width, T)."""
        # half precision has no room for a late position
        dtype = torch.promote_types(self.D.dtype, torch.float32)
        position = torch.arange(T, device=self.D.device, dtype=dtype)[:, None] / self.length
        bands = torch.arange(1, _BANDS + 1, device=self.D.device, dtype=dtype)
        angles = 2 * math.pi * position * bands
        # (T, 1 + 2 * bands)
        x = torch.cat([position, angles.cos(), angles.sin()], dim=1).to(self.D.dtype)
        for layer in self.hidden:
            x = torch.sin(_FREQUENCY * layer(x) / math.sqrt(_UNITS))
        return (self.filter(x) * torch.exp(-position * self.get_buffer("rates"))).T

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Mix x (B, T, width); the state is {"u": (B, steps, width)}."""
        u = x if state is None else torch.cat([state.tensor("u").to(x.dtype), x], dim=1)
        wide = u.to(torch.promote_types(u.dtype, torch.float32))
        y = long_convolution(wide, self.kernel(u.shape[1]).to(wide.dtype))
        y = y[:, -x.shape[1] :] + self.D * wide[:, -x.shape[1] :]
        return y.to(x.dtype), State({"u": u})
