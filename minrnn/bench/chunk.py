"""What does the gradient of a whole long sequence take, in chunks and all at once?"""

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from minrnn import gradients
from minrnn.bench import memory, truth
from minrnn.bench.compare import Row, Table
from minrnn.bench.measure import Turn, summarize, tell_allocator
from minrnn.data.batch import Batch
from minrnn.losses import next_symbol
from minrnn.models import LanguageModel, ModelConfig

MODEL = ModelConfig(vocab_size=65, width=64, num_layers=2, dropout=0.0)
CHUNK = 1 << 12
LENGTHS, QUICK_LENGTHS = tuple(2**n for n in range(14, 21)), (2**12, 2**13)
# activations of more would not fit into 24 GB
WHOLE, QUICK_WHOLE = 1 << 18, 1 << 13
REPEATS, QUICK_REPEATS = 3, 1
_SCRIPT = "from minrnn.bench import chunk; chunk.report({T}, {chunk}, {threads})"
_TITLES = ("peak memory of a gradient of T steps, B = 1", "time of a step of the sequence, B = 1")


def measured(quick: bool = False) -> Iterator[Table]:
    """Tables of the peak memory and of the time for each step, over the length of the sequence.

    Args:
        quick: two short lengths, one process each.
    """
    chunk = CHUNK // 4 if quick else CHUNK
    lengths = QUICK_LENGTHS if quick else LENGTHS
    whole, repeats = (QUICK_WHOLE, QUICK_REPEATS) if quick else (WHOLE, REPEATS)
    error = gradient_error(lengths[0], chunk)
    forms = {f"chunks of {chunk:,}": (chunk, lengths)}
    forms["all at once"] = (0, tuple(filter(whole.__ge__, lengths)))
    # interleaved: each length of each form in turn, in a process of its own
    found: dict[tuple[str, int], list[tuple[float, float]]] = {}
    for _ in range(repeats):
        for name, (size, some) in forms.items():
            for T in some:
                found.setdefault((name, T), []).append(_told(T, size))
    for number, (title, unit) in enumerate(zip(_TITLES, ("MB", "us"), strict=True)):
        rows = []
        for (name, T), told in found.items():
            seen = summarize([Turn(one[number]) for one in told])
            row = Row(f"{name}, T = {T:,}", T=T, value=seen.median, low=seen.low, high=seen.high)
            row = replace(row, rounds=repeats)
            rows.append(replace(row, error=error if name != "all at once" else None))
        ours = rows[0].value
        rows = [replace(row, ratio=row.value / ours if ours else None) for row in rows]
        yield Table(title, (), unit, tuple(rows) if error <= truth.TOLERANCE else _wrong(rows))


def _wrong(rows: list[Row]) -> tuple[Row, ...]:
    return tuple(replace(row, value=None, ratio=None, note="wrong") for row in rows)


def _told(T: int, chunk: int) -> tuple[float, float]:
    """Megabytes and microseconds a step, from a process of its own."""
    found = memory.told(_SCRIPT.format(T=T, chunk=chunk, threads=torch.get_num_threads()))
    megabytes, microseconds = found
    return megabytes, microseconds


def report(T: int, chunk: int, threads: int) -> None:
    """Print megabytes and microseconds a step; run in a fresh process.

    The gradient of a short sequence goes first: what the first use of a library takes, and what
    the parameters' gradients take, is no part of the peak. The peak is of what is in use: the
    allocator gives freed blocks back, since by itself glibc keeps up to twice as much in the gaps
    between small blocks, another amount in each process. The time is that of a run with the pages
    kept from the run before it, so that neither form pays for new ones.
    """
    torch.set_num_threads(threads)
    tell_allocator(keep=False)
    model, warm, batch = build(), batch_of(1 << 10), batch_of(T)
    gradients.backward(model, next_symbol, warm, chunk=chunk)
    before = memory.resident(reset=True)
    gradients.backward(model, next_symbol, batch, chunk=chunk)
    peak = memory.resident(peak=True) - before
    tell_allocator(keep=True)
    gradients.backward(model, next_symbol, batch, chunk=chunk)
    start = time.perf_counter()
    gradients.backward(model, next_symbol, batch, chunk=chunk)
    seconds = time.perf_counter() - start
    print(json.dumps([peak / 1e6, 1e6 * seconds / T]))


def build() -> LanguageModel:
    """The model, of one seed."""
    torch.manual_seed(0)
    return LanguageModel(MODEL)


def batch_of(T: int) -> Batch:
    """One sequence of T made-up symbols, the same beginning for each T."""
    ids = torch.randint(MODEL.vocab_size, (1, T + 1), generator=torch.Generator().manual_seed(1))
    return Batch(ids[:, :-1], ids[:, 1:], torch.ones(1, T, dtype=torch.bool))


def gradient_error(T: int, chunk: int) -> float:
    """The largest error of any gradient in chunks, over its largest entry, against all at once."""
    model, batch = build(), batch_of(T)
    return truth.error(_gradients(model, batch, chunk), _gradients(model, batch, 0))


def _gradients(model: LanguageModel, batch: Batch, chunk: int) -> list[Tensor]:
    model.zero_grad()
    gradients.backward(model, next_symbol, batch, chunk=chunk)
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def draw(name: str, tables: Sequence[Table]) -> Figure:
    """Peak memory, and time for each step, over the length of the sequence."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    panels: Any = figure.subplots(1, len(tables))
    for axes, table in zip(panels, tables, strict=True):
        for form in dict.fromkeys(row.name.partition(", T")[0] for row in table.rows):
            rows = [row for row in table.rows if row.name.startswith(form) and row.value]
            axes.plot([row.T for row in rows], [row.value for row in rows], "o-", label=form)
        axes.set_xscale("log", base=2)
        axes.set_xlabel("T, steps of the sequence")
        axes.set_ylabel(table.unit)
        axes.set_title(table.title, fontsize=10)
        axes.grid(alpha=0.3)
    if tables and tables[0].unit == "MB":
        panels[0].set_yscale("log")
    panels[-1].set_ylim(bottom=0)
    panels[0].legend(frameon=False)
    figure.suptitle(f"minrnn bench {name}: gradients of whole sequences")
    return figure
