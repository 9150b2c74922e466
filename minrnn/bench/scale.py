"""What do many processes take for a training step? Measured here, calculated for GPUs."""

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from matplotlib.figure import Figure

from minrnn.bench import plan, scale_ranks
from minrnn.bench.compare import Row, Table
from minrnn.bench.measure import Turn, summarize
from minrnn.bench.plan import Link, Machine, Model, Split
from minrnn.bench.scale_ranks import Told
from minrnn.models import ModelConfig

MODEL = ModelConfig(vocab_size=256, width=256, num_layers=4, dropout=0.0)
QUICK_MODEL = ModelConfig(vocab_size=256, width=64, num_layers=2, dropout=0.0)
BATCH, T = 4, 1024
SPLITS = (
    Split(),
    Split(chunk=256),
    Split(data=2),
    Split(data=2, sharded=True),
    Split(time=2),
    Split(data=4),
    Split(data=4, sharded=True),
    Split(time=4),
    Split(data=2, time=2),
)
QUICK_SPLITS = (Split(), Split(data=2), Split(time=2))
REPEATS, QUICK_REPEATS = 3, 1
# of the loss after some steps: processes add up in other orders
TOLERANCE = 1e-4

# what is calculated with: data sheets, of which 0.4 of the matrix rate and 0.8 of each bandwidth
# are taken to be attained; 8 GPUs in a node by NVLink, nodes by 400 Gb/s for each GPU
H100 = Machine(
    "H100 SXM, bfloat16",
    flops=0.4 * 989e12,
    bandwidth=0.8 * 3.35e12,
    memory=80e9,
    near=Link(0.8 * 450e9, 10e-6),
    far=Link(0.8 * 50e9, 25e-6),
    node=8,
    number=2,
    overlaps=True,
)
GPUS = (8, 64, 1024)
_LARGE: dict[str, Any] = {"vocab_size": 32768, "dropout": 0.0}
SMALL, BIG = (ModelConfig(width=w, num_layers=n, **_LARGE) for w, n in ((1024, 24), (4096, 32)))
# sequences of a batch, and steps of each: 4 million symbols
BATCHES = ((1024, 4096), (4, 1 << 20))


def measured(quick: bool = False) -> Iterator[Table]:
    """Tables of steps by 1, 2 and 4 processes, and of what is calculated for many GPUs.

    Args:
        quick: a small model, fewer splits, one start each.
    """
    config = QUICK_MODEL if quick else MODEL
    found: dict[Split, list[Told]] = {}
    for _ in range(QUICK_REPEATS if quick else REPEATS):
        for split in QUICK_SPLITS if quick else SPLITS:
            found.setdefault(split, []).append(scale_ranks.told(split, config, BATCH, T))
    size = f"width {config.width}, {config.num_layers} layers, {BATCH} x {T:,} symbols"
    rows = _measured_rows(found)
    yield Table(f"a training step: {size}, a thread for each process", (), "ms", rows)
    model = plan.counted("here", config)
    yield Table(
        "calculated from one process and the rates of each start", (), "ms", _here(model, found)
    )
    for config in (SMALL, BIG):
        model = plan.counted("a model", config)
        for batch, steps in BATCHES:
            size = f"{model.parameters / 1e9:.2g} B parameters, {batch:,} x {steps:,} symbols"
            rows = tuple(_calculated(model, batch, steps, count) for count in GPUS)
            yield Table(f"calculated, not measured, {H100.name}: {size}", (), "s", rows)


def _measured_rows(found: dict[Split, list[Told]]) -> tuple[Row, ...]:
    rows, alone = [], found[Split()]
    ours = 1e3 * statistics.median(one.seconds for one in alone)
    for split, some in found.items():
        error = max(abs(one.loss - alone[0].loss) / alone[0].loss for one in some)
        if not error <= TOLERANCE:
            rows.append(Row(named(split), error=error, note="wrong"))
            continue
        seen = summarize([Turn(1e3 * one.seconds) for one in some])
        row = Row(named(split), value=seen.median, low=seen.low, high=seen.high, error=error)
        rows.append(replace(row, rounds=len(some), ratio=seen.median / ours))
    return tuple(rows)


