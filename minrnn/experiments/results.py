"""What an experiment leaves in its folder: figures as JSON, a table as Markdown, a picture."""

import json
import platform
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from minrnn.bench import measure
from minrnn.files import replacing, write_atomically

FIGURES, TABLE, PICTURE = "figures.json", "table.md", "picture.png"


@dataclass(frozen=True)
class TextTable:
    """A table as people read it."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()

    def markdown(self) -> str:
        """The table in Markdown, columns aligned."""
        widths = [max(map(len, column)) for column in zip(self.head, *self.rows, strict=True)]
        rule = ["-" * width for width in widths]
        lines = [
            "| " + " | ".join(map(str.ljust, row, widths)) + " |"
            for row in (self.head, rule, *self.rows)
        ]
        notes = [line for note in self.notes for line in ("", note)]
        return "\n".join([f"## {self.title}", "", *lines, *notes, ""])


def origin() -> dict[str, str | None]:
    """When, from what code and from what machine a figure comes."""
    date = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return {"date": date, "commit": measure.commit(), "processor": measure.processor()}


def with_earlier(
    out: Path, found: Sequence[Mapping[str, Any]], keys: Sequence[str]
) -> list[dict[str, Any]]:
    """Runs with their origin, and those that `out` has of runs whose folders are gone.

    Trainings of days are made on several machines, and their folders do not last. A run that is as
    it was keeps its origin.

    Args:
        out: the folder of the results.
        found: what is known of the runs whose folders are there.
        keys: what tells one run from another.

    Raises:
        ValueError: the figures in `out` are damaged.
    """
    earlier: dict[tuple[Any, ...], dict[str, Any]] = {}
    if (out / FIGURES).is_file():
        try:
            facts = json.loads((out / FIGURES).read_text(encoding="utf-8"))
            known = {"date": facts["date"], "commit": facts["commit"]}
            known["processor"] = facts["machine"]["processor"]
            earlier = {tuple(run[key] for key in keys): known | run for run in facts["runs"]}
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{out / FIGURES} is damaged: {error!r}") from error
    now, runs = origin(), []
    for run in found:
        # as JSON has it, where there are no tuples
        run = json.loads(json.dumps(run))
        before = earlier.pop(tuple(run[key] for key in keys), {})
        unchanged = all(before.get(key) == value for key, value in run.items())
        runs.append(before if unchanged else now | run)
    return sorted([*runs, *earlier.values()], key=lambda run: [run[key] for key in keys])


def publish(
    out: Path,
    command: str,
    figures: Mapping[str, Any],
    tables: Sequence[TextTable],
    picture: Figure,
) -> None:
    """Write an experiment's folder, made if it is not there.

    Args:
        out: the folder.
        command: what was typed.
        figures: the configuration and every measured number, for JSON.
        tables: what `table.md` holds.
        picture: drawn from the figures.
    """
    out.mkdir(parents=True, exist_ok=True)
    facts = origin() | {
        "command": command,
        "versions": measure.versions(("accelerate", "mambapy", "minGRU-pytorch")),
        "machine": measure.machine() | {"python": platform.python_version()},
    }
    facts |= dict(figures) | {"tables": [asdict(table) for table in tables]}
    content = json.dumps(facts, indent=1, allow_nan=False, default=str)
    write_atomically(out / FIGURES, (content + "\n").encode())
    text = "\n".join([f"    {command}", "", *(table.markdown() for table in tables)])
    write_atomically(out / TABLE, text.encode())
    with replacing(out / PICTURE) as file:
        picture.savefig(file, format="png", dpi=120)


def spread(values: Sequence[float], digits: int) -> str:
    """Mean and standard deviation over seeds; without the latter for a single one.

    Example:
        >>> spread([1.0, 2.0, 3.0], 2), spread([1.5], 1), spread([], 1)
        ('2.00 ± 1.00', '1.5', '-')
    """
    if not values:
        return "-"
    text = f"{statistics.mean(values):.{digits}f}"
    return f"{text} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else text
