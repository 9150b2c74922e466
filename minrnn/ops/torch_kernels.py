"""The recurrences and their gradients in pure torch: what a device without a kernel runs.

Everything rests on `minrnn::scan`, so a device that has a kernel for it uses it here too; the scan
itself is the tree of `scans.blelloch`. The backward formulas are made of differentiable operators
and are therefore also what the second derivative is taken of. Letters and signatures are those of
the operators in `minrnn/ops/__init__.py`; derivations stand in `docs/equations.md`.
"""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from minrnn.ops import scans, transforms

_Grads = tuple[Tensor, Tensor, Tensor]


def scan(
    a: Tensor,
    b: Tensor,
    h0: Tensor | None,
    reset: Tensor | None,
    cu_seqlens: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    """h_t = a_t * h_{t-1} + b_t."""
    dtype = a.dtype
    a, b = widen(a), widen(b)
    h0 = None if h0 is None else h0.to(b.dtype)
    if cu_seqlens is not None:
        h = _packed(a, b, h0, reset, cu_seqlens, reverse)
        return h.to(dtype), _last_of_each(h, h0, cu_seqlens, reverse)
    if reverse:
        a, b, reset = a.flip(1), b.flip(1), None if reset is None else reset.flip(1)
    h, h_T = scans.blelloch(a, b, h0, reset)
    h = h.flip(1) if reverse else h
    # outputs of an operator must not share memory with its inputs or with each other
    return h.to(dtype), h_T.clone()


def scan_backward(
    dh: Tensor,
    dh_T: Tensor,
    a: Tensor,
    h0: Tensor | None,
    h: Tensor,
    reset: Tensor | None,
    cu_seqlens: Tensor | None,
    reverse: bool,
) -> _Grads:
    """g_t = dh_t + a_{t+1} * g_{t+1};  da_t = g_t * h_{t-1},  db_t = g_t,  dh0 = a_1 * g_1.

    A scan that runs the other way: its decay is that of the step after, its first state dh_T.
    """
    dtype = a.dtype
    dh, a, h = widen(dh), widen(a), widen(h)
    dh_T, dtype_h0 = dh_T.to(h.dtype), h.dtype if h0 is None else h0.dtype
    before_first = dh_T.new_zeros(dh_T.shape) if h0 is None else h0.to(h.dtype)
    before = _shift(h, before_first, cu_seqlens, reverse)
    later = None
    if reset is not None:
        before = torch.where(reset[..., None], 0.0, before)
        open_end = reset.new_zeros(dh_T.shape[0], 1)
        later = _shift(reset[..., None], open_end, cu_seqlens, not reverse)[..., 0]
    a_later = _shift(a, torch.ones_like(dh_T), cu_seqlens, not reverse)
    g, g_first = transforms.call("scan", a_later, dh, dh_T, later, cu_seqlens, not reverse)
    dh0 = _through_first_step(g_first, dh_T, a, reset, cu_seqlens, reverse)
    return (g * before).to(dtype), g.to(dtype), dh0.to(dtype_h0)


def mingru(
    k: Tensor,
    v: Tensor,
    h0: Tensor | None,
    candidate: str,
    reset: Tensor | None,
    cu_seqlens: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    """a = sigmoid(-k), b = sigmoid(k) * candidate(v)."""
    dtype = k.dtype
    k, v = widen(k), widen(v)
    b = torch.sigmoid(k) * _candidate(v, candidate)
    h, h_T = transforms.call("scan", mingru_decay(k), b, h0, reset, cu_seqlens, reverse)
    return h.to(dtype), h_T


def mingru_backward(
    dh: Tensor,
    dh_T: Tensor,
    k: Tensor,
    v: Tensor,
    h0: Tensor | None,
    h: Tensor,
    candidate: str,
    reset: Tensor | None,
    cu_seqlens: Tensor | None,
    reverse: bool,
) -> _Grads:
    """dk = (db * candidate(v) - da) * z * (1 - z),  dv = db * z * candidate'(v)."""
    dtype = k.dtype
    k, v = widen(k), widen(v)
    z, a = torch.sigmoid(k), mingru_decay(k)
    da, db, dh0 = scan_backward(dh, dh_T, a, h0, h, reset, cu_seqlens, reverse)
    dk = (db * _candidate(v, candidate) - da) * z * a
    dv = db * z * _candidate_slope(v, candidate)
    return dk.to(dtype), dv.to(dtype), dh0


def minlstm(
    f: Tensor,
    i: Tensor,
    v: Tensor,
    h0: Tensor | None,
    candidate: str,
    normalized: bool,
    reset: Tensor | None,
    cu_seqlens: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    """a = f', b = i' * candidate(v), with f' + i' = 1 if normalized."""
    dtype = f.dtype
    f, i, v = widen(f), widen(i), widen(v)
    a, open_gate = _gates(f, i, normalized)
    b = open_gate * _candidate(v, candidate)
    h, h_T = transforms.call("scan", a, b, h0, reset, cu_seqlens, reverse)
    return h.to(dtype), h_T


def minlstm_backward(
    dh: Tensor,
    dh_T: Tensor,
    f: Tensor,
    i: Tensor,
    v: Tensor,
    h0: Tensor | None,
    h: Tensor,
    candidate: str,
    normalized: bool,
    reset: Tensor | None,
    cu_seqlens: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Normalized: dd = (db * candidate(v) - da) * f' * i' with d = log sig(i) - log sig(f)."""
    dtype = f.dtype
    f, i, v = widen(f), widen(i), widen(v)
    a, open_gate = _gates(f, i, normalized)
    da, db, dh0 = scan_backward(dh, dh_T, a, h0, h, reset, cu_seqlens, reverse)
    dopen = db * _candidate(v, candidate)
    if normalized:
        dd = (dopen - da) * a * open_gate
        df, di = -dd * torch.sigmoid(-f), dd * torch.sigmoid(-i)
    else:
        df, di = da * a * torch.sigmoid(-f), dopen * open_gate * torch.sigmoid(-i)
    dv = db * open_gate * _candidate_slope(v, candidate)
    return df.to(dtype), di.to(dtype), dv.to(dtype), dh0


def widen(x: Tensor) -> Tensor:
    """`x` in the dtype of the state: float64 stays, everything else is float32."""
    return x if x.dtype == torch.float64 else x.float()


def mingru_decay(k: Tensor) -> Tensor:
    """1 - z, which sigmoid(-k) gives without the subtraction."""
    return torch.sigmoid(-k)


def minlstm_decay(f: Tensor, i: Tensor, normalized: bool) -> Tensor:
    """f', what a minLSTM keeps of its state at each step."""
    return _gates(f, i, normalized)[0]


def _gates(f: Tensor, i: Tensor, normalized: bool) -> tuple[Tensor, Tensor]:
    if not normalized:
        return torch.sigmoid(f), torch.sigmoid(i)
    # log(i' / f'): the quotient of two sigmoids would be 0/0 where both underflow
    d = logsigmoid(i) - logsigmoid(f)
    return torch.sigmoid(-d), torch.sigmoid(d)


def _candidate(v: Tensor, candidate: str) -> Tensor:
    if candidate == "g":
        return torch.where(v >= 0, v + 0.5, torch.sigmoid(v))
    return torch.tanh(v) if candidate == "tanh" else v


def _candidate_slope(v: Tensor, candidate: str) -> Tensor:
    if candidate == "g":
        return torch.where(v >= 0, 1.0, torch.sigmoid(v) * torch.sigmoid(-v))
    return 1 - torch.tanh(v).square() if candidate == "tanh" else torch.ones_like(v)


# Sequences laid end to end in one row: step t belongs to sequence n of `_owners`.


def _owners(T: int, cu_seqlens: Tensor, reverse: bool) -> tuple[Tensor, Tensor]:
    """Whose step t is, (T,), and whether it is the first one processed there, (T,) bool."""
    steps = torch.arange(T, device=cu_seqlens.device)
    owner = torch.searchsorted(cu_seqlens[1:].contiguous(), steps, right=True)
    # bounds that end before T leave steps to nobody: no index may lie beyond the last
    owner = owner.clamp(max=max(cu_seqlens.shape[0] - 2, 0))
    return owner, steps == (cu_seqlens[owner + 1] - 1 if reverse else cu_seqlens[owner])


def _packed(
    a: Tensor,
    b: Tensor,
    h0: Tensor | None,
    reset: Tensor | None,
    cu_seqlens: Tensor,
    reverse: bool,
) -> Tensor:
    """All sequences in one scan: each first step is a reset, and gets its h0 through b."""
    owner, first = _owners(b.shape[1], cu_seqlens, reverse)
    if h0 is not None:
        takes = first[:, None] if reset is None else (first & ~reset[0])[:, None]
        b = torch.where(takes, torch.addcmul(b, a, h0[owner]), b)
    cut = first[None] if reset is None else first | reset
    return transforms.call("scan", a, b, None, cut, None, reverse)[0]


def _last_of_each(h: Tensor, h0: Tensor | None, cu_seqlens: Tensor, reverse: bool) -> Tensor:
    """h_T (N, D): the state each sequence ends with, its h0 if it is empty."""
    start, stop = cu_seqlens[:-1], cu_seqlens[1:]
    empty = h.new_zeros(start.shape[0], h.shape[2]) if h0 is None else h0
    if h.shape[1] == 0:
        return empty.clone()
    last = (start if reverse else stop - 1).clamp(min=0, max=h.shape[1] - 1)
    return torch.where((start == stop)[:, None], empty, h[0, last])


def _shift(x: Tensor, first: Tensor, cu_seqlens: Tensor | None, reverse: bool) -> Tensor:
    """`x` (B, T, D) one step later in processing order; the first step of each row gets `first`."""
    if x.shape[1] == 0:
        return x
    if cu_seqlens is None:
        if reverse:
            return torch.cat([x[:, 1:], first[:, None]], dim=1)
        return torch.cat([first[:, None], x[:, :-1]], dim=1)
    owner, is_first = _owners(x.shape[1], cu_seqlens, reverse)
    return torch.where(is_first[:, None], first[owner], x.roll(-1 if reverse else 1, dims=1))


def _through_first_step(
    g_first: Tensor,
    dh_T: Tensor,
    a: Tensor,
    reset: Tensor | None,
    cu_seqlens: Tensor | None,
    reverse: bool,
) -> Tensor:
    """dh0 from the gradient of the first state; an empty sequence hands dh_T straight on."""
    T = a.shape[1]
    if T == 0:
        return dh_T.clone()
    if cu_seqlens is None:
        first = T - 1 if reverse else 0
        dh0 = a[:, first] * g_first
        return dh0 if reset is None else torch.where(reset[:, first, None], 0.0, dh0)
    start, stop = cu_seqlens[:-1], cu_seqlens[1:]
    first = (stop - 1 if reverse else start).clamp(min=0, max=T - 1)
    dh0 = a[0, first] * g_first
    if reset is not None:
        dh0 = torch.where(reset[0, first, None], 0.0, dh0)
    return torch.where((start == stop)[:, None], dh_T, dh0)
