"""Language models on tiny Shakespeare: the paper's loss curves and their minima."""

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from matplotlib.figure import Figure

from minrnn import checkpoint
from minrnn.configs import check_fields
from minrnn.data.shakespeare import tiny_shakespeare
from minrnn.experiments.results import TextTable, publish, spread, with_earlier
from minrnn.models import LanguageModel, ModelConfig
from minrnn.recipes import RECIPES
from minrnn.runs import text as text_runs

Name = Literal["mingru", "minlstm", "mamba", "attention", "lstm", "gru"]


class Entry(NamedTuple):
    """A model, and what Feng et al. 2024 (arXiv:2410.01201, section 4.3) report of it."""

    title: str
    model: ModelConfig
    best_loss: float | None = None
    """nats per character of the test part, the lowest of the curve"""
    best_step: int | None = None


_PAPER = RECIPES["shakespeare"].model
ENTRIES: dict[Name, Entry] = {
    "mingru": Entry("minGRU", _PAPER, 1.548, 575),
    "minlstm": Entry("minLSTM", replace(_PAPER, mixer="minlstm"), 1.555, 625),
    # Mamba has a convolution of its own, a Transformer none
    "mamba": Entry("Mamba", replace(_PAPER, mixer="mamba", conv_width=0), 1.575, 400),
    "attention": Entry(
        "Transformer", replace(_PAPER, mixer="attention", conv_width=0), 1.547, 2000
    ),
    # not in the paper: about as many parameters as its minGRU
    "lstm": Entry("nn.LSTM", replace(_PAPER, mixer="lstm", conv_width=0, mlp_ratio=3, expansion=1)),
    "gru": Entry("nn.GRU", replace(_PAPER, mixer="gru", conv_width=0, expansion=1)),
}


