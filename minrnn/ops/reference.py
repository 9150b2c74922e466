"""The recurrences as loops over time: the definition of right.

Every kernel is held to these, in values and in every gradient, with float64 inputs. They are
differentiable by plain autograd, slow, and written to be read.
"""

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from minrnn.ops.checks import check_candidate, check_flag


def scan(
    a: Tensor,
    b: Tensor,
    h0: Tensor | None = None,
    *,
    reset: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    reverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """Run h_t = a_t * h_{t-1} + b_t; arguments and results are those of `minrnn.ops.scan`."""
    check_flag("reverse", reverse)
    dtype = a.dtype
    state_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    a, b = a.to(state_dtype), b.to(state_dtype)
    h, last = torch.empty_like(b), []
    for n, (rows, steps) in enumerate(_sequences(a.shape, cu_seqlens)):
        if h0 is None:
            state = b.new_zeros(rows.stop - rows.start, b.shape[2])
        else:
            state = h0.to(state_dtype) if cu_seqlens is None else h0[n : n + 1].to(state_dtype)
        for t in reversed(steps) if reverse else steps:
            if reset is not None:
                state = torch.where(reset[rows, t, None], 0.0, state)
            state = a[rows, t] * state + b[rows, t]
            h = h.index_put((_index(rows, h), torch.tensor(t, device=h.device)), state)
        last.append(state)
    h_T = torch.cat(last) if last else b.new_zeros(0, b.shape[2])
    return h.to(dtype), h_T


def mingru(
    k: Tensor,
    v: Tensor,
    h0: Tensor | None = None,
    *,
    candidate: str = "g",
    reset: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    reverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """Run a minGRU; arguments and results are those of `minrnn.ops.mingru`."""
    check_candidate(candidate)
    dtype = k.dtype
    k, v = _widen(k), _widen(v)
    z = torch.sigmoid(k)
    # 1 - z, without the cancellation
    a = torch.sigmoid(-k)
    h, h_T = scan(
        a, z * _candidate(v, candidate), h0, reset=reset, cu_seqlens=cu_seqlens, reverse=reverse
    )
    return h.to(dtype), h_T


def minlstm(
    f: Tensor,
    i: Tensor,
    v: Tensor,
    h0: Tensor | None = None,
    *,
    candidate: str = "g",
    normalized: bool = True,
    reset: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    reverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """Run a minLSTM; arguments and results are those of `minrnn.ops.minlstm`."""
    check_candidate(candidate)
    check_flag("normalized", normalized)
    dtype = f.dtype
    f, i, v = _widen(f), _widen(i), _widen(v)
    if normalized:
        # i' / f' = sigmoid(i) / sigmoid(f), taken as a difference of logarithms: 0/0 cannot arise
        d = logsigmoid(i) - logsigmoid(f)
        a, open_gate = torch.sigmoid(-d), torch.sigmoid(d)
    else:
        a, open_gate = torch.sigmoid(f), torch.sigmoid(i)
    b = open_gate * _candidate(v, candidate)
    h, h_T = scan(a, b, h0, reset=reset, cu_seqlens=cu_seqlens, reverse=reverse)
    return h.to(dtype), h_T


def _candidate(v: Tensor, candidate: str) -> Tensor:
    if candidate == "g":
        return torch.where(v >= 0, v + 0.5, torch.sigmoid(v))
    return torch.tanh(v) if candidate == "tanh" else v


def _widen(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _sequences(shape: torch.Size, cu_seqlens: Tensor | None) -> Iterator[tuple[slice, range]]:
    """The rows and steps of each sequence: all rows at once, or one row cut at `cu_seqlens`."""
    if cu_seqlens is None:
        yield slice(0, shape[0]), range(shape[1])
        return
    for start, stop in pairwise(cu_seqlens.tolist()):
        yield slice(0, 1), range(start, stop)


def _index(rows: slice, h: Tensor) -> Tensor:
    return torch.arange(rows.start, rows.stop, device=h.device)
