"""Selective copying: does a model decide by the input what it keeps?"""

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from minrnn import checkpoint, generators, losses
from minrnn.configs import check_fields
from minrnn.data.batch import Batch
from minrnn.data.synthetic import VOCABULARY, selective_copying
from minrnn.experiments.results import TextTable, publish, spread, with_earlier
from minrnn.files import write_atomically
from minrnn.models import LanguageModel, ModelConfig
from minrnn.progress import Progress
from minrnn.state import State
from minrnn.train import train
from minrnn.train_config import TrainConfig

NUM_DATA = 16
# sequences that a trained model is tested on at its own length, and at those of the last column
TESTED, TESTED_LONG = 1024, {4096: 64, 65536: 8}
# symbols that a long sequence is read in at a time
_PIECE = 2048
# a seed that no training has
_VALIDATION, _TEST = 1 << 40, 1 << 41


class Entry(NamedTuple):
    """A model, and the paper's accuracy in percent."""

    title: str
    model: ModelConfig
    paper: str = "-"


def _minimal(mixer: Any, title: str, layers: int, paper: str) -> Entry:
    # Feng et al. 2024, appendix: width 64, expansion 6, no convolution, no feed-forward part
    model = ModelConfig(VOCABULARY, 64, layers, mixer, 6, conv_width=0, mlp_ratio=0, dropout=0.1)
    return Entry(f"{title}, {layers} layer{'s' * (layers > 1)}", model, paper)


def _other(mixer: Any, title: str, paper: str = "-") -> Entry:
    # Gu and Dao 2023, appendix E.1: two layers of width 64; their blocks have no feed-forward part
    sizes: dict[str, Any] = {"conv_width": 0, "mlp_ratio": 0, "dropout": 0.0, "num_heads": 4}
    state_size = 64 if mixer in ("s4d", "h3", "mamba-s4d") else 16
    model = ModelConfig(VOCABULARY, 64, 2, mixer, 2, state_size=state_size, **sizes)
    return Entry(title, model, paper)


ENTRIES: dict[str, Entry] = {
    "mingru-1": _minimal("mingru", "minGRU", 1, "37.0 ± 2.3 †"),
    "mingru-2": _minimal("mingru", "minGRU", 2, "96.8 ± 3.2 †"),
    "mingru-3": _minimal("mingru", "minGRU", 3, "99.5 ± 0.2"),
    "minlstm-1": _minimal("minlstm", "minLSTM", 1, "37.6 ± 2.0 †"),
    "minlstm-2": _minimal("minlstm", "minLSTM", 2, "85.7 ± 5.8 †"),
    "minlstm-3": _minimal("minlstm", "minLSTM", 3, "96.0 ± 2.8"),
    "s4d": _other("s4d", "S4 (S4D), no gate", "18.3"),
    "hyena": _other("hyena", "H3 with Hyena", "30.1"),
    "h3": _other("h3", "H3 with S4D", "57.0"),
    "h3-s6": _other("h3-s6", "H3 with S6", "99.7"),
    "mamba-hyena": _other("mamba-hyena", "Mamba block with Hyena", "28.4"),
    "mamba-s4d": _other("mamba-s4d", "Mamba block with S4D", "56.4"),
    "mamba": _other("mamba", "Mamba (with S6)", "99.8"),
    "s6": _other("s6", "S6, no gate", "97.0"),
    "gru": _other("gru", "nn.GRU"),
    "lstm": _other("lstm", "nn.LSTM"),
    "attention": _other("attention", "Transformer, rotary positions"),
    "aaren": _other("aaren", "Aaren"),
}


@dataclass(frozen=True)
class Preset:
    """How long the sequences are, and how is trained."""

    length: int
    train: TrainConfig
    longest_memory: int = 0
    """of minGRU and minLSTM, see ModelConfig"""

    def model(self, name: str) -> ModelConfig:
        """The model of the entry `name`, as this preset starts it."""
        model = ENTRIES[name].model
        if model.mixer in ("mingru", "minlstm"):
            model = replace(model, longest_memory=self.longest_memory)
        return model


