"""What a bench leaves: a table on the terminal, and a folder with JSON and a picture if asked."""

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from minrnn.bench import measure, peers
from minrnn.bench.compare import STREAM, Row, Table
from minrnn.files import replacing, write_atomically
from minrnn.info import kernels


def publish(
    name: str,
    tables: Iterable[Table],
    quick: bool,
    out: Path | None,
    draw: Callable[[str, Sequence[Table]], Figure],
    device: torch.device = measure.CPU,
) -> list[Table]:
    """Print each table as it comes, into `out`/bench-`name`.json too; then write the picture.

    Args:
        name: of the bench, as on the command line.
        tables: measured while they are asked for.
        quick: was it the short form?
        out: the folder, made if it is not there. None writes nothing.
        draw: makes the picture, of `name` and all tables.
        device: where; of a GPU's files the name says so, bench-`name`-cuda.

    Returns:
        The tables.
    """
    facts = describe(name, quick, device)
    stem = f"bench-{name}" + ("" if device.type == "cpu" else f"-{device.type}")
    print("\n".join(heading(facts)))
    done = []
    for table in tables:
        print("\n" + "\n".join(lines(table)), flush=True)
        done.append(table)
        if out is not None:
            # now: what was measured stays if the run is ended
            out.mkdir(parents=True, exist_ok=True)
            content = facts | {"tables": [_plain(one) for one in done]}
            text = json.dumps(content, indent=1, allow_nan=False) + "\n"
            write_atomically(out / f"{stem}.json", text.encode())
    if out is not None:
        with replacing(out / f"{stem}.png") as file:
            draw(name, done).savefig(file, format="png", dpi=110)
        print(f"\n{out / f'{stem}.json'}, {out / f'{stem}.png'}")
    return done


def _plain(table: Table) -> dict[str, Any]:
    """The table for JSON, which has no infinity: the error of an answer with NaN is a word."""
    plain = asdict(table)
    for row in plain["rows"]:
        if row["error"] is not None and not math.isfinite(row["error"]):
            row["error"] = "infinite"
    return plain


def describe(name: str, quick: bool, device: torch.device = measure.CPU) -> dict[str, Any]:
    """All but the rows: command, machine, versions, commit, kernels, date."""
    options = " --quick" if quick else ""
    options += "" if device.type == "cpu" else f" --device {device}"
    return {
        "command": f"minrnn bench {name}{options}",
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": measure.commit(),
        "versions": measure.versions(tuple(peers.REQUIREMENTS)),
        "kernels": kernels()[device.type.upper()],
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "machine": measure.machine(device),
    }


def heading(facts: dict[str, Any]) -> list[str]:
    """What the table's reader must know first."""
    machine, versions = facts["machine"], facts["versions"]
    served = ", ".join(sorted(set(facts["kernels"].values())))
    cache = f"{machine['last_level_cache'] >> 20} MiB last-level cache"
    busy = machine["busy"]
    where = f"{machine['gpu']}; " if "gpu" in machine else ""
    where += f"{machine['processor']}, {machine['cores']} cores"
    found = [
        f"{facts['command']}   commit {facts['commit'] or 'unknown'}",
        f"{where}, {cache}, {machine['threads']} threads",
        ", ".join(f"{name} {version}" for name, version in versions.items()),
        f"kernels: {served}; memory from {machine['allocator']}"
        + "".join(f", {name}={value}" for name, value in machine["settings"].items()),
    ]
    if busy is not None and busy > 0.2:
        found.append(f"the machine is busy ({busy:.1f} cores): ratios suffer, times more so")
    return found


