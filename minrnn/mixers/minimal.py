"""MinGRU and MinLSTM as mixers."""

import math
from typing import Any

import torch
from torch import Tensor

from minrnn.layers import MinGRU, MinLSTM
from minrnn.mixers.contract import Mixer, state_dtype
from minrnn.state import State


class MinimalRNN(Mixer):
    """A `MinGRU` or `MinLSTM`, widened by `expansion` and projected back down.

    Feng et al. 2024, arXiv:2410.01201, appendix C: the state has width * expansion channels.

    Args:
        layer: the class, `MinGRU` or `MinLSTM`.
        width: features of x and y.
        expansion: channels of the state for each of them, a whole number >= 1.
        longest_memory: steps; at the start the channels forget after 1 to this many, log-uniform.
            0 leaves the gates' biases as the layer draws them, for which it is about 2.
        options: passed to the layer, e.g. `candidate`.
    """

    can_split_time = True

    def __init__(
        self,
        layer: type[MinGRU] | type[MinLSTM],
        width: int,
        expansion: int,
        longest_memory: int = 0,
        **options: Any,
    ) -> None:
        super().__init__()
        sizes = (width, width * expansion)
        self.rnn = layer(*sizes, batch_first=True, proj_size=width, **options)
        if longest_memory:
            _spread_memory(self.rnn, longest_memory)

    def init_state(self, batch_size: int) -> State:
        """The state before the first step: zeros, (batch_size, width * expansion)."""
        weight = self.rnn.weight_ih_l0
        shape = (batch_size, self.rnn.hidden_size)
        return State({"h": torch.zeros(shape, dtype=state_dtype(weight), device=weight.device)})

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Mix x (B, T, width); the state is {"h": (B, width * expansion)}."""
        if state is None and x.dtype in (torch.bfloat16, torch.float16):
            # a state has the dtype of the one before: float32 from the first step
            state = self.init_state(x.shape[0])
        y, h_n = self.rnn(x, None if state is None else state.tensor("h")[None])
        # MinLSTM returns the pair (h_n, c_n) of nn.LSTM, which are equal
        h_n = h_n[0] if isinstance(h_n, tuple) else h_n
        return y, State({"h": h_n[0]})


@torch.no_grad()
def _spread_memory(rnn: MinGRU | MinLSTM, longest: int) -> None:
    """Move the gates' biases so that a channel's z, or i', is about 1 / its memory.

    As Tallec and Ollivier 2018, arXiv:1804.11188, section 2, but log-uniform instead of uniform, so
    that there are short memories too.
    """
    bias, D = rnn.bias_ih_l0, rnn.hidden_size
    assert bias is not None
    # sigmoid(-u) is about exp(-u); D numbers for D channels
    u = torch.empty_like(bias[:D]).uniform_(0, math.log(longest))
    if isinstance(rnn, MinLSTM):
        # rows f, i, v; with both moved i' = sigmoid(-u)
        bias[:D] += u
        bias[D : 2 * D] -= u
    else:
        # rows k, v
        bias[:D] -= u