PRESETS = {
    # Feng et al. 2024, appendix; their code's learning rate
    "paper": Preset(
        4096,
        TrainConfig(
            steps=400_000,
            learning_rate=3e-4,
            min_learning_rate=3e-4,
            warmup_steps=0,
            weight_decay=0.05,
            beta2=0.999,
            eval_every=2000,
            log_every=100,
        ),
    ),
    # ten minutes on one core for the largest; docs/results.md has what was tried
    "cpu": Preset(
        64,
        TrainConfig(
            steps=6000,
            batch_size=32,
            learning_rate=5e-3,
            min_learning_rate=5e-5,
            warmup_steps=100,
            weight_decay=0.05,
            eval_every=500,
            log_every=50,
        ),
        longest_memory=150,
    ),
}


@dataclass(frozen=True)
class CopyingConfig:
    """The selective copying task of Mamba's and the minimal RNNs' papers.

    Raises:
        ValueError: a field is out of range or unknown.
        TypeError: a field has another type.
    """

    preset: Literal["cpu", "paper"] = "cpu"
    """Lengths and steps: those of the paper, or some that two cores manage."""
    model: str = "all"
    """One name of the table, or all."""
    seeds: int = 3
    """Trainings of each, with seeds 0, 1, ..."""
    runs: Path = Path("runs/selective-copying")
    """Where the run folders are; what is there already goes on or is done."""
    out: Path = Path("results/selective-copying")
    """Where figures.json, table.md and picture.png go."""

    def __post_init__(self) -> None:
        check_fields(self)
        if self.model not in ("all", *ENTRIES):
            known = ", ".join(("all", *ENTRIES))
            raise ValueError(f"`model` must be one of {known}, got {self.model!r}")
        if self.seeds < 1:
            raise ValueError(f"`seeds` must be >= 1, got {self.seeds}")


class CopyingTask:
    """Batches of selective copying, and the loss at the markers."""

    validates_streams = False

    def __init__(self, length: int) -> None:
        self.length = length

    def batch(self, batch_size: int, seed: tuple[int, ...], rows: slice = slice(None)) -> Batch:
        """A batch that depends on `seed` alone."""
        return selective_copying(self.length, NUM_DATA, batch_size, seed).rows(rows)

    def goes_on(self, step: int) -> bool:
        """Never: each sequence begins anew."""
        return False

    def validation(self, batch_size: int) -> Iterator[Batch]:
        """The same four batches each time."""
        return (self.batch(batch_size, (_VALIDATION, n)) for n in range(4))

    def loss(self, answers: Tensor, batch: Batch) -> Tensor:
        """Nats per symbol that is asked for."""
        return losses.next_symbol(answers, batch)


def reproduce(config: CopyingConfig, say: Callable[[str], None]) -> bool:
    """Train what is not trained yet, test it, write the table.

    Args:
        config: what to train.
        say: called with a line before each training.

    Returns:
        False if a training was stopped; the same call goes on.
    """
    for seed in range(config.seeds):
        for name in ENTRIES if config.model == "all" else (config.model,):
            folder = config.runs / config.preset / f"{name}-{seed}"
            if not (folder / "accuracy.json").is_file():
                say(f"{ENTRIES[name].title}, seed {seed}: {folder}")
                if not _train(name, seed, folder, PRESETS[config.preset]):
                    return False
                test(folder, PRESETS[config.preset].length, ENTRIES[name].model.mixer)
            write(config)
    return True


def _train(name: str, seed: int, folder: Path, preset: Preset) -> bool:
    """Train to the end; False if it was stopped before."""
    model_config, train_config = preset.model(name), replace(preset.train, seed=seed)
    folder.mkdir(parents=True, exist_ok=True)
    wanted = {"model": asdict(model_config), "length": preset.length, "train": asdict(train_config)}
    if not (folder / "config.json").is_file():
        checkpoint.write_config(folder, wanted)
    saved = checkpoint.read_config(folder)
    if any(saved.get(key) != value for key, value in wanted.items()):
        raise ValueError(
            f"{folder} was trained with other settings; remove it or take other --runs"
        )
    with generators.kept():
        torch.manual_seed(seed)
        model = LanguageModel(model_config)
    tokens = train_config.batch_size * (preset.length + NUM_DATA)
    with Progress(train_config.steps, tokens) as progress:
        result = train(model, CopyingTask(preset.length), train_config, folder, progress.report)
    return not result.interrupted


def test(folder: Path, length: int, mixer: str) -> None:
    """Measure the best weights of a run, at its own length and at longer ones."""
    model = checkpoint.load(folder).model
    lengths = {length: TESTED} | {T: n for T, n in TESTED_LONG.items() if length < T}
    found = {}
    for T, count in lengths.items():
        symbols, sequences = accuracy(model, T, count)
        found[str(T)] = {"symbols": symbols, "sequences": sequences, "tested": count}
    write_atomically(folder / "accuracy.json", (json.dumps(found, indent=1) + "\n").encode())


