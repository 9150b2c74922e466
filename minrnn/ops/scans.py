"""Four ways to compute one scan, h_t = a_t * h_{t-1} + b_t, in pure torch on any device.

    algorithm       work          depth         source
    sequential      T             T             the definition
    hillis_steele   2 T log2 T    log2 T        Hillis and Steele 1986
    blelloch        4 T           2 log2 T      Blelloch 1990: up-sweep, down-sweep
    log_space       11 T          4 log2 T      Heinsen 2023, arXiv:2311.06281

Work is the number of arithmetic operations per channel, depth the longest chain of them, both
counted in `docs/equations.md` (to leading order; each of log_space's two cumulative sums is charged
as one Blelloch scan). All four are differentiable through plain autograd and take any T >= 0; what
a device without a kernel runs is `blelloch`.

Two neighbouring steps compose into one, first i, then j:

    (a_i, b_i) o (a_j, b_j) = (a_i * a_j,  a_j * b_i + b_j)

and a reset at j cuts what i hands on, whatever it holds (multiplying by zero would let NaN pass).
"""

from typing import NamedTuple

import torch
from torch import Tensor


class _Steps(NamedTuple):
    """Steps, or composed runs of steps: `a` and `b` (B, T, D), `reset` (B, T, 1) or None."""

    a: Tensor
    b: Tensor
    reset: Tensor | None

    def at(self, steps: slice) -> "_Steps":
        """The chosen steps."""
        reset = None if self.reset is None else self.reset[:, steps]
        return _Steps(self.a[:, steps], self.b[:, steps], reset)

    def apply(self, before: Tensor) -> Tensor:
        """The state after each step, from the state before it."""
        if self.reset is None:
            return torch.addcmul(self.b, self.a, before)
        # both factors: across a reset the product of the decays may be NaN, and NaN * 0 is NaN
        before = torch.where(self.reset, 0.0, before)
        return torch.addcmul(self.b, torch.where(self.reset, 0.0, self.a), before)

    def after(self, first: "_Steps") -> "_Steps":
        """The composition `first o self`."""
        b = self.apply(first.b)
        if self.reset is None or first.reset is None:
            return _Steps(first.a * self.a, b, None)
        return _Steps(first.a * self.a, b, first.reset | self.reset)


