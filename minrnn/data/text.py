"""A text of any size as memory-mapped files of ids, and batches cut from it."""

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from minrnn.data import bpe, shards, sources, tokenizers
from minrnn.data.batch import Batch
from minrnn.data.shards import Shard, Tokens
from minrnn.data.sources import Unit
from minrnn.data.text_files import check_outside, is_corpus
from minrnn.data.tokenizers import Bytes, Characters, Kind, Tokenizer
from minrnn.files import locked, remove_leftovers, write_atomically

Split = Literal["train", "valid"]

_BLOCK = 1 << 22
_LOCK = ".lock"


@dataclass(frozen=True)
class Corpus:
    """A text as ids on disk, cut into a training part and a validation part behind it.

    The folder holds the ids in one or more files, and `corpus.json`.
    """

    folder: Path
    tokenizer: Tokenizer
    shards: tuple[Shard, ...]
    """The files, in the order of the text."""
    num_train: int
    """Ids [0, num_train) are for training, [num_train, num_tokens) for validation."""

    @property
    def num_tokens(self) -> int:
        """How many ids there are in all."""
        return sum(shard.num_tokens for shard in self.shards)

    @property
    def sha256(self) -> str:
        """Of the ids."""
        return shards.fingerprint(self.shards)

    @property
    def identity(self) -> dict[str, Any]:
        """What two corpora share only if they are the same: ids, tokenizer and split."""
        train, end = self.num_train, self.num_tokens
        return {
            "tokenizer": self.tokenizer.to_json(),
            "split": {"train": [0, train], "valid": [train, end]},
            "tokens_sha256": self.sha256,
        }

    def num_targets(self, limit: int = 0) -> int:
        """The targets of the validation part: all tokens but its first, at most `limit` if > 0."""
        count = max(0, self.num_tokens - self.num_train - 1)
        return min(limit, count) if limit else count

    def tokens(self, split: Split) -> Tokens:
        """The ids of one part, memory-mapped."""
        dtype = shards.id_dtype(self.tokenizer.vocab_size)
        bounds = (0, self.num_train) if split == "train" else (self.num_train, self.num_tokens)
        return Tokens(self.folder, self.shards, dtype, *bounds)

    def num_bytes(self, limit: int = 0) -> int:
        """The bytes of UTF-8 that the targets of the validation part stand for.

        Args:
            limit: targets at most; 0 for all.
        """
        tokens, lengths = self.tokens("valid"), self.tokenizer.byte_lengths
        stop = 1 + self.num_targets(limit)
        blocks = range(1, stop, _BLOCK)
        return sum(int(lengths[tokens[n : min(n + _BLOCK, stop)]].sum()) for n in blocks)

    def check_windows(self, context: int) -> None:
        """Each part is long enough for windows of `context` symbols and the one after them.

        Raises:
            ValueError: one is too short.
        """
        needed = {"train": context + 1, "valid": 2}
        sizes = {"train": self.num_train, "valid": self.num_tokens - self.num_train}
        for split, size in sizes.items():
            if size < needed[split]:
                raise ValueError(
                    f"the text is too short: its {split} part must have at least "
                    f"{needed[split]} symbols for windows of context = {context}, got {size}"
                )

    def batch_at(self, places: np.ndarray, context: int) -> Batch:
        """The windows of the training part that begin at `places`."""
        tokens = self.tokens("train")
        windows = np.stack([tokens[p : p + context + 1] for p in places]).astype(np.int64)
        return _batch(windows, np.ones((len(places), context), dtype=bool))

    def windows(self, context: int, batch_size: int, limit: int = 0) -> Iterator[Batch]:
        """The validation part from its start, cut into windows that do not overlap.

        Every symbol but the first is a target once; the last window is filled up and masked.

        Args:
            context: symbols in a window.
            batch_size: windows in a batch, fewer in the last.
            limit: targets at most; 0 for all.
        """
        tokens, num_targets = self.tokens("valid"), self.num_targets(limit)
        for start in range(0, num_targets, context * batch_size):
            stop = min(start + context * batch_size, num_targets)
            rows = -(-(stop - start) // context)
            windows = np.zeros((rows, context + 1), dtype=np.int64)
            mask = np.zeros((rows, context), dtype=bool)
            for row in range(rows):
                first = start + row * context
                last = min(first + context, stop)
                windows[row, : last - first + 1] = tokens[first : last + 1]
                mask[row, : last - first] = True
            yield _batch(windows, mask)

    def streams(self, context: int, count: int, limit: int = 0) -> Iterator[Batch]:
        """The validation part as `count` streams side by side, each read window after window.

        Row n of a batch goes on where row n of the batch before ended. Every symbol but the first
        is a target once; what lies behind the end of a stream is masked.

        Args:
            context: symbols in a window.
            count: streams, the rows of each batch.
            limit: targets at most; 0 for all.
        """
        tokens, num_targets = self.tokens("valid"), self.num_targets(limit)
        length = -(-num_targets // count)
        for begin in range(0, length, context):
            windows = np.zeros((count, context + 1), dtype=np.int64)
            mask = np.zeros((count, context), dtype=bool)
            for row in range(count):
                first, end = row * length + begin, min((row + 1) * length, num_targets)
                size = max(0, min(context, end - first))
                if size:
                    windows[row, : size + 1] = tokens[first : first + size + 1]
                mask[row, :size] = True
            yield _batch(windows, mask)


def build(
    source: Path | Sequence[Unit],
    folder: Path,
    tokenizer: Kind | Tokenizer,
    valid_fraction: float,
    progress: Callable[[int, int], None] = lambda done, total: None,
    processes: int = 1,
) -> Corpus:
    """Read a text of any size into a corpus folder, in blocks.

    A corpus that is there already stays whole until the new one is, and as it is if that fails.

    Args:
        source: a UTF-8 file, or a folder whose files are read in the order of their paths (hidden
            ones left out), each ending in a line break; or units of either or of a dataset.
        folder: where to write; made if missing.
        tokenizer: "characters", whose vocabulary is then taken from the text; "bytes"; "bpe:V",
            whose V symbols are learnt from the training part; or one that exists already.
        valid_fraction: the last part of the text is for validation, 0 < valid_fraction <= 1.
        progress: told how much was read so far and in all.
        processes: that read units side by side; the ids do not depend on it.

    Raises:
        FileNotFoundError: there is no `source`.
        ValueError: it is empty, is not UTF-8 (characters, bpe), holds a character that the given
            tokenizer does not know, `valid_fraction` is out of range, there is no such tokenizer,
            or another process reads or writes the corpus in `folder`.
        ModuleNotFoundError: "bpe:V" needs the package tokenizers.
    """
    if not 0 < valid_fraction <= 1:
        raise ValueError(f"`valid_fraction` must be in (0, 1], got {valid_fraction}")
    if isinstance(source, Path):
        check_outside(source, folder)
    units = sources.of_files(source) if isinstance(source, Path) else list(source)
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder / _LOCK):
        try:
            return _write(units, folder, tokenizer, valid_fraction, progress, processes)
        finally:
            _tidy(folder, made)


def _write(
    units: Sequence[Unit],
    folder: Path,
    tokenizer: Kind | Tokenizer,
    valid_fraction: float,
    progress: Callable[[int, int], None],
    processes: int,
) -> Corpus:
    # read once to make a tokenizer, and once for the ids
    passes = 2 if isinstance(tokenizer, str) and tokenizer != Bytes.kind else 1
    total, done = passes * sources.total(units), 0

    def read(size: int) -> None:
        nonlocal done
        done += size
        progress(done, total)

    if isinstance(tokenizer, str):
        tokenizer = _made(tokenizer, units, 1 - valid_fraction, processes, read)
    written = shards.write(units, folder, tokenizer, processes, read)
    num_tokens = sum(shard.num_tokens for shard in written)
    corpus = Corpus(folder, tokenizer, tuple(written), num_train(num_tokens, valid_fraction))
    _save(corpus)
    return corpus


def is_leftover(path: Path) -> bool:
    """Whether `path` is what a `build` that was killed left in its folder."""
    known = (_LOCK, "tokens-*.bin", ".*.tmp")
    return any(path.match(pattern) for pattern in known)


def num_train(num_tokens: int, valid_fraction: float) -> int:
    """How many of `num_tokens` ids are for training."""
    return int(num_tokens * (1 - valid_fraction))


def _tidy(folder: Path, made: bool) -> None:
    """Delete the files of ids that `corpus.json` does not list, and `folder` if `made` in vain."""
    remove_leftovers(folder)
    # of a damaged corpus nobody knows which files are its own
    with contextlib.suppress(ValueError):
        listed = {shard.name for shard in _read(folder).shards} if is_corpus(folder) else set()
        for path in folder.glob("tokens*.bin"):
            if path.name not in listed:
                path.unlink()
    if made and not is_corpus(folder):
        (folder / _LOCK).unlink()
        folder.rmdir()


def being_read(folder: Path) -> contextlib.AbstractContextManager[None]:
    """Keep `build` from replacing the corpus in `folder` while the block runs.

    Raises:
        ValueError: it is being replaced.
    """
    # a folder that was copied without it has no lock; no file of ids takes another's name
    lock = folder / _LOCK
    return locked(lock, shared=True) if lock.is_file() else contextlib.nullcontext()


def load(folder: Path, check: bool = True) -> Corpus:
    """Open a corpus folder that `build` wrote.

    Args:
        folder: the corpus folder.
        check: read all ids and compare their checksum. False is for a corpus that another process
            of the same training has just checked, or one of which only the sizes are wanted.

    Raises:
        FileNotFoundError: it is none.
        ValueError: it is damaged.
    """
    corpus = _read(folder)
    for shard in corpus.shards if check else ():
        tokens = folder / shard.name
        if not tokens.is_file() or shards.sha256(tokens) != shard.sha256:
            raise ValueError(f"{tokens} is damaged: its content does not fit its checksum")
    return corpus


def _read(folder: Path) -> Corpus:
    """What `corpus.json` says; the ids are not checked."""
    path = folder / "corpus.json"
    if not path.is_file():
        raise FileNotFoundError(f"`folder` must hold a corpus, {path} does not exist")
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        tokenizer = tokenizers.from_json(saved["tokenizer"])
        num_tokens, num_train = int(saved["num_tokens"]), int(saved["num_train"])
        # one file had no list of files at first
        listed = saved.get("shards", [["tokens.bin", num_tokens, saved["sha256"]]])
        found = tuple(Shard(str(name), int(count), str(digest)) for name, count, digest in listed)
        corpus = Corpus(folder, tokenizer, found, num_train)
        # a name is no path to somewhere else
        bad = [shard.name for shard in found if Path(shard.name).name != shard.name]
        if bad or corpus.sha256 != saved["sha256"] or corpus.num_tokens != num_tokens:
            raise ValueError(f"its files {bad or found} do not fit")
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged: {error!r}") from error
    if not 0 <= num_train <= num_tokens:
        raise ValueError(f"{path} is damaged: `num_train` must be in [0, {num_tokens}]")
    return corpus


def _save(corpus: Corpus) -> None:
    saved = {
        "tokenizer": corpus.tokenizer.to_json(),
        "num_tokens": corpus.num_tokens,
        "num_train": corpus.num_train,
        "sha256": corpus.sha256,
        "shards": corpus.shards,
    }
    content = json.dumps(saved, ensure_ascii=False, indent=1)
    # a vocabulary may hold half surrogates: as JSON's escapes
    write_atomically(corpus.folder / "corpus.json", content.encode("utf-8", "backslashreplace"))


def _batch(windows: np.ndarray, mask: np.ndarray) -> Batch:
    # (B, T + 1): each symbol is to be told from those before it
    ids = torch.from_numpy(windows)
    return Batch(ids[:, :-1], ids[:, 1:], torch.from_numpy(mask))


def _made(
    kind: Kind,
    units: Sequence[Unit],
    share: float,
    processes: int,
    progress: Callable[[int], None],
) -> Tokenizer:
    """The tokenizer `kind`, from the text; BPE from the first `share` of it."""
    size = tokenizers.bpe_size(kind)
    if size:
        num_bytes = int(share * sources.total(units))
        return bpe.learn(_beginning(units, share, progress), size, num_bytes)
    if kind == Bytes.kind:
        return Bytes()
    return Characters(shards.vocabulary(units, processes, progress))


def _beginning(
    units: Sequence[Unit], share: float, progress: Callable[[int], None]
) -> Iterator[str]:
    """The first `share` of the text; a character that it ends in is left out."""
    left = int(share * sources.total(units))

    def read(size: int) -> None:
        nonlocal left
        left -= size
        progress(size)

    for unit in units:
        for passage in sources.characters(unit, read):
            if left <= 0:
                content = passage.text.encode("utf-8")
                yield content[: len(content) + left].decode("utf-8", errors="ignore")
                return
            yield passage.text