@torch.no_grad()
def accuracy(model: nn.Module, length: int, count: int) -> tuple[float, float]:
    """The shares of symbols, and of whole sequences, that are given back rightly.

    Sequences are read in pieces that hand the state on.
    """
    right = []
    for n, batch_size in enumerate([min(64, count)] * (count // min(64, count))):
        batch = selective_copying(length, NUM_DATA, batch_size, (_TEST, length, n))
        state: State | None = None
        for piece in batch.inputs[:, :length].split(_PIECE, dim=1):
            _, state = model(piece, state)
        logits, _ = model(batch.inputs[:, length:], state)
        right.append(logits.argmax(dim=2) == batch.targets[:, length:])
    rows = torch.cat(right).float()
    return rows.mean().item(), (rows.mean(dim=1) == 1).float().mean().item()


def write(config: CopyingConfig) -> None:
    """Write the folder of results from all runs of the preset that are done."""
    done = [run | {"preset": config.preset} for run in _done(config.runs / config.preset)]
    runs = with_earlier(config.out, done, ("preset", "name", "seed"))
    found = [run for run in runs if run["preset"] == config.preset]
    facts = {"config": asdict(config), "runs": runs}
    command = f"minrnn reproduce selective-copying --preset {config.preset}"
    length = PRESETS[config.preset].length
    publish(config.out, command, facts, [table(found, length)], draw(found, length))


def _done(folder: Path) -> Iterator[dict[str, Any]]:
    for name, entry in ENTRIES.items():
        for path in sorted(folder.glob(f"{name}-[0-9]*")):
            if path.name.removeprefix(f"{name}-").isdigit() and (path / "accuracy.json").is_file():
                accuracies = json.loads((path / "accuracy.json").read_text())
                size = sum(p.numel() for p in LanguageModel(entry.model).parameters())
                seed = int(path.name.rpartition("-")[2])
                yield {"name": name, "seed": seed, "parameters": size, "accuracy": accuracies}


def table(found: list[dict[str, Any]], length: int) -> TextTable:
    """Accuracies in percent, mean and deviation over the seeds."""
    longer = [T for T in TESTED_LONG if length < T]
    head = [
        "model",
        "parameters",
        f"symbols at {length}",
        f"sequences at {length}",
        "paper",
        "seeds",
    ]
    rows = []
    for name, entry in ENTRIES.items():
        own = [run for run in found if run["name"] == name]
        if not own:
            continue

        def percent(T: int, what: str, own: list[dict[str, Any]] = own) -> str:
            return spread([100 * run["accuracy"][str(T)][what] for run in own], 1)

        cells = [entry.title, f"{own[0]['parameters']:,}"]
        cells += [percent(length, "symbols"), percent(length, "sequences")]
        cells += [entry.paper, str(len(own)), *(percent(T, "symbols") for T in longer)]
        rows.append(cells)
    notes = [
        "Percent of the 16 symbols that are given back rightly, and of the sequences in which all "
        f"are; trained at {length} symbols. The paper's are symbols at 4,096.",
        "† not checked against the paper's PDF.",
    ]
    columns = [*head, *(f"symbols at {T:,}" for T in longer)]
    return TextTable("Selective copying", columns, rows, notes)


def draw(found: list[dict[str, Any]], length: int) -> Figure:
    """Accuracy of each model, a mark for each seed, at its own length and at longer ones."""
    names = [name for name in ENTRIES if any(run["name"] == name for run in found)]
    figure = Figure(figsize=(7.5, 1.5 + 0.3 * max(1, len(names))), layout="constrained")
    axes: Any = figure.subplots()
    for number, T in enumerate([length, *(T for T in TESTED_LONG if length < T)]):
        points = [
            (100 * run["accuracy"][str(T)]["symbols"], names.index(run["name"])) for run in found
        ]
        if points:
            style = {"linestyle": "none", "marker": "osD"[number], "alpha": 0.7}
            axes.plot(*zip(*points, strict=True), label=f"tested at {T:,}", **style)
    axes.set_yticks(range(len(names)), [ENTRIES[name].title for name in names], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, 101)
    axes.set_xlabel(f"symbols given back rightly, %; trained at {length}")
    axes.grid(alpha=0.3)
    if names:
        axes.legend(frameon=False)
    return figure
