"""Named settings, and how a run over text is started and taken up again from them."""

import dataclasses
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from minrnn import checkpoint, losses
from minrnn.data import shakespeare
from minrnn.data import text as text_data
from minrnn.data.batch import Batch
from minrnn.data.text import Corpus
from minrnn.data.tokenizers import Kind
from minrnn.files import write_atomically
from minrnn.models import ModelConfig
from minrnn.progress import Progress
from minrnn.train import Result, TrainConfig, train

RecipeName = Literal["shakespeare", "demo"]


@dataclass(frozen=True)
class TextConfig:
    """Train a language model on a text.

    Raises:
        ValueError: a field is out of range.
    """

    recipe: RecipeName = "shakespeare"
    """Settings to begin with: the paper's, or small ones for a few minutes on two cores."""
    data: Path | None = None
    """A UTF-8 text file, or a folder of them. None downloads tiny Shakespeare."""
    out: Path | None = None
    """The run folder to make; None takes the first free one of runs/RECIPE, runs/RECIPE-2, ..."""
    tokenizer: Kind = "characters"
    """What a symbol is."""
    context: int = 256
    """Symbols in a training window."""
    valid_fraction: float = 0.1
    """The last part of the text, which is only validated on."""
    valid_limit: int = 0
    """Symbols of it that each evaluation reads; 0 for all."""
    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        if self.context < 1:
            raise ValueError(f"`context` must be >= 1, got {self.context}")
        if self.valid_limit < 0:
            raise ValueError(f"`valid_limit` must be >= 0, got {self.valid_limit}")
        if not 0 < self.valid_fraction < 1:
            raise ValueError(f"`valid_fraction` must be in (0, 1), got {self.valid_fraction}")


# "shakespeare": Feng et al. 2024, section 4 and appendix; what they leave open (context, clipping,
# schedule, betas, decay) is nanoGPT's recipe for the same text, which they follow.
RECIPES: dict[RecipeName, TextConfig] = {
    "shakespeare": TextConfig(train=TrainConfig(eval_every=25, clip_norm=0.25)),
    "demo": TextConfig(
        recipe="demo",
        context=128,
        valid_limit=32_768,
        model=ModelConfig(width=128, num_layers=2, dropout=0.0),
        train=TrainConfig(
            steps=800,
            batch_size=32,
            learning_rate=4e-3,
            min_learning_rate=4e-4,
            warmup_steps=50,
            eval_every=100,
        ),
    ),
}


class TextTask:
    """Windows of a corpus, and the cross-entropy of the next symbol."""

    def __init__(self, corpus: Corpus, context: int, valid_limit: int) -> None:
        corpus.check_windows(context)
        self.corpus, self.context, self.valid_limit = corpus, context, valid_limit

    def batch(self, batch_size: int, seed: tuple[int, ...]) -> Batch:
        """Windows from random places of the training part."""
        return self.corpus.random_batch(self.context, batch_size, seed)

    def validation(self, batch_size: int) -> Iterator[Batch]:
        """The validation part, or as much of it as `valid_limit` says."""
        return self.corpus.windows(self.context, batch_size, self.valid_limit)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Nats per symbol."""
        return losses.next_symbol(model, batch)


def start(config: TextConfig) -> Path:
    """Make a run folder: what was asked for, and the text as ids. `go_on` trains.

    If the text does not fit, no folder is left behind; if the process is killed, `go_on` reads the
    text again.

    Raises:
        ValueError: the folder holds something already, or the text does not fit the settings.
        FileNotFoundError: there is no such text.
        SaveError: the folder cannot be made.
    """
    folder = config.out or _free_folder(Path("runs"), config.recipe)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(
            f"{folder} is not empty; go on with a run in it by --resume {folder}, "
            "or choose another --out"
        )
    made = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise checkpoint.SaveError(f"cannot make the folder {folder}: {error.strerror}") from error
    try:
        checkpoint.write_config(folder, {"text": _to_json(config)})
        with _progress(config) as progress:
            _task(config, folder, progress)
    except (ValueError, OSError):
        shutil.rmtree(folder)
        if not made:
            folder.mkdir()
        raise
    return folder


def go_on(folder: Path) -> Result:
    """Train the run in `folder` from wherever it stands to its end.

    Raises:
        FileNotFoundError: it is no run folder, or its text is gone before it was read.
        ValueError: the text does not fit the settings, or a file of the run is damaged.
    """
    saved = checkpoint.read_config(folder)
    if "text" not in saved:
        raise ValueError(f"{folder} holds a model only, no training to go on with")
    config = _from_json(saved["text"])
    with _progress(config) as progress:
        task = _task(config, folder, progress)
        corpus = task.corpus
        model_config = dataclasses.replace(config.model, vocab_size=corpus.tokenizer.vocab_size)
        saved |= {
            "model": dataclasses.asdict(model_config),
            "tokenizer": corpus.tokenizer.to_json(),
            "split": {
                "train": [0, corpus.num_train],
                "valid": [corpus.num_train, corpus.num_tokens],
            },
        }
        checkpoint.write_config(folder, saved)
        torch.manual_seed(config.train.seed)
        model = checkpoint.build_model(folder, saved)
        return train(model, task, config.train, folder, progress.report)


def read(folder: Path) -> TextConfig:
    """What the run in `folder` was asked for.

    Raises:
        FileNotFoundError: it is no run folder.
        ValueError: it is no run over text, or damaged.
    """
    saved = checkpoint.read_config(folder)
    if "text" not in saved:
        raise ValueError(f"{folder} holds a model only, no training on a text")
    return _from_json(saved["text"])


def _progress(config: TextConfig) -> Progress:
    return Progress(config.train.steps, config.train.batch_size * config.context)


def _task(config: TextConfig, folder: Path, progress: Progress) -> TextTask:
    ids = folder / "corpus"
    if (ids / "corpus.json").is_file():
        corpus = text_data.load(ids)
    else:
        source = config.data
        if source is None:
            source = folder / "tinyshakespeare.txt"
            write_atomically(source, shakespeare.tiny_shakespeare())
        corpus = text_data.build(
            source, ids, config.tokenizer, config.valid_fraction, progress.reading
        )
    return TextTask(corpus, config.context, config.valid_limit)


def _free_folder(parent: Path, name: str) -> Path:
    number = 1
    while (folder := parent / (name if number == 1 else f"{name}-{number}")).exists():
        number += 1
    return folder


def _to_json(config: TextConfig) -> dict[str, Any]:
    fields = dataclasses.asdict(config)
    paths = {k: None if fields[k] is None else str(fields[k].resolve()) for k in ("data", "out")}
    return fields | paths


def _from_json(saved: dict[str, Any]) -> TextConfig:
    try:
        fields = dict(saved)
        for name in ("data", "out"):
            fields[name] = None if fields[name] is None else Path(fields[name])
        fields["model"] = ModelConfig(**fields["model"])
        fields["train"] = TrainConfig(**fields["train"])
        return TextConfig(**fields)
    except (TypeError, KeyError, ValueError) as error:
        raise ValueError(f"the run's settings are damaged: {error}") from error