def _here(model: Model, found: dict[Split, list[Told]]) -> tuple[Row, ...]:
    """The same by the formulas."""
    # what one process reaches of the rates that a matrix product and an addition have alone
    alone = found[Split()]
    reached = plan.cost(model, BATCH, T, Split(), _machine(alone, 1.0)).seconds / _seconds(alone)
    rows = []
    for split, some in found.items():
        cost = plan.cost(model, BATCH, T, split, _machine(some, reached))
        note = f"{cost.seconds / _seconds(some):.2f} of the time measured"
        if split.count > 1:
            exchange = 1e3 * (cost.states + cost.gradients)
            note += f"; {exchange:.1f} for exchange, {1e3 * cost.update:.1f} for the update"
        rows.append(Row(named(split), value=1e3 * cost.seconds, note=note))
    first = rows[0]
    words = f"set to the time measured: {reached:.2f} of the rates are reached"
    return (replace(first, note=words), *rows[1:])


def _seconds(some: list[Told]) -> float:
    return statistics.median(one.seconds for one in some)


def _machine(some: list[Told], reached: float) -> Machine:
    """This machine, by that part of the rates that were measured beside the steps."""
    flops, bandwidth, link, latency = (
        statistics.median(x) for x in list(zip(*some, strict=True))[2:]
    )
    near = Link(link, latency)
    # all processes are near, and gloo's exchange takes the same cores as the model
    rates = reached * flops, reached * bandwidth
    return Machine("here", *rates, math.inf, near, near, 1 << 30, 4, overlaps=False)


def _calculated(model: Model, batch: int, steps: int, count: int) -> Row:
    name = f"{count:,} GPUs"
    try:
        split, cost = plan.best(model, batch, steps, count, H100)
    except ValueError as error:
        return Row(name, note=str(error))
    used = model.flops * batch * steps / count / H100.flops / cost.seconds
    words = named(split).partition(": ")[2]
    note = f"{words}; {cost.memory / 1e9:.0f} GB each; matrix products {used:.0%} of the time"
    return Row(name, value=cost.seconds, note=f"{note}, exchange {cost.waits / cost.seconds:.0%}")


def named(split: Split) -> str:
    """A split in words.

    Example:
        >>> named(Split(data=2, time=4, sharded=True))
        '8 processes: 2 x batch, 4 x time, sharded'
    """
    parts = [f"{split.data} x batch"] if split.data > 1 else []
    parts += [f"{split.time} x time"] if split.time > 1 else []
    parts += ["sharded"] if split.sharded else []
    parts += [f"chunks of {split.chunk:,}"] if split.chunk else []
    parts += [f"in {split.accumulation} parts"] if split.accumulation > 1 else []
    processes = f"{split.count:,} process" + ("es" if split.count > 1 else "")
    return f"{processes}: {', '.join(parts)}" if parts else processes


def draw(name: str, tables: Sequence[Table]) -> Figure:
    """Measured beside calculated here, and the calculated time over the number of GPUs."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    panels: Any = figure.subplots(1, 2)
    here, many = panels
    for offset, table, label in ((-0.2, tables[0], "measured"), (0.2, tables[1], "calculated")):
        places = [n + offset for n in range(len(table.rows))]
        here.barh(places, [row.value or 0.0 for row in table.rows], 0.38, label=label)
    here.set_yticks(range(len(tables[0].rows)), [row.name for row in tables[0].rows], fontsize=8)
    here.invert_yaxis()
    here.set_xlabel("ms for a training step, two cores")
    here.legend(frameon=False)
    for table in tables[2:]:
        points = [(int(row.name.split()[0].replace(",", "")), row.value) for row in table.rows]
        points = [point for point in points if point[1]]
        label = table.title.partition(": ")[2]
        many.plot(*zip(*points, strict=True), "o-", label=label)
    many.set(xscale="log", yscale="log", xlabel="GPUs (H100), calculated", ylabel="s for a step")
    many.set_xticks(GPUS, [f"{count:,}" for count in GPUS])
    many.legend(frameon=False, fontsize=8)
    many.grid(alpha=0.3)
    figure.suptitle(f"minrnn bench {name}: training steps over many processes")
    return figure
