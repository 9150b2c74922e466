"""Pictures of a run."""

import json
from pathlib import Path

from matplotlib.figure import Figure

from minrnn.files import replacing


def draw_loss(folder: Path) -> Path | None:
    """Draw the losses in `metrics.jsonl` over the steps, as `loss.png` in the run folder.

    Returns:
        The picture; None if there is no loss yet, e.g. of a training that was stopped at once.
    """
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    if not any("loss" in row or "valid_loss" in row for row in rows):
        return None
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    for key, label, style in (
        ("loss", "training", {"linewidth": 1, "color": "tab:gray"}),
        ("valid_loss", "validation", {"marker": "o", "markersize": 3, "color": "tab:blue"}),
    ):
        points = [(row["step"], row[key]) for row in rows if key in row]
        if points:
            axes.plot(*zip(*points, strict=True), label=label, **style)
    measured = [row for row in rows if "valid_loss" in row]
    if measured:
        best = min(measured, key=lambda row: row["valid_loss"])
        axes.annotate(
            f"best {best['valid_loss']:.3f} at step {best['step']}",
            (best["step"], best["valid_loss"]),
            xytext=(-8, 24),
            textcoords="offset points",
            horizontalalignment="right",
            arrowprops={"arrowstyle": "-", "color": "tab:blue"},
            color="tab:blue",
        )
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats per symbol)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    with replacing(folder / "loss.png") as file:
        figure.savefig(file, format="png", dpi=120)
    return folder / "loss.png"
