"""How does the time of the operators grow with the length of the sequence?"""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from minrnn import ops
from minrnn.bench import measure, truth
from minrnn.bench.compare import HERE, Row, Table, shares
from minrnn.bench.measure import FORWARD_BYTES, Call, Timing
from minrnn.bench.scan import RECURRENCES

# one sequence of few channels: 256 MiB for each tensor of the longest
CHANNELS = 16
LENGTHS = tuple(2**n for n in range(8, 23))
QUICK_LENGTHS = LENGTHS[:11]
SECONDS, QUICK_SECONDS = 0.4, 0.1


def measured(quick: bool = False, device: torch.device = measure.CPU) -> Iterator[Table]:
    """A table for `scan`, `mingru` and `minlstm` forward, with a row for each length.

    Args:
        quick: up to T = 262,144, fewer rounds.
        device: where.
    """
    lengths = QUICK_LENGTHS if quick else LENGTHS
    memory = measure.tell_allocator(keep=True) if device.type == "cpu" else ""
    for recurrence in RECURRENCES:
        rows = _rows(recurrence, lengths, QUICK_SECONDS if quick else SECONDS, device)
        title = f"{recurrence} forward at B = 1, D = {CHANNELS}"
        yield Table(title, (), "ms", rows, memory)


def _rows(
    recurrence: str, lengths: tuple[int, ...], seconds: float, device: torch.device
) -> tuple[Row, ...]:
    """All lengths in one interleaved run, the shorter ones the beginning of the longest."""
    *gates, _ = truth.inputs(recurrence, (1, lengths[-1], CHANNELS), device)
    wanted = truth.values(recurrence, gates)
    errors: dict[int, float] = {}
    calls: dict[str, Call] = {}
    for T in lengths:
        cut = [x[:, :T] for x in gates]
        errors[T] = truth.error([_forward(recurrence, cut)], [wanted[:, :T]])
        if errors[T] <= truth.TOLERANCE:
            calls[str(T)] = Call(lambda cut=cut: _forward(recurrence, cut))
            calls[f"{HERE} {T}"] = Call(measure.triad(T * CHANNELS, device)[0])
    del wanted
    timings = measure.interleave(calls, seconds, measure.clock_of(device))
    return tuple(_row(recurrence, T, timings, errors[T]) for T in lengths)


def _row(recurrence: str, T: int, timings: dict[str, Timing], error: float) -> Row:
    name, size = f"T = {T:,}", T * CHANNELS
    if str(T) not in timings:
        return Row(name, T=T, error=error, note="wrong")
    pair = {name: timings[str(T)], HERE: timings[f"{HERE} {T}"]}
    num_bytes = {name: FORWARD_BYTES[recurrence] * size, HERE: FORWARD_BYTES["add"] * size}
    row = shares(pair, num_bytes)[name]
    per_element = 1e9 * pair[name].median / size
    return replace(row, T=T, per_element=per_element, ratio=None, error=error)


def _forward(recurrence: str, gates: list[Tensor]) -> Tensor:
    with torch.no_grad():
        return getattr(ops, recurrence)(*gates)[0]
