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
    """When, and from what code, a figure comes."""
    date = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return {"date": date, "commit": measure.commit()}


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
