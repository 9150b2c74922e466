"""Causal attention, the mixer of a Transformer: exact, and with a state that grows."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from minrnn.mixers.contract import Mixer
from minrnn.state import State

# of the slowest rotation, in steps for a radian (Su et al. 2021)
_LONGEST = 10_000.0


class Attention(Mixer):
    """Multi-head attention of each step to itself and the steps before it.

        q, k, v = split(W x);  q_t, k_t turned by angles t * theta_j
        y_t = P sum_{s <= t} softmax_s(q_t . k_s / sqrt(d)) v_s        for each head

    Vaswani et al. 2017, arXiv:1706.03762; rotary positions of Su et al. 2021, arXiv:2104.09864,
    theta_j = 10000^(-2 j / d). The state holds the keys, already turned, and the values of every
    step: it grows by 2 * width numbers a step.

    Args:
        width: features of x and y.
        num_heads: a divisor of `width` that leaves heads of even width.

    Raises:
        ValueError: the heads do not fit.
    """

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        if num_heads < 1 or width % (2 * num_heads):
            raise ValueError(f"`num_heads` must divide `width` = {width} evenly, got {num_heads}")
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def init_state(self, batch_size: int) -> State:
        """No keys and values yet: (batch_size, num_heads, 0, width / num_heads) each."""
        weight = self.out.weight
        empty = weight.new_empty(batch_size, self.num_heads, 0, len(weight) // self.num_heads)
        return State({"k": empty, "v": empty})

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Mix x (B, T, width); the state is {"k", "v"}, (B, num_heads, steps, d) each."""
        T, past = x.shape[1], 0 if state is None else state.tensor("k").shape[2]
        # (B, T, 3 * width) to (B, T, 3, num_heads, d)
        qkv = self.qkv(x).unflatten(2, (3, self.num_heads, -1))
        turned = _turn(qkv[:, :, :2], past)
        # (B, num_heads, T, d) each
        q, k, v = (part.transpose(1, 2) for part in (*turned.unbind(2), qkv[:, :, 2]))
        if state is not None:
            k = torch.cat([state.tensor("k").to(k.dtype), k], dim=2)
            v = torch.cat([state.tensor("v").to(v.dtype), v], dim=2)
        if past and T > 1:
            seen = torch.ones(T, past + T, dtype=torch.bool, device=x.device).tril(past)
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        else:
            # one step sees all there is
            y = F.scaled_dot_product_attention(q, k, v, is_causal=T > 1)
        return self.out(y.transpose(1, 2).flatten(2)), State({"k": k, "v": v})


def _turn(x: Tensor, first: int) -> Tensor:
    """x (B, T, 2, num_heads, d), neighbours as coordinates of a plane, turned from `first` on.

    The angles are computed in float64: float32 has no room for that of a late step.
    """
    T, half = x.shape[1], x.shape[4] // 2
    theta = _LONGEST ** -(torch.arange(half, dtype=torch.float64, device=x.device) / half)
    steps = torch.arange(first, first + T, dtype=torch.float64, device=x.device)
    angles = steps[:, None, None, None] * theta
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    planes = torch.view_as_complex(wide.unflatten(4, (half, 2)))
    turned = planes * torch.polar(torch.ones_like(angles), angles).to(planes.dtype)
    return torch.view_as_real(turned).flatten(4).to(x.dtype)