def lines(table: Table) -> list[str]:
    """A title, a head, and a line for each row; columns that no row fills are left out."""
    sizes = f" at (B, T, D) = {table.shape}" if table.shape else ""
    memory = f"; {table.memory}" if table.memory else ""
    head = ["", table.unit, "quartiles", "ns/element", "/ ours", "of triad", "of it here"]
    head += ["faults", "error"]
    rows = [head, *[_cells(row) for row in table.rows]]
    kept = [n for n in range(len(head)) if n < 2 or any(cells[n] for cells in rows[1:])]
    widths = {n: max(len(cells[n]) for cells in rows) for n in kept}
    found = [table.title + sizes + memory]
    for cells, row in zip(rows, [None, *table.rows], strict=True):
        words = [cells[0].ljust(widths[0]), *(cells[n].rjust(widths[n]) for n in kept[1:])]
        note = row.note if row is not None else ""
        if note and row is not None and row.value is None:
            # nothing was timed: what stands there instead is the reason
            words = [words[0], note]
            note = "" if row.error is None else f"error {row.error:.1e}"
        found.append(("  " + "  ".join([*words, note])).rstrip())
    return found


def _cells(row: Row) -> list[str]:
    return [
        row.name,
        "" if row.value is None else _short(row.value),
        "" if row.low is None or row.high is None else f"{_short(row.low)} - {_short(row.high)}",
        "" if row.per_element is None else _short(row.per_element),
        "" if row.ratio is None else f"{row.ratio:.2f}",
        "" if row.share is None else f"{row.share:.2f}",
        "" if row.share_here is None else f"{row.share_here:.2f}",
        "" if row.faults is None else f"{row.faults:,.0f}",
        "" if row.error is None or row.value is None else f"{row.error:.1e}",
    ]


def _short(x: float) -> str:
    """Three digits that count.

    Example:
        >>> _short(0.012345), _short(1.2345), _short(123.45), _short(12345.6)
        ('0.0123', '1.23', '123', '12346')
    """
    return f"{x:.0f}" if x >= 100 else f"{x:#.3g}"


def draw_ratios(name: str, tables: Sequence[Table]) -> Figure:
    """A panel for each title: what each competitor takes over ours, a mark for each shape."""
    titles = list(dict.fromkeys(table.title for table in tables))
    columns = min(2, max(1, len(titles)))
    rows = -(-len(titles) // columns) or 1
    figure = Figure(figsize=(7 * columns, 3.8 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes, title in zip(panels, titles, strict=False):
        _draw_panel(axes, [table for table in tables if table.title == title])
    for axes in panels[len(titles) :]:
        axes.set_axis_off()
    figure.suptitle(f"minrnn bench {name}: median over ours; right of the line is worse")
    return figure


def _draw_panel(axes: Axes, tables: Sequence[Table]) -> None:
    # the large triad has another size than the rest
    rows = [row for table in tables for row in table.rows if row.ratio is not None]
    names = list(dict.fromkeys(row.name for row in rows if row.name != STREAM))
    for number, table in enumerate(tables):
        points = [
            (r.ratio, names.index(r.name)) for r in table.rows if r in rows and r.name in names
        ]
        if points:
            x, y = zip(*points, strict=True)
            style = {"linestyle": "none", "marker": "osD^v<>P"[number % 8], "alpha": 0.8}
            axes.plot(x, y, label=str(table.shape), color=f"C{number % 10}", **style)
    axes.axvline(1, color="0.5", linewidth=1)
    axes.set_title(tables[0].title, loc="left", fontsize=11)
    axes.set_xscale("log")
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel(f"{'memory' if tables[0].unit == 'MB' else 'time'} over ours")
    axes.grid(alpha=0.3)
    if rows:
        axes.legend(frameon=False, fontsize=7, title="(B, T, D)", title_fontsize=7)


def draw_times(name: str, tables: Sequence[Table]) -> Figure:
    """Time over T, both logarithmic, a line for each table, and one in proportion to T."""
    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.subplots()
    for number, table in enumerate(tables):
        points = [(row.T, row.value) for row in table.rows if row.T and row.value is not None]
        if points:
            T, times = zip(*points, strict=True)
            axes.plot(T, times, marker="osD^v<>P"[number % 8], markersize=4, label=table.title)
            if number == 0:
                straight = [times[-1] * t / T[-1] for t in T]
                style = {"color": "0.5", "linestyle": "--", "linewidth": 1}
                axes.plot(T, straight, label="slope 1: in proportion to T", **style)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("T, steps")
    axes.set_ylabel("time in ms")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=9)
    figure.suptitle(f"minrnn bench {name}: median time over the length of the sequence")
    return figure
