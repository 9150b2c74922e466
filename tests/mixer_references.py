"""The mixers once more: loops over steps, straight from the equations, in the dtype of the weights.

`answer(module, x)` is y for x (B, T, width) from the state before the first step.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from minrnn.mixers import (
    H3,
    S4D,
    S6,
    Aaren,
    Attention,
    LongConvolution,
    Mamba,
    RecurrentNetwork,
    Ungated,
)


def answer(module: Any, x: Tensor) -> Tensor:
    return _ANSWERS[type(module)](module, x)


def _attention(m: Attention, x: Tensor) -> Tensor:
    _, T, width = x.shape
    d = width // m.num_heads
    q, k, v = m.qkv(x).split(width, dim=2)
    theta = torch.tensor([10_000 ** (-2 * j / d) for j in range(d // 2)], dtype=x.dtype)
    y = torch.zeros_like(x)
    for head in range(m.num_heads):
        mine = slice(head * d, (head + 1) * d)

        def turned(z: Tensor, t: int, mine: slice = mine) -> Tensor:
            # neighbours as real and imaginary parts
            plane = torch.complex(z[:, t, mine][:, ::2], z[:, t, mine][:, 1::2])
            return plane * torch.polar(torch.ones_like(theta), t * theta)

        for t in range(T):
            scores = [
                (turned(q, t) * turned(k, s).conj()).real.sum(1) / math.sqrt(d)
                for s in range(t + 1)
            ]
            p = torch.stack(scores, dim=1).softmax(dim=1)
            y[:, t, mine] = (p[..., None] * v[:, : t + 1, mine]).sum(1)
    return m.out(y)


def _aaren(m: Aaren, x: Tensor) -> Tensor:
    num_heads, d = m.query.shape
    k, v = m.kv(x).chunk(2, dim=2)
    ys = []
    for t in range(x.shape[1]):
        heads = []
        for head in range(num_heads):
            mine = slice(head * d, (head + 1) * d)
            p = (k[:, : t + 1, mine] @ m.query[head] / math.sqrt(d)).softmax(dim=1)
            heads.append((p[..., None] * v[:, : t + 1, mine]).sum(1))
        ys.append(torch.cat(heads, dim=1))
    return m.out(torch.stack(ys, dim=1))


def _recurrent(m: RecurrentNetwork, x: Tensor) -> Tensor:
    w = dict(m.rnn.named_parameters())
    h = c = x.new_zeros(x.shape[0], m.rnn.hidden_size)
    ys = []
    for x_t in x.unbind(1):
        a = x_t @ w["weight_ih_l0"].T + w["bias_ih_l0"]
        b = h @ w["weight_hh_l0"].T + w["bias_hh_l0"]
        if m.rnn.mode == "GRU":
            (r, z, n), (r_h, z_h, n_h) = a.chunk(3, dim=1), b.chunk(3, dim=1)
            z = torch.sigmoid(z + z_h)
            h = (1 - z) * torch.tanh(n + torch.sigmoid(r + r_h) * n_h) + z * h
        else:
            i, f, g, o = (a + b).chunk(4, dim=1)
            c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
            h = torch.sigmoid(o) * torch.tanh(c)
        ys.append(h)
    return m.out(torch.stack(ys, dim=1))


def _causal_conv(conv: Any, x: Tensor) -> Tensor:
    w = conv.weight[:, 0]
    ys = []
    for t in range(x.shape[1]):
        y = conv.bias
        for j in range(w.shape[1]):
            ago = w.shape[1] - 1 - j
            if t >= ago:
                y = y + w[:, j] * x[:, t - ago]
        ys.append(y.expand(x.shape[0], -1))
    return torch.stack(ys, dim=1)


def _s6(m: S6, x: Tensor) -> Tensor:
    A, (width, N) = -m.A_log.exp(), m.A_log.shape
    h = x.new_zeros(x.shape[0], width, N)
    ys = []
    for x_t in x.unbind(1):
        parts = x_t @ m.x_proj.weight.T
        low, B, C = parts[:, : m.rank], parts[:, m.rank : m.rank + N], parts[:, m.rank + N :]
        dt = torch.log1p(torch.exp(low @ m.dt_proj.weight.T + m.dt_proj.bias))[..., None]
        weight = dt if m.discretization == "euler" else (torch.exp(dt * A) - 1) / A
        h = torch.exp(dt * A) * h + weight * B[:, None] * x_t[..., None]
        ys.append((h * C[:, None]).sum(2) + m.D * x_t)
    return torch.stack(ys, dim=1)


def _mamba(m: Mamba, x: Tensor) -> Tensor:
    u, gate = (x @ m.in_proj.weight.T).chunk(2, dim=2)
    u = _causal_conv(m.conv, u)
    y = answer(m.inner, u * torch.sigmoid(u))
    return (y * gate * torch.sigmoid(gate)) @ m.out_proj.weight.T


def _s4d(m: S4D, x: Tensor) -> Tensor:
    A = torch.complex(-m.log_decay.exp(), m.frequency)
    C = torch.complex(m.C[..., 0], m.C[..., 1])
    decay = torch.exp(m.log_dt.exp()[:, None] * A)
    h = torch.zeros(x.shape[0], *A.shape, dtype=A.dtype)
    ys = []
    for x_t in x.unbind(1):
        h = decay * h + (decay - 1) / A * x_t[..., None]
        ys.append(2 * (C * h).sum(2).real + m.D * x_t)
    return torch.stack(ys, dim=1)


def _long_convolution(m: LongConvolution, x: Tensor) -> Tensor:
    ys = []
    for t in range(x.shape[1]):
        y = m.D * x[:, t]
        for s in range(t + 1):
            position = torch.tensor((t - s) / m.length, dtype=x.dtype)
            angles = [2 * math.pi * position * band for band in range(1, 9)]
            z = torch.stack([position, *map(torch.cos, angles), *map(torch.sin, angles)])
            for layer in m.hidden:
                z = torch.sin(10 * layer(z) / 8)
            y = y + m.filter(z) * torch.exp(-position * m.rates) * x[:, s]
        ys.append(y)
    return torch.stack(ys, dim=1)


def _h3(m: H3, x: Tensor) -> Tensor:
    q, k, v = m.qkv(x).chunk(3, dim=2)
    return m.out(q * answer(m.inner, _causal_conv(m.shift, k) * v))


def _ungated(m: Ungated, x: Tensor) -> Tensor:
    return m.out(F.gelu(answer(m.inner, x)))


_ANSWERS: dict[type, Any] = {
    Attention: _attention,
    Aaren: _aaren,
    RecurrentNetwork: _recurrent,
    S6: _s6,
    Mamba: _mamba,
    S4D: _s4d,
    LongConvolution: _long_convolution,
    H3: _h3,
    Ungated: _ungated,
}
