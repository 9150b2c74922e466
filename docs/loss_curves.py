"""The loss curves of `docs/precision.md`: the demo in float32, bfloat16 and float16.

    python docs/loss_curves.py --data runs/plays.txt

trains the recipe `demo` three times with one seed and prints the validation losses side by side;
its exit code is 1 if one is more than 1 % from float32's. What was stopped goes on where it was.
Needs the extra `train`.
"""

import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import tyro
from matplotlib.figure import Figure

from minrnn.recipes import RECIPES
from minrnn.runs import text as runs

NAMES = {"no": "float32", "bf16": "bfloat16", "fp16": "float16"}
COLOURS = {"float32": "#222222", "bfloat16": "#1f5a99", "float16": "#b85a00"}
# largest |loss - that of float32| / that of float32
LIMIT = 0.01


@dataclass(frozen=True)
class Curves:
    """Train the demo in each precision and compare the losses."""

    data: Path
    """The text: `minrnn data shakespeare FILE` writes that of `make demo`."""
    out: Path = Path("runs/precision")
    """The folder of the three runs."""
    steps: int = RECIPES["demo"].train.steps
    """Updates of the weights."""
    batch_size: int = RECIPES["demo"].train.batch_size
    """Sequences in one update."""
    context: int = RECIPES["demo"].context
    """Symbols in a sequence."""
    eval_every: int = RECIPES["demo"].train.eval_every
    """Steps between evaluations."""
    valid_limit: int = RECIPES["demo"].num_validated
    """Symbols that each evaluation reads."""
    picture: Path | None = None
    """A file for the picture of the curves."""


def main(config: Curves) -> int:
    """Train, print, draw."""
    losses = {name: trained(config, precision) for precision, name in NAMES.items()}
    wanted = losses["float32"]
    print("| step | float32 | bfloat16 | difference | float16 | difference |")
    print("| --- | --- | --- | --- | --- | --- |")
    for step, loss in wanted.items():
        cells = [f"{losses[x][step]:.4f} | {off(losses[x], wanted, step):+.2%}" for x in COLOURS]
        print(f"| {step} | {loss:.4f} | " + " | ".join(cells[1:]) + " |")
    worst = {x: max(abs(off(losses[x], wanted, step)) for step in wanted) for x in COLOURS}
    print(f"\nlargest: bfloat16 {worst['bfloat16']:.2%}, float16 {worst['float16']:.2%}")
    if config.picture is not None:
        draw(losses).savefig(config.picture, dpi=125, facecolor="white")
    return 0 if max(worst.values()) <= LIMIT else 1


def trained(config: Curves, precision: str) -> dict[int, float]:
    """The validation losses, by step, of the run in one precision."""
    demo, folder = RECIPES["demo"], config.out / NAMES[precision]
    sizes = {"steps": config.steps, "batch_size": config.batch_size}
    train = replace(demo.train, **sizes, eval_every=config.eval_every, precision=precision)
    asked = replace(demo, data=config.data, out=folder, train=train)
    asked = replace(asked, context=config.context, valid_limit=config.valid_limit)
    if not (folder / "config.json").is_file():
        runs.start(asked)
    found = runs.read(folder)
    if (found.train, found.context) != (train, config.context):
        raise ValueError(f"{folder} holds another training; choose another --out")
    if runs.go_on(folder).interrupted:
        sys.exit(130)
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line["valid_loss"] for line in lines if "valid_loss" in line}


def off(losses: dict[int, float], wanted: dict[int, float], step: int) -> float:
    """By how much a loss is above float32's, relative to it."""
    return losses[step] / wanted[step] - 1


def draw(losses: dict[str, dict[int, float]]) -> Figure:
    """The curves, and below them how far they are from float32's."""
    figure = Figure(figsize=(7, 5.5), layout="constrained")
    above, below = figure.subplots(2, sharex=True, height_ratios=(3, 2))
    steps = list(losses["float32"])
    for name, colour in COLOURS.items():
        above.plot(steps, list(losses[name].values()), color=colour, label=name)
        differences = [100 * off(losses[name], losses["float32"], step) for step in steps]
        below.plot(steps, differences, color=colour)
    for limit in (-100 * LIMIT, 100 * LIMIT):
        below.axhline(limit, color="#808080", linestyle=":")
    above.set_ylabel("validation loss, nats")
    above.legend(frameon=False)
    below.set_ylabel("above float32, %")
    below.set_xlabel("step")
    return figure


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Curves)))
