"""Aaren: attention with a query that does not depend on the input, hence a recurrence."""

import math

import torch
from torch import Tensor, nn

from minrnn.mixers.contract import Mixer, state_dtype
from minrnn.ops import scan
from minrnn.state import State


class Aaren(Mixer):
    """Attention as a recurrent network: a running softmax over all steps so far.

        k, v = split(W x);  s_t = q . k_t / sqrt(d)
        m_t = max(m_{t-1}, s_t)
        c_t = c_{t-1} exp(m_{t-1} - m_t) + exp(s_t - m_t)
        a_t = a_{t-1} exp(m_{t-1} - m_t) + v_t exp(s_t - m_t)
        y_t = P (a_t / c_t)                                            for each head

    Feng et al. 2024, arXiv:2405.13956, section 3.2. q is a parameter of each head. The two sums are
    `minrnn.scan` with decays exp(m_{t-1} - m_t) <= 1.

    Args:
        width: features of x and y.
        num_heads: a divisor of `width`.

    Raises:
        ValueError: the heads do not fit.
    """

    # not a matrix that maps features: a vector for each head
    no_weight_decay = ("query",)

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        if num_heads < 1 or width % num_heads:
            raise ValueError(f"`num_heads` must divide `width` = {width}, got {num_heads}")
        self.query = nn.Parameter(torch.randn(num_heads, width // num_heads))
        self.kv = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)

    def init_state(self, batch_size: int) -> State:
        """Nothing seen: m = -inf and c = 0, (batch_size, num_heads); a = 0, (.., width)."""
        num_heads, head_width = self.query.shape
        c = self.query.new_zeros(batch_size, num_heads, dtype=state_dtype(self.query))
        m = torch.full_like(c, -math.inf)
        return State({"m": m, "c": c, "a": c.new_zeros(batch_size, num_heads * head_width)})

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Mix x (B, T, width); the state is {"m", "c", "a"}, of fixed size."""
        state = self.init_state(x.shape[0]) if state is None else state
        head_width = self.query.shape[1]
        k, v = self.kv(x).to(state.tensor("c").dtype).chunk(2, dim=2)
        # (B, T, width) to (B, T, num_heads)
        s = (k.unflatten(2, self.query.shape) * self.query.to(k.dtype)).sum(3)
        s = s / math.sqrt(head_width)
        # a constant for the gradient: y does not depend on what the exponents are shifted by
        m = torch.cat([state.tensor("m")[:, None], s.detach()], dim=1).cummax(dim=1).values
        # (B, T, num_heads)
        decay, weight = torch.exp(m[:, :-1] - m[:, 1:]), torch.exp(s - m[:, 1:])
        c, c_T = scan(decay, weight, state.tensor("c"))
        wide = v.unflatten(2, self.query.shape) * weight[..., None]
        decays = decay.repeat_interleave(head_width, dim=2)
        a, a_T = scan(decays, wide.flatten(2), state.tensor("a"))
        y = a.unflatten(2, self.query.shape) / c[..., None]
        return self.out(y.flatten(2).to(x.dtype)), State({"m": m[:, -1], "c": c_T, "a": a_T})