def sequential(
    a: Tensor, b: Tensor, h0: Tensor | None = None, reset: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Step by step: T multiply-adds, one after the other.

    Args:
        a: (B, T, D), the decay of each step.
        b: (B, T, D), what each step adds.
        h0: (B, D), the state before the first step. None stands for zeros.
        reset: (B, T) bool. True at t lets step t start from zeros.

    Returns:
        h: (B, T, D), the state after every step.
        h_T: (B, D), the last of them.

    Example:
        >>> half = torch.full((1, 4, 1), 0.5)
        >>> sequential(half, torch.ones(1, 4, 1))[0].flatten().tolist()
        [1.0, 1.5, 1.75, 1.875]
    """
    steps = _Steps(a, b, None if reset is None else reset[..., None])
    state = _initial(b, h0)
    h = []
    for t in range(b.shape[1]):
        now = slice(t, t + 1)
        state = steps.at(now).apply(state[:, None])[:, 0]
        h.append(state)
    return (torch.stack(h, dim=1) if h else torch.empty_like(b)), state


def hillis_steele(
    a: Tensor, b: Tensor, h0: Tensor | None = None, reset: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Every step reaches back 1, then 2, then 4 ...: shallow, at the price of T log T work.

    Arguments and results are those of `sequential`.

    Example:
        >>> half = torch.full((1, 4, 1), 0.5)
        >>> hillis_steele(half, torch.ones(1, 4, 1))[0].flatten().tolist()
        [1.0, 1.5, 1.75, 1.875]
    """
    total = _Steps(a, b, None if reset is None else reset[..., None])
    T = b.shape[1]
    reach = 1
    while reach < T:
        far = total.at(slice(reach, T)).after(total.at(slice(0, T - reach)))
        # from here on the total of step t spans the 2 * reach steps that end at t
        total = _join(total.at(slice(0, reach)), far)
        reach *= 2
    state = _initial(b, h0)
    h = total.b if h0 is None else total.apply(state[:, None])
    return h, (h[:, -1] if T else state)


def blelloch(
    a: Tensor, b: Tensor, h0: Tensor | None = None, reset: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """A tree of totals going up, the states before each node coming down.

    Up-sweep: neighbours compose, level by level, until one node spans the sequence. Down-sweep:
    the root is handed `h0`; each node hands what it got to its left child, and to the right child
    what the left one makes of it. A last node without a neighbour moves up alone, so any T works.

    Arguments and results are those of `sequential`.

    Example:
        >>> half = torch.full((1, 5, 1), 0.5)
        >>> h, h_T = blelloch(half, torch.ones(1, 5, 1), h0=torch.tensor([[2.0]]))
        >>> h.flatten().tolist(), h_T.item()
        ([2.0, 2.0, 2.0, 2.0, 2.0], 2.0)
    """
    T = b.shape[1]
    state = _initial(b, h0)
    if T == 0:
        return torch.empty_like(b), state
    levels = [_Steps(a, b, None if reset is None else reset[..., None])]
    while levels[-1].b.shape[1] > 1:
        levels.append(_up(levels[-1]))
    # (B, 1, D): the state before the root
    before = state[:, None]
    for level in reversed(levels[:-1]):
        before = _down(level, before)
    h = levels[0].apply(before)
    return h, h[:, -1]


def _up(level: _Steps) -> _Steps:
    """One row of the tree from the row below it: (T) to (ceil(T / 2))."""
    T = level.b.shape[1]
    pairs = level.at(slice(1, T, 2)).after(level.at(slice(0, T - 1, 2)))
    return pairs if T % 2 == 0 else _join(pairs, level.at(slice(T - 1, T)))


def _down(level: _Steps, before: Tensor) -> Tensor:
    """The states before each node of a row, from those before each node of the row above."""
    T = level.b.shape[1]
    pairs = T // 2
    left = before[:, :pairs]
    right = level.at(slice(0, T - 1, 2)).apply(left)
    # (B, T/2, 2, D) to (B, T, D): left, right, left, right ...
    both = torch.stack([left, right], dim=2).flatten(1, 2)
    return both if T % 2 == 0 else torch.cat([both, before[:, pairs:]], dim=1)


def log_space(a: Tensor, b: Tensor, h0: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The scan by two cumulative sums of logarithms, as in the paper's listing.

        A_t = log a_1 + ... + log a_t
        log h_t = A_t + logcumsumexp(log b - A)_t

    Kept for study: it is slower than the others, loses precision as |A_t| grows with T, and has no
    logarithm for what is not positive. There is no `reset`, whose decay has no finite logarithm.

    Args:
        a: (B, T, D), positive.
        b: (B, T, D), positive.
        h0: (B, D), positive. None stands for zeros (and stays out of the sum).

    Returns:
        h: (B, T, D), the state after every step.
        h_T: (B, D), the last of them.

    Raises:
        ValueError: an input is not positive everywhere.

    Example:
        >>> half = torch.full((1, 4, 1), 0.5)
        >>> h, _ = log_space(half, torch.ones(1, 4, 1))
        >>> torch.allclose(h.flatten(), torch.tensor([1.0, 1.5, 1.75, 1.875]))
        True
    """
    for name, x in {"a": a, "b": b, "h0": h0}.items():
        if x is not None and not bool((x > 0).all()):
            raise ValueError(
                f"`{name}` must be > 0 everywhere: log space has no sign and no zero, "
                f"got a smallest value of {x.min().item():g}"
            )
    if b.shape[1] == 0:
        return torch.empty_like(b), _initial(b, h0)
    A = torch.log(a).cumsum(dim=1)
    terms = torch.log(b) - A
    if h0 is not None:
        # the initial state is one more term, at A_0 = 0
        terms = torch.cat([torch.log(h0)[:, None], terms], dim=1)
    log_h = torch.logcumsumexp(terms, dim=1)
    h = torch.exp(A + (log_h if h0 is None else log_h[:, 1:]))
    return h, h[:, -1]


def _join(first: _Steps, second: _Steps) -> _Steps:
    """One run of steps behind another."""
    reset = None
    if first.reset is not None and second.reset is not None:
        reset = torch.cat([first.reset, second.reset], dim=1)
    a = torch.cat([first.a, second.a], dim=1)
    return _Steps(a, torch.cat([first.b, second.b], dim=1), reset)


def _initial(b: Tensor, h0: Tensor | None) -> Tensor:
    return b.new_zeros(b.shape[0], b.shape[2]) if h0 is None else h0