@dataclass(frozen=True)
class ShakespeareConfig:
    """The settings of the paper's language models, on tiny Shakespeare.

    Raises:
        ValueError: a field is out of range.
        TypeError: a field has another type.
    """

    data: Path | None = None
    """The file of tiny Shakespeare; None downloads it."""
    model: Literal["all", "mingru", "minlstm", "mamba", "attention", "lstm", "gru"] = "all"
    """Which to train; the table has all that were trained so far."""
    seeds: int = 1
    """Trainings of each, with seeds 0, 1, ..."""
    steps: int = 5000
    """Updates at most; the schedule of the learning rate goes by it."""
    patience: int = 16
    """Evaluations, 25 steps apart, without a better one that end a training; 0 for none."""
    precision: Literal["no", "bf16"] = "no"
    """Mixed precision; "no" is float32. The recurrent state is float32 always."""
    runs: Path = Path("runs/shakespeare")
    """Where the run folders are; what is there already goes on or is done."""
    out: Path = Path("results/shakespeare")
    """Where figures.json, table.md and picture.png go."""

    def __post_init__(self) -> None:
        check_fields(self)
        for name, least in (("seeds", 1), ("steps", 1), ("patience", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"`{name}` must be >= {least}, got {getattr(self, name)}")


class Run(NamedTuple):
    """What is known of one training."""

    name: Name
    seed: int
    parameters: int
    precision: str
    curve: list[tuple[int, float]]
    """(step, loss of the test part), as far as it went"""


def reproduce(config: ShakespeareConfig, say: Callable[[str], None]) -> bool:
    """Train what is not trained yet, then write the table.

    Args:
        config: what to train.
        say: called with a line before each training.

    Returns:
        False if a training was stopped; the same call goes on.

    Raises:
        FileNotFoundError: there is no such file, or it cannot be downloaded.
        ValueError: the file is not tiny Shakespeare; both sums are shown.
    """
    content = tiny_shakespeare(config.data)
    config.runs.mkdir(parents=True, exist_ok=True)
    text = config.runs / "tinyshakespeare.txt"
    if not text.is_file() or text.read_bytes() != content:
        text.write_bytes(content)
    finished = True
    for seed in range(config.seeds):
        for name in ENTRIES if config.model == "all" else (config.model,):
            folder = config.runs / f"{name}-{seed}"
            say(f"{ENTRIES[name].title}, seed {seed}: {folder}")
            if not (folder / "config.json").is_file():
                _start(name, seed, folder, text, config)
            finished = not text_runs.go_on(folder).interrupted
            write(config)
            if not finished:
                return False
    return finished


def _start(name: Name, seed: int, folder: Path, text: Path, config: ShakespeareConfig) -> None:
    recipe = RECIPES["shakespeare"]
    given = {name: getattr(config, name) for name in ("steps", "patience", "precision")}
    train = replace(recipe.train, seed=seed, **given)
    model = ENTRIES[name].model
    # the whole validation part, as the paper, whatever the number of steps between evaluations
    asked = replace(recipe, data=text, out=folder, model=model, train=train, valid_limit=0)
    text_runs.start(asked)


def write(config: ShakespeareConfig) -> None:
    """Write the folder of results from all run folders there are."""
    done = [run._asdict() for run in _runs(config.runs)]
    runs = with_earlier(config.out, done, ("name", "seed"))
    found = [Run(**{field: run[field] for field in Run._fields}) for run in runs]
    facts = {"config": asdict(config), "runs": runs}
    publish(config.out, "minrnn reproduce shakespeare", facts, [table(found)], draw(found))


def _runs(folder: Path) -> Iterator[Run]:
    for name in ENTRIES:
        for path in sorted(folder.glob(f"{name}-*"), key=lambda path: int(path.name.split("-")[1])):
            if (path / "metrics.jsonl").is_file():
                rows = map(json.loads, (path / "metrics.jsonl").read_text().splitlines())
                curve = [(row["step"], row["valid_loss"]) for row in rows if "valid_loss" in row]
                model = ModelConfig(**checkpoint.read_config(path)["model"])
                size = sum(p.numel() for p in LanguageModel(model).parameters())
                train = text_runs.read(path).train
                precision = "float32" if train.precision == "no" else train.precision
                yield Run(name, train.seed, size, precision, curve)


def table(found: list[Run]) -> TextTable:
    """The lowest loss of each model beside the paper's."""
    rows = []
    for name, entry in ENTRIES.items():
        own = [run for run in found if run.name == name and run.curve]
        if not own:
            continue
        best = [min(run.curve, key=lambda point: point[1]) for run in own]
        losses = [loss for _, loss in best]
        paper, difference = "-", "-"
        if entry.best_loss is not None:
            paper = f"{entry.best_loss:.3f} at {entry.best_step}"
            difference = f"{sum(losses) / len(losses) - entry.best_loss:+.3f}"
        steps = ", ".join(str(step) for step, _ in best)
        last = ", ".join(str(run.curve[-1][0]) for run in own)
        size = f"{own[0].parameters:,}"
        cells = [
            entry.title,
            size,
            spread(losses, 3),
            steps,
            paper,
            difference,
            str(len(own)),
            last,
            ", ".join(sorted({run.precision for run in own})),
        ]
        rows.append(cells)
    head = ["model", "parameters", "best test loss", "at step", "paper", "difference", "seeds"]
    note = "Nats per character over the whole test part, evaluated every 25 steps."
    return TextTable("Tiny Shakespeare", [*head, "trained to", "precision"], rows, [note])


def draw(found: list[Run]) -> Figure:
    """Test losses over the steps, and the paper's minima."""
    figure = Figure(figsize=(7.5, 4.5), layout="constrained")
    axes: Any = figure.subplots()
    for number, (name, entry) in enumerate(ENTRIES.items()):
        color = f"C{number}"
        for run in found:
            if run.name == name and run.curve:
                label = entry.title if run.seed == 0 else None
                axes.plot(*zip(*run.curve, strict=True), color=color, linewidth=1.2, label=label)
        if entry.best_loss is not None:
            axes.plot(entry.best_step, entry.best_loss, "o", color=color, markerfacecolor="none")
    axes.set_ylim(1.45, 2.2)
    axes.set_xlabel("step")
    axes.set_ylabel("test loss (nats per character)")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, title="circles: the paper's minima")
    return figure
