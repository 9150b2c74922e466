"""Classify time series with nn.GRU, nn.LSTM, MinGRU and MinLSTM: one model, four layers, a table.

    pip install 'minrnn[examples]'
    python examples/classify.py --data JapaneseVowels --seeds 5 --out results.json

Series go through two bidirectional layers, packed where their lengths differ; the last states of
both directions are classified. Only the layer's class differs: data, their order, settings and
seeds are the same. The four take turns seed by seed: whatever else the machine does falls on all
alike.
"""

import argparse
import json
import math
import statistics
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence, pack_sequence

import minrnn

LAYERS: dict[str, Any] = {"gru": nn.GRU, "mingru": minrnn.MinGRU}
LAYERS |= {"lstm": nn.LSTM, "minlstm": minrnn.MinLSTM}
TITLES = {"gru": "nn.GRU", "mingru": "MinGRU", "lstm": "nn.LSTM", "minlstm": "MinLSTM"}
COUNTERPARTS = {"mingru": "gru", "minlstm": "lstm"}
DATA = ("JapaneseVowels", "PLAID", "ACSF1")
DROPOUT = 0.2
HEADER: tuple[str, ...] = ("layer", "parameters", "accuracy %", "seconds", "torch's time over it")


class Part(NamedTuple):
    """The training or the test part of a data set."""

    series: list[Tensor]
    """each (T, C), with a T of its own"""
    labels: Tensor


class Classifier(nn.Module):
    """Series, packed or (T, B, C) -> two bidirectional layers -> their last states -> classes."""

    def __init__(self, layer: Any, channels: int, width: int, classes: int) -> None:
        super().__init__()
        self.rnn = layer(channels, width, num_layers=2, dropout=DROPOUT, bidirectional=True)
        self.head = nn.Linear(2 * width, classes)

    def forward(self, x: Tensor | PackedSequence) -> Tensor:
        _, state = self.rnn(x)
        # LSTMs, ours too, return a pair (h_n, c_n)
        h_n = state[0] if isinstance(state, tuple) else state
        last = torch.cat([h_n[-2], h_n[-1]], dim=-1)
        return self.head(F.dropout(last, DROPOUT, self.training))


def read(name: str, part: str) -> tuple[list[Tensor], list[str]]:
    """Series (T, C) and names of classes, from the files that sktime ships."""
    try:
        from sktime import datasets
    except ImportError as error:
        raise ImportError(f"no data: pip install 'minrnn[examples]' ({error})") from error
    path = Path(datasets.__file__).parent / "data" / name / f"{name}_{part}.ts"
    frames, classes = cast(Any, datasets).load_from_tsfile(str(path), return_data_type="df-list")
    return [torch.tensor(frame.to_numpy(), dtype=torch.float32) for frame in frames], list(classes)


def load(name: str, limit: int | None) -> tuple[Part, Part, int]:
    """Training and test part, standardised by the former, and the number of classes."""
    parts = [read(name, part) for part in ("TRAIN", "TEST")]
    classes = sorted(set(parts[0][1]))
    if limit is not None:
        # evenly spaced, since the files are sorted by class
        every = [max(1, len(series) // limit) for series, _ in parts]
        parts = [(x[::n][:limit], y[::n][:limit]) for (x, y), n in zip(parts, every, strict=True)]
    steps = torch.cat(parts[0][0])
    mean, std = steps.mean(0), steps.std(0)
    train, test = (
        Part([(x - mean) / std for x in series], torch.tensor([classes.index(y) for y in names]))
        for series, names in parts
    )
    return train, test, len(classes)


def gather(part: Part, rows: Tensor) -> tuple[Tensor | PackedSequence, Tensor]:
    """Some series, and their labels; packed only if lengths differ, since that slows torch."""
    chosen = [part.series[row] for row in rows.tolist()]
    if len({len(x) for x in chosen}) == 1:
        return torch.stack(chosen, dim=1), part.labels[rows]
    return pack_sequence(chosen, enforce_sorted=False), part.labels[rows]


@torch.no_grad()
def accuracy(model: Classifier, part: Part, batch: int) -> float:
    """The share of series whose class is found."""
    model.eval()
    right = 0
    for rows in torch.arange(len(part.series)).split(batch):
        x, labels = gather(part, rows)
        right += int((model(x).argmax(-1) == labels).sum())
    model.train()
    return right / len(part.series)


def fit(options: argparse.Namespace, data: tuple[Part, Part, int], layer: str, seed: int) -> dict:
    """Train one model; the clock runs while it trains, not while it is tested."""
    train, test, classes = data
    torch.manual_seed(seed)
    model = Classifier(LAYERS[layer], train.series[0].shape[1], options.width, classes)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr)
    batches = math.ceil(len(train.series) / options.batch)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.epochs * batches)
    # of its own, so that every layer sees the series in the same order
    order = torch.Generator().manual_seed(seed)
    seconds, accuracies = 0.0, []
    for _ in range(options.epochs):
        started = time.perf_counter()
        for rows in torch.randperm(len(train.series), generator=order).split(options.batch):
            x, labels = gather(train, rows)
            loss = F.cross_entropy(model(x), labels)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
        seconds += time.perf_counter() - started
        accuracies.append(accuracy(model, test, options.batch))
    run = {"layer": layer, "seed": seed, "seconds": seconds, "accuracy": accuracies}
    return run | {"parameters": sum(parameter.numel() for parameter in model.parameters())}


