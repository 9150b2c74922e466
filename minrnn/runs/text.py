"""A training on text as a folder."""

import dataclasses
from pathlib import Path
from typing import Any

import torch

from minrnn import checkpoint, generators, ranks
from minrnn.data import shakespeare
from minrnn.data import text as text_data
from minrnn.data.text import Corpus
from minrnn.data.windows import Windows
from minrnn.files import write_atomically
from minrnn.models import ModelConfig
from minrnn.progress import Progress
from minrnn.recipes import TextConfig
from minrnn.runs.folder import chosen_folder, new_folder, restarted
from minrnn.tasks import TextTask
from minrnn.train import Result, train
from minrnn.train_config import TrainConfig

_TINY_SHAKESPEARE = "tinyshakespeare.txt"


def start(config: TextConfig) -> Path:
    """Make a run folder: what was asked for, and the text as ids. `go_on` trains.

    If the text does not fit, nothing is left behind; if the process is killed, `go_on` reads the
    text again. Of several processes the first does it.

    Raises:
        ValueError: the folder holds something already or lies inside the text's, or the text does
            not fit the settings.
        FileNotFoundError: there is no such text.
        SaveError: the folder cannot be made.
    """
    return ranks.on_first(lambda: _start(config))


def _start(config: TextConfig) -> Path:
    folder = config.out or chosen_folder(Path("runs"), config.recipe)
    if restarted() and (folder / "config.json").is_file():
        return folder
    if config.data is not None and config.data.resolve() in folder.resolve().parents:
        raise ValueError(
            f"the run folder {folder} lies inside the text's folder {config.data} and would be "
            "read as text; choose another --out"
        )
    with new_folder(folder, ("config.json", _TINY_SHAKESPEARE, "corpus")):
        checkpoint.write_config(folder, {"text": _to_json(config)})
        with _progress(config) as progress:
            _corpus(config, folder, {}, progress)
    return folder


def go_on(folder: Path) -> Result:
    """Train the run in `folder` from wherever it stands to its end.

    Raises:
        FileNotFoundError: it is no run folder, or its text is gone before it was read.
        ValueError: the text does not fit the settings or has changed, or a file of the run is
            damaged.
    """
    config, saved = read(folder), checkpoint.read_config(folder)
    with _progress(config) as progress:
        # built by the first process if it is not there yet, else checked; by that one alone
        made: list[Corpus] = []
        ranks.on_first(lambda: made.append(_corpus(config, folder, saved, progress)))
        corpus = made[0] if made else corpus_of(folder, config, check=False)
        windows = Windows(corpus, config.context, config.windows, config.train.batch_size)
        task = TextTask(windows, config.valid_limit)
        model_config = dataclasses.replace(config.model, vocab_size=corpus.tokenizer.vocab_size)
        train_part, end = corpus.num_train, corpus.num_tokens
        found = {
            "model": dataclasses.asdict(model_config),
            "tokenizer": corpus.tokenizer.to_json(),
            "split": {"train": [0, train_part], "valid": [train_part, end]},
            "tokens_sha256": corpus.sha256,
        }
        if saved != saved | found:
            ranks.on_first(lambda: checkpoint.write_config(folder, saved | found))
        with generators.kept():
            torch.manual_seed(config.train.seed)
            model = checkpoint.build_model(folder / "config.json", found)
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
    try:
        fields = dict(saved["text"])
        for name in ("data", "out"):
            fields[name] = None if fields[name] is None else Path(fields[name])
        fields["model"] = ModelConfig(**fields["model"])
        fields["train"] = TrainConfig.saved(fields["train"])
        return TextConfig(**fields)
    except (TypeError, KeyError, ValueError) as error:
        raise ValueError(f"{folder / 'config.json'} is damaged: {error}") from error


def corpus_of(folder: Path, config: TextConfig, check: bool = True) -> Corpus:
    """The text of the run in `folder` as ids: its own, or one that `minrnn data text` made.

    Args:
        folder: the run folder.
        config: what the run was asked for.
        check: as in `minrnn.data.text.load`.

    Raises:
        FileNotFoundError: it is gone.
        ValueError: it is damaged.
    """
    own = folder / "corpus"
    if config.data is not None and not text_data.is_corpus(own):
        return text_data.load(config.data, check)
    return text_data.load(own, check)


def _progress(config: TextConfig) -> Progress:
    tokens = config.train.batch_size * config.context
    return Progress(config.train.steps, tokens, shown=ranks.is_first())


def _corpus(config: TextConfig, folder: Path, saved: dict[str, Any], progress: Progress) -> Corpus:
    ids = folder / "corpus"
    if text_data.is_corpus(ids) or (config.data and text_data.is_corpus(config.data)):
        corpus = corpus_of(folder, config)
    else:
        source = config.data
        if source is None:
            source = folder / _TINY_SHAKESPEARE
            write_atomically(source, shakespeare.tiny_shakespeare())
        corpus = text_data.build(
            source, ids, config.tokenizer, config.valid_fraction, progress.reading
        )
    if saved.get("tokens_sha256", corpus.sha256) != corpus.sha256:
        raise ValueError(f"the text of {folder} has changed since its training began")
    corpus.check_windows(config.context)
    return corpus


def _to_json(config: TextConfig) -> dict[str, Any]:
    fields = dataclasses.asdict(config)
    paths = {k: None if fields[k] is None else str(fields[k].resolve()) for k in ("data", "out")}
    return fields | paths
