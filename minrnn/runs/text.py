"""A training on text as a folder."""

import dataclasses
from pathlib import Path
from typing import Any

import torch

from minrnn import checkpoint, generators, ranks
from minrnn.data import shakespeare
from minrnn.data import text as text_data
from minrnn.data.text import Corpus
from minrnn.data.text_files import check_outside
from minrnn.data.tokenizers import Characters, name_of
from minrnn.data.windows import Windows
from minrnn.files import write_atomically
from minrnn.models import LanguageModel, ModelConfig
from minrnn.progress import Progress
from minrnn.recipes import VALID_FRACTION, TextConfig
from minrnn.runs.folder import new_folder, restarted_in
from minrnn.runs.settings import check_model
from minrnn.tasks import TextTask
from minrnn.train import Result, train
from minrnn.train_config import TrainConfig

_TINY_SHAKESPEARE = "tinyshakespeare.txt"


def start(config: TextConfig) -> Path:
    """Make a run folder: what was asked for, and the text as ids. `go_on` trains.

    If the settings cannot work, or the text does not fit them, nothing is left behind; if the
    process is killed, `go_on` reads the text again. Of several processes the first does it.

    Raises:
        ValueError: the folder holds something already or lies inside the text's, a setting cannot
            work or does not apply, or the text does not fit the settings.
        FileNotFoundError: there is no such text.
        SaveError: the folder cannot be made.
    """
    return ranks.on_first(lambda: _start(config))


def _start(config: TextConfig) -> Path:
    default = Path("runs", config.recipe)
    restarted = restarted_in(config.out, default)
    if restarted is not None:
        return restarted
    out, numbered = config.out or default, config.out is None
    if config.data is not None and not text_data.is_corpus(config.data):
        check_outside(config.data, out)
    # the size of the vocabulary is not known yet, and nothing depends on it
    model = dataclasses.replace(config.model, vocab_size=1)
    check_model(LanguageModel, model, config.train, config.context)
    config = dataclasses.replace(config, valid_limit=config.num_validated)
    writes = ("config.json", _TINY_SHAKESPEARE, "corpus")
    with new_folder(out, writes, numbered=numbered) as folder:
        asked = {"text": _to_json(config)}
        checkpoint.write_config(folder, asked)
        with _progress(config) as progress:
            corpus = _corpus(config, folder, progress)
        if corpus.folder == config.data:
            _check_options(config, corpus)
        _task(config, corpus)
        checkpoint.write_config(folder, asked | _facts(config, corpus))
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
        ranks.on_first(lambda: made.append(_corpus(config, folder, progress)))
        corpus = made[0] if made else _open(folder, config, check=False)
        with text_data.being_read(corpus.folder):
            _check_same(folder, saved, corpus)
            task, facts = _task(config, corpus), _facts(config, corpus)
            if saved != saved | facts:
                ranks.on_first(lambda: checkpoint.write_config(folder, saved | facts))
            progress.num_valid = corpus.num_targets(config.num_validated)
            with generators.kept():
                torch.manual_seed(config.train.seed)
                model = checkpoint.build_model(folder / "config.json", facts)
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


def corpus_of(folder: Path) -> Corpus:
    """The text of the run in `folder` as ids: its own, or one that `minrnn data text` made.

    Raises:
        FileNotFoundError: it is gone.
        ValueError: it is damaged, or another text than that of the training.
    """
    corpus = _open(folder, read(folder))
    _check_same(folder, checkpoint.read_config(folder), corpus)
    return corpus


def _open(folder: Path, config: TextConfig, check: bool = True) -> Corpus:
    own = folder / "corpus"
    if not text_data.is_corpus(own) and not (config.data and text_data.is_corpus(config.data)):
        raise FileNotFoundError(f"the text of {folder} as tokens is gone: {own} is no corpus")
    if config.data is not None and not text_data.is_corpus(own):
        return text_data.load(config.data, check)
    return text_data.load(own, check)


def _progress(config: TextConfig) -> Progress:
    tokens = config.train.batch_size * config.context
    return Progress(config.train.steps, tokens, shown=ranks.is_first())


def _corpus(config: TextConfig, folder: Path, progress: Progress) -> Corpus:
    ids = folder / "corpus"
    if text_data.is_corpus(ids) or (config.data and text_data.is_corpus(config.data)):
        return _open(folder, config)
    source = config.data
    if source is None:
        source = folder / _TINY_SHAKESPEARE
        write_atomically(source, shakespeare.tiny_shakespeare())
    kind = config.tokenizer or Characters.kind
    fraction = VALID_FRACTION if config.valid_fraction is None else config.valid_fraction
    return text_data.build(source, ids, kind, fraction, progress.reading)


def _check_options(config: TextConfig, corpus: Corpus) -> None:
    """What was asked of a text is so in the corpus that is there already."""
    kind = name_of(corpus.tokenizer)
    if config.tokenizer not in (None, kind):
        raise ValueError(
            f"`tokenizer` must be {kind!r}, that of the corpus {corpus.folder}, or left out, got "
            f"{config.tokenizer!r}"
        )
    fraction = config.valid_fraction
    if fraction is not None and corpus.num_train != text_data.num_train(
        corpus.num_tokens, fraction
    ):
        found = 1 - corpus.num_train / corpus.num_tokens
        raise ValueError(
            f"`valid_fraction` must be {found:.6g}, that of the corpus {corpus.folder}, or left "
            f"out, got {fraction}"
        )


def _check_same(folder: Path, saved: dict[str, Any], corpus: Corpus) -> None:
    """The corpus is the one that the run in `folder` began with."""
    identity = corpus.identity
    if any(saved.get(name, identity[name]) != identity[name] for name in identity):
        raise ValueError(
            f"the text of {folder} has changed since its training began: the corpus "
            f"{corpus.folder} was built from another text, or with another tokenizer or split"
        )


def _task(config: TextConfig, corpus: Corpus) -> TextTask:
    windows = Windows(corpus, config.context, config.windows, config.train.batch_size)
    return TextTask(windows, config.num_validated)


def _facts(config: TextConfig, corpus: Corpus) -> dict[str, Any]:
    """What `config.json` says of the model and the text, beside what was asked for."""
    model = dataclasses.replace(config.model, vocab_size=corpus.tokenizer.vocab_size)
    return {"model": dataclasses.asdict(model)} | corpus.identity


def _to_json(config: TextConfig) -> dict[str, Any]:
    fields = dataclasses.asdict(config)
    paths = {k: None if fields[k] is None else str(fields[k].resolve()) for k in ("data", "out")}
    return fields | paths