def table(runs: list[dict]) -> str:
    """A row for each layer: mean and spread over the seeds, and the median ratio of times."""
    rows, of = [HEADER], {name: [r for r in runs if r["layer"] == name] for name in LAYERS}
    for name, own in of.items():
        if own:
            finals, seconds = [100 * r["accuracy"][-1] for r in own], [r["seconds"] for r in own]
            spread = f" ± {statistics.stdev(finals):.1f}" if len(own) > 1 else ""
            others = [r["seconds"] for r in of[COUNTERPARTS.get(name, name)]]
            ratios = [a / b for a, b in zip(others, seconds, strict=False)]
            ratio = f"{statistics.median(ratios):.1f}" if ratios else "-"
            means = [f"{statistics.mean(finals):.1f}{spread}", f"{statistics.mean(seconds):.1f}"]
            rows.append((TITLES[name], f"{own[0]['parameters']:,}", *means, ratio))
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADER))]
    rows.insert(1, tuple("-" * width for width in widths))
    return "\n".join("| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in rows)


def compare(options: argparse.Namespace, data: tuple[Part, Part, int]) -> None:
    """Run all layers for each seed in turn, and print the table; `--out` grows with every run."""
    (train, test, classes), runs = data, list[dict]()
    lengths = [len(x) for x in train.series + test.series]
    facts = f"{options.data}: {len(train.series)} + {len(test.series)} series, channels: "
    facts += f"{train.series[0].shape[1]}, steps: {min(lengths)}-{max(lengths)}, "
    facts += f"classes: {classes}; threads: {torch.get_num_threads()}, torch {torch.__version__}"
    print(facts)
    for seed in range(options.seeds):
        for layer in LAYERS if options.layer == "all" else [options.layer]:
            run = fit(options, data, layer, seed)
            runs.append(run)
            said = f"seed {seed}, {TITLES[layer]}: accuracy {run['accuracy'][-1]:.3f}"
            print(f"{said} in {run['seconds']:.1f} s", file=sys.stderr)
            if options.out:
                settings = {name: x for name, x in vars(options).items() if name != "out"}
                figures = {"facts": facts, "settings": settings, "runs": runs}
                options.out.write_text(json.dumps(figures, indent=1) + "\n")
    print(f"\n{table(runs)}")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def main(arguments: list[str] | None = None) -> None:
    parser = _Parser("classify.py", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--layer", choices=[*LAYERS, "all"], default="all")
    parser.add_argument("--data", choices=DATA, default=DATA[0])
    sizes = {"seeds": 5, "epochs": 30, "width": 64, "batch": 16, "lr": 2e-3}
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=type(default), default=default, help="%(default)s")
    parser.add_argument("--limit", type=int, help="series of each part; all of them")
    parser.add_argument("--out", type=Path, help="a JSON file for the figures of every run")
    options = parser.parse_args(arguments)
    for name in [*sizes, "limit"]:
        value = getattr(options, name)
        if value is not None and not 0 < value < math.inf:
            parser.error(f"argument --{name}: must be > 0, got {value}")
    if options.out and (options.out.is_dir() or not options.out.parent.is_dir()):
        parser.error(f"argument --out: must be a file in a folder that exists, got {options.out}")
    try:
        data = load(options.data, options.limit)
    except ImportError as error:
        parser.error(str(error))
    compare(options, data)


if __name__ == "__main__":
    main()
