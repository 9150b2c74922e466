"""nn.GRU and nn.LSTM as mixers: what the minimal ones stand in for."""

from typing import Any

import torch
from torch import Tensor, nn

from minrnn.mixers.contract import Mixer
from minrnn.state import State


class RecurrentNetwork(Mixer):
    """An `nn.GRU` or `nn.LSTM`, widened by `expansion` and projected back down.

    Args:
        layer: the class, `torch.nn.GRU` or `torch.nn.LSTM`.
        width: features of x and y.
        expansion: channels of the state for each of them, a whole number >= 1.
    """

    def __init__(self, layer: type[nn.GRU] | type[nn.LSTM], width: int, expansion: int) -> None:
        super().__init__()
        self.rnn: Any = layer(width, width * expansion, batch_first=True)
        self.out = nn.Linear(width * expansion, width, bias=False)

    def init_state(self, batch_size: int) -> State:
        """The state before the first step: zeros, (batch_size, width * expansion) each."""
        names = ("h", "c") if isinstance(self.rnn, nn.LSTM) else ("h",)
        weight = self.out.weight
        return State({name: weight.new_zeros(batch_size, self.rnn.hidden_size) for name in names})

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Mix x (B, T, width); the state is {"h": ..} and, of an LSTM, {"c": ..}."""
        hx, device = None, x.device.type
        if isinstance(self.rnn, nn.LSTM) and torch.is_autocast_enabled(device):
            # autocast asks oneDNN for an LSTM in half precision whatever the processor has; torch
            # itself looks first, at an x that is cast already
            x = x.to(torch.get_autocast_dtype(device))
        if state is not None:
            # what autocast runs in is what the layer takes a state in
            h, *c = (state.tensor(name)[None].to(x.dtype) for name in state)
            hx = (h, *c) if c else h
        h, last = self.rnn(x, hx)
        names = dict(zip(("h", "c"), last if isinstance(last, tuple) else (last,), strict=False))
        return self.out(h), State({name: part[0] for name, part in names.items()})
