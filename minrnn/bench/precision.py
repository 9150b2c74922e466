"""Questions about precision and cost, each answered by a measurement that anyone can repeat.

    precision            how far is each algorithm from the reference in float64?
    bfloat16_precision   what do the operators lose on the average if all is bfloat16?
    cost                 how much arithmetic does an algorithm of `scans.py` take, how deep is it?

All run on the CPU from fixed seeds. `docs/results.md` keeps what they gave.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from minrnn import ops
from minrnn.ops import reference, scans

LENGTHS = (256, 4096, 65536)
QUICK_LENGTHS = (256, 4096)
# mean of the pre-activation that lets the input in: half open, open, all but shut (long memory)
GATE_MEANS = (0.0, 3.0, -7.0)
SCANS = ("sequential", "hillis_steele", "blelloch", "log_space")


class _Subject(NamedTuple):
    """What is measured: a function, the recurrence it computes, the dtypes it is asked for."""

    run: Callable[..., tuple[Tensor, Tensor]]
    recurrence: str
    dtypes: tuple[torch.dtype, ...] = (torch.float32,)


_BOTH = (torch.float32, torch.bfloat16)
_SUBJECTS = {
    "sequential": _Subject(scans.sequential, "scan"),
    "hillis_steele": _Subject(scans.hillis_steele, "scan"),
    "blelloch": _Subject(scans.blelloch, "scan"),
    "log_space": _Subject(scans.log_space, "scan", _BOTH),
    "mingru": _Subject(ops.mingru, "mingru", _BOTH),
    "minlstm": _Subject(ops.minlstm, "minlstm", _BOTH),
}

# The worst error measured in float32, at most floor + rate * T, as (floor, rate) for each of
# GATE_MEANS: torch 2.13.0 on x86-64, all of LENGTHS. Only log space has a rate.
_MEASURED = {
    "sequential": ((1.6e-7, 0.0), (1.1e-7, 0.0), (1.7e-6, 0.0)),
    "hillis_steele": ((2.5e-7, 0.0), (1.8e-7, 0.0), (1.6e-6, 0.0)),
    "blelloch": ((2.3e-7, 0.0), (1.4e-7, 0.0), (1.5e-6, 0.0)),
    "log_space": ((0.0, 9.8e-8), (0.0, 3.5e-7), (5.2e-7, 1.2e-10)),
    "mingru": ((3.2e-7, 0.0), (2.5e-7, 0.0), (3.3e-6, 0.0)),
    "minlstm": ((2.9e-7, 0.0), (3.1e-7, 0.0), (2.1e-6, 0.0)),
}
# tolerance = HEADROOM * (floor + rate * T): room for another exp and another order of rounding
HEADROOM = 4.0
# float32 arithmetic and a bfloat16 output: half a unit in the last of its 8 bits, no head-room;
# the quotient 2^-8 / (1 + 2^-8) of the worst rounding leaves 1.5e-5 for the arithmetic
BFLOAT16_ROUNDING = 2.0**-8
# From all but shut to all but open. Rounding inputs and output makes a mean error of 1.3e-3 to
# 1.6e-3; a state kept in bfloat16 would make 2e-2 at -7, where a step adds less than it resolves.
BFLOAT16_BIASES = (-7.0, -5.0, -3.0, 0.0, 3.0, 5.0, 7.0)
BFLOAT16_MEAN = 4e-3


@dataclass(frozen=True)
class PrecisionRow:
    """One measurement: the largest |h - truth| / truth over all steps and channels."""

    algorithm: str
    dtype: torch.dtype
    T: int
    gate_mean: float
    error: float
    # infinite where none is set: log space in bfloat16, and gate means that are not in GATE_MEANS
    tolerance: float


def precision(
    quick: bool = False,
    *,
    lengths: Sequence[int] | None = None,
    gate_means: Sequence[float] = GATE_MEANS,
    algorithms: Sequence[str] = tuple(_SUBJECTS),
) -> list[PrecisionRow]:
    """Measure each algorithm against the reference in float64.

        error = max |h_t - truth_t| / truth_t

    Pre-activations are normal, of variance 1, in one row of 8 channels from a fixed seed; the
    gate k of minGRU and the input gate i of minLSTM are moved by `gate_mean`, and the candidate is
    g, so that a, b and every state are positive and the quotient is sound. Inputs are rounded to
    the dtype first and the truth is that of the rounded inputs: what is measured is the algorithm.
    The four scans get a = sigmoid(-k) and b = sigmoid(k) * g(v).

    The truth is `minrnn.ops.reference` in pieces that hand the state on, which is bit for bit what
    it gives in one piece, for less time.

    Args:
        quick: measure up to T = 4,096 only, which takes seconds instead of a minute.
        lengths: the T to measure; shorter ones are the beginning of the longest. None stands for
            `LENGTHS`.
        gate_means: the means to measure; a tolerance is known for those of `GATE_MEANS`.
        algorithms: among the four of `SCANS`, "mingru" and "minlstm" (the dispatched operators).

    Returns:
        A row for each algorithm, dtype, gate mean and T, in this order. float32 throughout, and
        bfloat16 for the operators and for log space. A NaN anywhere is an infinite error.

    Example:
        >>> [row] = precision(lengths=[256], gate_means=[0.0], algorithms=["blelloch"])
        >>> row.error <= row.tolerance < 1e-6
        True
    """
    if lengths is None:
        lengths = QUICK_LENGTHS if quick else LENGTHS
    noise = _noise(max(lengths))
    truths: dict[tuple[str, torch.dtype, float], Tensor] = {}
    rows = []
    for name in algorithms:
        run, recurrence, dtypes = _SUBJECTS[name]
        for dtype in dtypes:
            for mean in gate_means:
                inputs = _inputs(recurrence, noise, mean, dtype)
                key = recurrence, dtype, mean
                if key not in truths:
                    truths[key] = _truth(recurrence, inputs)
                for T in lengths:
                    error = _error(run(*[x[:, :T] for x in inputs])[0], truths[key][:, :T])
                    tolerance = _tolerance(name, dtype, T, mean)
                    rows.append(PrecisionRow(name, dtype, T, mean, error, tolerance))
    return rows


@dataclass(frozen=True)
class Bfloat16Row:
    """One measurement: the mean of |h - truth| / truth over all steps and channels."""

    algorithm: str
    T: int
    gate_mean: float
    error: float
    """against the truth of the inputs in float32: what one loses in all"""
    arithmetic: float
    """against the truth of the inputs once rounded: what the operator adds"""


def bfloat16_precision(
    T: int = 4096, gate_means: Sequence[float] = BFLOAT16_BIASES
) -> list[Bfloat16Row]:
    """Measure the operators on bfloat16 against the reference on the float32 inputs.

    Inputs, gates and truth are those of `precision`; here the float32 inputs are the question, and
    rounding them to bfloat16 is part of the error.

    Args:
        T: the number of steps.
        gate_means: the means to measure.

    Returns:
        A row for `mingru` and `minlstm` at each mean; no error should reach `BFLOAT16_MEAN`. A NaN
        anywhere is an infinite error.

    Example:
        >>> max(row.error for row in bfloat16_precision(T=64)) < BFLOAT16_MEAN
        True
    """
    noise = _noise(T)
    rows = []
    for name in ("mingru", "minlstm"):
        for mean in gate_means:
            exact = _inputs(name, noise, mean, torch.float32)
            rounded = [x.bfloat16() for x in exact]
            h = _SUBJECTS[name].run(*rounded)[0]
            errors = [_mean_error(h, _truth(name, inputs)) for inputs in (exact, rounded)]
            rows.append(Bfloat16Row(name, T, mean, *errors))
    return rows


def print_precision(rows: Sequence[PrecisionRow]) -> None:
    """Print a Markdown table, a line for each row, its columns aligned.

    Args:
        rows: what `precision` returned.

    Example:
        >>> print_precision([PrecisionRow("blelloch", torch.float32, 256, 0.0, 1.4e-7, 9.2e-7)])
        | algorithm | dtype   |   T | gate mean |    error | tolerance |
        | --------- | ------- | --- | --------- | -------- | --------- |
        | blelloch  | float32 | 256 |         0 | 1.40e-07 |  9.20e-07 |
    """
    cells = [
        [
            row.algorithm,
            str(row.dtype).removeprefix("torch."),
            str(row.T),
            f"{row.gate_mean:g}",
            f"{row.error:.2e}",
            "none" if math.isinf(row.tolerance) else f"{row.tolerance:.2e}",
        ]
        for row in rows
    ]
    _print_table(["algorithm", "dtype", "T", "gate mean", "error", "tolerance"], cells)


def print_bfloat16_precision(rows: Sequence[Bfloat16Row]) -> None:
    """Print a Markdown table like that of `print_precision`.

    Args:
        rows: what `bfloat16_precision` returned.

    Example:
        >>> print_bfloat16_precision([Bfloat16Row("mingru", 256, -7.0, 1.5e-3, 1.4e-3)])
        | algorithm | dtype    |   T | gate mean | mean error | arithmetic | tolerance |
        | --------- | -------- | --- | --------- | ---------- | ---------- | --------- |
        | mingru    | bfloat16 | 256 |        -7 |   1.50e-03 |   1.40e-03 |  4.00e-03 |
    """
    cells = [
        [
            row.algorithm,
            "bfloat16",
            str(row.T),
            f"{row.gate_mean:g}",
            *(f"{x:.2e}" for x in (row.error, row.arithmetic, BFLOAT16_MEAN)),
        ]
        for row in rows
    ]
    head = ["algorithm", "dtype", "T", "gate mean", "mean error", "arithmetic", "tolerance"]
    _print_table(head, cells)


def _print_table(head: list[str], cells: list[list[str]]) -> None:
    """The first two columns are words, the others numbers."""
    widths = [max(map(len, column)) for column in zip(head, *cells, strict=True)]
    for line in [head, ["-" * width for width in widths], *cells]:
        words = [word.ljust(width) for word, width in zip(line[:2], widths, strict=False)]
        numbers = [word.rjust(width) for word, width in zip(line[2:], widths[2:], strict=True)]
        print("| " + " | ".join(words + numbers) + " |")


def _noise(T: int) -> Tensor:
    """(3, 1, T, 8); time is drawn first, so that a longer draw begins with the shorter one."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(T, 3, 8, generator=generator).transpose(0, 1)[:, None]


