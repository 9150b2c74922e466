"""Check first, time then: from competitors to a table of rows."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from minrnn.bench import measure, truth
from minrnn.bench.measure import Call, Timing
from minrnn.bench.peers import Calls, MissingPeerError

STREAM = "STREAM triad"
HERE = "triad at this size"
ONE_THREAD = ", 1 thread"


@dataclass(frozen=True)
class Row:
    """One line of a table."""

    name: str
    T: int | None = None
    """the steps, where they differ from row to row"""
    value: float | None = None
    """the median, in the unit of the table; None where there is none to give"""
    low: float | None = None
    """the lower quartile"""
    high: float | None = None
    """the upper quartile"""
    per_element: float | None = None
    """nanoseconds for each of the B * T * D elements, where the row has its own T"""
    rounds: int = 0
    faults: float | None = None
    """page faults of one call, the median over the rounds"""
    ratio: float | None = None
    """value over ours"""
    share: float | None = None
    """bytes that must move / time / STREAM triad"""
    share_here: float | None = None
    """the same of a triad over arrays of this shape"""
    error: float | None = None
    """of h and all gradients, against float64: `truth.error`"""
    note: str = ""


@dataclass(frozen=True)
class Table:
    """The rows of one question at one shape; the first of them is ours."""

    title: str
    shape: tuple[int, ...]
    unit: str
    rows: tuple[Row, ...]
    memory: str = ""
    """what the allocator was told, where it was told anything"""


@dataclass(frozen=True)
class Entrant:
    """Who wants to be timed."""

    name: str
    load: Callable[[], Calls]
    answer: Callable[[], list[Tensor]]
    """[h, gradients] in float64"""
    load64: Callable[[], Calls] | None = None
    """a log-space form over the same inputs in float64, which shows that its formula is right"""
    note: str = ""


class Checked(NamedTuple):
    """An entrant after its check: without `calls` there is nothing to time, and `note` says why."""

    calls: Calls | None
    error: float | None
    note: str


def check(entrant: Entrant) -> Checked:
    """Run forward, and forward with backward, and hold both to the float64 answer.

    Whatever another package raises ends in the note, so that one of them cannot end the run.
    """
    try:
        calls = entrant.load()
        found = [*calls.read(calls.both()), *calls.read(calls.forward())]
        wide = None if entrant.load64 is None else entrant.load64()
        found64 = None if wide is None else wide.read(wide.both())
    except MissingPeerError as missing:
        return Checked(None, None, str(missing))
    except Exception as error:
        words = (str(error).splitlines() or [""])[0]
        return Checked(None, None, f"failed: {type(error).__name__}: {words[:120]}")
    wanted = entrant.answer()
    error = truth.error(found, [*wanted, wanted[0]])
    limit = truth.TOLERANCE if found64 is None else truth.LOG_SPACE_TOLERANCE
    if not error <= limit:
        return Checked(None, error, f"wrong: an error up to {limit:.0e} is let pass")
    if found64 is not None:
        error64 = truth.error(found64, wanted)
        if not error64 <= truth.TOLERANCE:
            return Checked(None, error64, "wrong, in float64 too")
    return Checked(calls, error, entrant.note)


def shares(timings: Mapping[str, Timing], num_bytes: Mapping[str, int]) -> dict[str, Row]:
    """Rows in milliseconds for each timing; the first is what the ratios refer to.

    Args:
        timings: seconds by name; `STREAM` and `HERE` among them make the shares.
        num_bytes: what must move, by name, where it is known.

    Example:
        >>> seconds = {"a": 2.0, "b": 8.0, STREAM: 1.0}
        >>> times = {name: Timing(s, s, s, 3) for name, s in seconds.items()}
        >>> rows = shares(times, {"a": 300, "b": 300, STREAM: 400})
        >>> rows["b"].ratio, rows["a"].share, rows["b"].share
        (4.0, 0.375, 0.09375)
    """
    ours = next(iter(timings.values())).median if timings else math.nan
    speeds = {n: num_bytes[n] / timings[n].median for n in (STREAM, HERE) if n in timings}
    rows = {}
    for name, time in timings.items():
        speed = num_bytes[name] / time.median if name in num_bytes else None
        of = {n: speed / speeds[n] if speed and n in speeds else None for n in (STREAM, HERE)}
        rows[name] = Row(
            name,
            value=1e3 * time.median,
            low=1e3 * time.low,
            high=1e3 * time.high,
            rounds=time.rounds,
            faults=time.faults,
            ratio=time.median / ours,
            share=of[STREAM],
            share_here=of[HERE],
        )
    return rows


def timed_rows(
    checked: Mapping[str, Checked],
    pick: Callable[[Calls], Call],
    yardsticks: Mapping[str, Call],
    num_bytes: Mapping[str, int],
    seconds: float,
    device: torch.device = measure.CPU,
) -> tuple[Row, ...]:
    """Time all that are right, and the yardsticks behind them, in one interleaved run.

    Args:
        checked: by name, ours first.
        pick: what of the calls to time.
        yardsticks: by name; they need no check.
        num_bytes: by name, as `shares` takes it.
        seconds: for each, as `measure.interleave` takes it.
        device: whose time counts.

    Returns:
        A row for each of both. Those that are not timed keep their note; if ours is among them,
        no ratio is given.
    """
    calls = {name: pick(c.calls) for name, c in checked.items() if c.calls is not None}
    timings = measure.interleave(calls | dict(yardsticks), seconds, measure.clock_of(device))
    rows = shares(timings, num_bytes)
    ours = next(iter(checked), "")
    found = []
    for name in (*checked, *yardsticks):
        row = rows.get(name, Row(name))
        if name in checked:
            row = _with(row, error=checked[name].error, note=checked[name].note)
        else:
            row = _with(row, note=_yardstick_note(name, timings, num_bytes))
        found.append(row if ours in rows else _with(row, ratio=None))
    return tuple(found)


def _yardstick_note(name: str, timings: Mapping[str, Timing], num_bytes: Mapping[str, int]) -> str:
    """Bytes per second; of a line with one thread, also what all of them gain over it."""
    time, threads = timings[name].median, torch.get_num_threads()
    notes = [f"{num_bytes[name] / time / 1e9:.1f} GB/s"] if name in num_bytes else []
    together = name.removesuffix(ONE_THREAD)
    if together != name and threads > 1:
        notes.append(f"x {time / timings[together].median:.2f} on {threads} threads")
    return ", ".join(notes)


def _with(row: Row, **changes: float | str | None) -> Row:
    return dataclasses.replace(row, **changes)  # pyright: ignore[reportArgumentType]


def all_right(tables: Sequence[Table]) -> bool:
    """True if ours, the first row of each table, has a value."""
    return all(table.rows[0].value is not None for table in tables)
