"""How much arithmetic does an algorithm of `scans.py` take, and how deep is it?

Counted while it runs; `docs/equations.md`, section 8, has the formulas.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from minrnn.bench.precision import SCANS, SUBJECTS

# an operation of torch is worth its number of results, one step deep; moving data is free
_ARITHMETIC = {"add", "sub", "mul", "addcmul", "log", "exp"}
_CUMULATIVE = {"cumsum", "logcumsumexp"}
_FREE = {
    "alias",
    "cat",
    "clone",
    "empty_like",
    "new_zeros",
    "select",
    "slice",
    "stack",
    "unsqueeze",
    "view",
}
# a check of the arguments, not part of the scan
_CHECKS = {"all", "gt", "_local_scalar_dense"}


class Cost(NamedTuple):
    """What one scan over T steps of one channel takes."""

    work: int
    """results of arithmetic operations; a multiply-add is one operation"""
    depth: int
    """the longest chain of operations of which each needs the result of the one before"""


def cost(algorithm: str, T: int) -> Cost:
    """Count the arithmetic of one of the four scans while it runs.

    Every operation that torch dispatches is seen. A sum, product, multiply-add, logarithm or
    exponential costs one for each element of its result and is one step deeper than its deepest
    argument; views, cat, stack and clone cost nothing. `cumsum` and `logcumsumexp` hide a loop:
    each is charged as one prefix scan over its n elements in the manner of `scans.blelloch`, with
    an operator of one operation: work 3 n - 2, depth 2 log2 n. An operation without a price is an
    error, so nothing is missed in silence.

    Args:
        algorithm: a name of `SCANS`.
        T: the number of steps, at least 1.

    Returns:
        The work of the whole run and the depth of its h.

    Raises:
        ValueError: `algorithm` is unknown, or dispatched an operation that has no price.

    Example:
        >>> cost("sequential", 8), cost("blelloch", 8)
        (Cost(work=8, depth=8), Cost(work=29, depth=6))
    """
    if algorithm not in SCANS:
        raise ValueError(f"`algorithm` must be one of {', '.join(SCANS)}, got {algorithm!r}")
    a, b = torch.full((1, T, 1), 0.5), torch.ones(1, T, 1)
    with _Counter() as counter:
        h, _ = SUBJECTS[algorithm].run(a, b)
    return Cost(counter.work, counter.depth_of(h))


class _Counter(TorchDispatchMode):
    """Adds up work, and keeps for each tensor the depth of the arithmetic behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.work = 0
        # the tensor is kept beside its depth, so that no other takes over its id
        self._depths: dict[int, tuple[int, Tensor]] = {}

    def depth_of(self, x: Tensor) -> int:
        """The depth of what has been seen, 0 for an input."""
        return self._depths[id(x)][0] if id(x) in self._depths else 0

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        given = [self.depth_of(x) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        for x in tree_leaves(out):
            if isinstance(x, Tensor):
                work, depth = _price(name, x)
                self.work += work
                self._depths[id(x)] = max(given, default=0) + depth, x
        return out


def _price(name: str, out: Tensor) -> Cost:
    if name in _ARITHMETIC:
        return Cost(out.numel(), 1)
    if name in _CUMULATIVE:
        n = out.numel()
        return Cost(3 * n - 2, 2 * math.ceil(math.log2(n)))
    if name in _FREE | _CHECKS:
        return Cost(0, 0)
    raise ValueError(f"no price is known for the operation {name!r}")
