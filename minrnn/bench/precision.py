"""How far is each algorithm from the reference in float64?

On the CPU, from fixed seeds. `docs/results.md` and `docs/precision.md` keep what it gave.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, bfloat16, float16, float32

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
    dtypes: tuple[torch.dtype, ...] = (float32,)


_ALL = (float32, bfloat16, float16)
SUBJECTS = {
    "sequential": _Subject(scans.sequential, "scan"),
    "hillis_steele": _Subject(scans.hillis_steele, "scan"),
    "blelloch": _Subject(scans.blelloch, "scan"),
    "log_space": _Subject(scans.log_space, "scan", _ALL),
    "mingru": _Subject(ops.mingru, "mingru", _ALL),
    "minlstm": _Subject(ops.minlstm, "minlstm", _ALL),
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
# float32 arithmetic and an output in half precision: half a unit in the last of its 8 or 11 bits.
# Of 2^-8 the quotient 2^-8 / (1 + 2^-8) of the worst rounding leaves 1.5e-5 for the arithmetic; of
# 2^-11 it leaves too little, so what float32 is allowed stands beside it.
ROUNDING = {bfloat16: 2.0**-8, float16: 2.0**-11 + 1.3e-5}


@dataclass(frozen=True)
class PrecisionRow:
    """One measurement: the largest |h - truth| / truth over all steps and channels."""

    algorithm: str
    dtype: torch.dtype
    T: int
    gate_mean: float
    error: float
    # infinite where none is set: log space in half precision, and means that are not in GATE_MEANS
    tolerance: float


def precision(
    quick: bool = False,
    *,
    lengths: Sequence[int] | None = None,
    gate_means: Sequence[float] = GATE_MEANS,
    algorithms: Sequence[str] = tuple(SUBJECTS),
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
        quick: measure up to T = 4,096 only, which takes seconds instead of a minute and a half.
        lengths: the T to measure; shorter ones are the beginning of the longest. None stands for
            `LENGTHS`.
        gate_means: the means to measure; a tolerance is known for those of `GATE_MEANS`.
        algorithms: among the four of `SCANS`, "mingru" and "minlstm" (the dispatched operators).

    Returns:
        A row for each algorithm, dtype, gate mean and T, in this order. float32 throughout; also
        bfloat16 and float16 for the operators and for log space. A NaN is an infinite error.

    Example:
        >>> [row] = precision(lengths=[256], gate_means=[0.0], algorithms=["blelloch"])
        >>> row.error <= row.tolerance < 1e-6
        True
    """
    if lengths is None:
        lengths = QUICK_LENGTHS if quick else LENGTHS
    noise = draw_noise(max(lengths))
    truths: dict[tuple[str, torch.dtype, float], Tensor] = {}
    rows = []
    for name in algorithms:
        run, recurrence, dtypes = SUBJECTS[name]
        for dtype in dtypes:
            for mean in gate_means:
                inputs = make_inputs(recurrence, noise, mean, dtype)
                key = recurrence, dtype, mean
                if key not in truths:
                    truths[key] = exact_states(recurrence, inputs)
                for T in lengths:
                    error = _error(run(*[x[:, :T] for x in inputs])[0], truths[key][:, :T])
                    tolerance = _tolerance(name, dtype, T, mean)
                    rows.append(PrecisionRow(name, dtype, T, mean, error, tolerance))
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
    print_table(["algorithm", "dtype", "T", "gate mean", "error", "tolerance"], cells)


def print_table(head: list[str], cells: list[list[str]]) -> None:
    """Print a Markdown table whose first two columns are words and the others numbers."""
    widths = [max(map(len, column)) for column in zip(head, *cells, strict=True)]
    for line in [head, ["-" * width for width in widths], *cells]:
        words = [word.ljust(width) for word, width in zip(line[:2], widths, strict=False)]
        numbers = [word.rjust(width) for word, width in zip(line[2:], widths[2:], strict=True)]
        print("| " + " | ".join(words + numbers) + " |")


def draw_noise(T: int) -> Tensor:
    """(3, 1, T, 8); time is drawn first, so that a longer draw begins with the shorter one."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(T, 3, 8, generator=generator).transpose(0, 1)[:, None]


def make_inputs(recurrence: str, noise: Tensor, mean: float, dtype: torch.dtype) -> list[Tensor]:
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


def exact_states(recurrence: str, inputs: Sequence[Tensor]) -> Tensor:
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


def _tolerance(algorithm: str, dtype: torch.dtype, T: int, mean: float) -> float:
    if dtype in ROUNDING:
        return math.inf if algorithm == "log_space" else ROUNDING[dtype]
    if mean not in GATE_MEANS:
        return math.inf
    floor, rate = _MEASURED[algorithm][GATE_MEANS.index(mean)]
    return HEADROOM * (floor + rate * T)
