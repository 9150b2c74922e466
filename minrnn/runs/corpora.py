"""A text turned into ids once, for many trainings."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from minrnn.configs import check_fields
from minrnn.data import sources
from minrnn.data import text as text_data
from minrnn.data.text import Corpus
from minrnn.data.text_files import check_outside
from minrnn.data.tokenizers import Kind, bpe_size


@dataclass(frozen=True)
class CorpusConfig:
    """How a text becomes ids.

    Raises:
        ValueError: a field is out of range, or there is no text or two.
        TypeError: a field has another type.
    """

    data: Path | None = None
    """A UTF-8 text file, or a folder of them."""
    dataset: str | None = None
    """In place of `data`, a dataset of Hugging Face: its name there, or a folder that
    `save_to_disk` wrote or that has its data files."""
    split: str | None = None
    """Of the dataset; None for train."""
    column: str | None = None
    """Of the dataset, which has the text; None for text."""
    tokenizer: Kind = "characters"
    """What a token is: characters, bytes, or bpe:V for V parts of words, e.g. bpe:4096."""
    valid_fraction: float = 0.1
    """The last part of the text, which is only validated on."""
    processes: int = 0
    """That read side by side; 0 for as many as there are cores. The ids do not depend on it."""

    def __post_init__(self) -> None:
        check_fields(self)
        bpe_size(self.tokenizer)
        if not 0 < self.valid_fraction < 1:
            raise ValueError(f"`valid_fraction` must be in (0, 1), got {self.valid_fraction}")
        if self.processes < 0:
            raise ValueError(f"`processes` must be >= 0, got {self.processes}")


def build(
    out: Path, config: CorpusConfig, progress: Callable[[int, int], None] = lambda done, total: None
) -> Corpus:
    """Write the corpus folder `out`.

    Raises:
        ValueError: `out` holds something else, neither or both of `data` and `dataset` are given,
            or the text does not fit the settings.
        FileNotFoundError: there is no such text.
        ModuleNotFoundError: a package is missing.
    """
    if (config.data is None) == (config.dataset is None):
        given = "both" if config.data else "neither"
        raise ValueError(f"one of `data` and `dataset` must be given, got {given}")
    if config.data is not None:
        for name in ("split", "column"):
            if getattr(config, name) is not None:
                raise ValueError(f"`{name}` belongs to `dataset`, got it with `data`")
        check_outside(config.data, out)
    if out.exists() and not text_data.is_corpus(out) and not _is_empty(out):
        raise ValueError(f"`out` must be a new folder, or one that this wrote before, got {out}")
    if config.data is not None:
        units = sources.of_files(config.data)
    else:
        split, column = config.split or "train", config.column or "text"
        units = sources.of_dataset(config.dataset or "", split, column)
    processes = config.processes or os.cpu_count() or 1
    return text_data.build(units, out, config.tokenizer, config.valid_fraction, progress, processes)


def _is_empty(folder: Path) -> bool:
    """Whether there is nothing in `folder` but what a killed process left there."""
    return folder.is_dir() and all(text_data.is_leftover(path) for path in folder.iterdir())