def _inputs(recurrence: str, noise: Tensor, mean: float, dtype: torch.dtype) -> list[Tensor]:
    """What the recurrence takes, each (1, T, 8), rounded to `dtype`."""
    gate, f, v = noise[0] + mean, noise[1], noise[2]
    if recurrence == "minlstm":
        inputs = [f, gate, v]
    elif recurrence == "mingru":
        inputs = [gate, v]
    else:
        g = torch.where(v >= 0, v + 0.5, torch.sigmoid(v))
        inputs = [torch.sigmoid(-gate), torch.sigmoid(gate) * g]
    return [x.to(dtype) for x in inputs]


def _truth(recurrence: str, inputs: Sequence[Tensor]) -> Tensor:
    """The reference's h in float64; its cost per step grows with the length of a piece."""
    run = getattr(reference, recurrence)
    pieces = [x.double().split(256, dim=1) for x in inputs]
    state, h = None, []
    for piece in zip(*pieces, strict=True):
        h_piece, state = run(*piece, state)
        h.append(h_piece)
    return torch.cat(h, dim=1)


def _error(h: Tensor, truth: Tensor) -> float:
    error = ((h.double() - truth).abs() / truth).max().item()
    return math.inf if math.isnan(error) else error


def _mean_error(h: Tensor, truth: Tensor) -> float:
    error = ((h.double() - truth).abs() / truth).mean().item()
    return math.inf if math.isnan(error) else error


def _tolerance(algorithm: str, dtype: torch.dtype, T: int, mean: float) -> float:
    if dtype == torch.bfloat16:
        return math.inf if algorithm == "log_space" else BFLOAT16_ROUNDING
    if mean not in GATE_MEANS:
        return math.inf
    floor, rate = _MEASURED[algorithm][GATE_MEANS.index(mean)]
    return HEADROOM * (floor + rate * T)


# Cost: an operation of torch is worth its number of results, one step deep; moving data is free.

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
        h, _ = _SUBJECTS[algorithm].run(a, b)
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
