"""A text of any size as memory-mapped files of ids, and batches cut from it."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from minrnn.data import bpe, shards, sources, tokenizers
from minrnn.data.batch import Batch
from minrnn.data.shards import Shard, Tokens
from minrnn.data.sources import Unit
from minrnn.data.tokenizers import Bytes, Characters, Kind, Tokenizer
from minrnn.files import remove_leftovers, write_atomically

Split = Literal["train", "valid"]

_BLOCK = 1 << 22


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

    def tokens(self, split: Split) -> Tokens:
        """The ids of one part, memory-mapped."""
        dtype = shards.id_dtype(self.tokenizer.vocab_size)
        bounds = (0, self.num_train) if split == "train" else (self.num_train, self.num_tokens)
        return Tokens(self.folder, self.shards, dtype, *bounds)

    def num_bytes(self, split: Split) -> int:
        """The bytes of UTF-8 that the symbols of one part stand for, its first left out."""
        tokens, lengths = self.tokens(split), self.tokenizer.byte_lengths
        blocks = range(1, len(tokens), _BLOCK)
        return sum(int(lengths[tokens[n : n + _BLOCK]].sum()) for n in blocks)

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
        tokens = self.tokens("valid")
        num_targets = min(limit or len(tokens), len(tokens) - 1)
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
        tokens = self.tokens("valid")
        num_targets = min(limit or len(tokens), len(tokens) - 1)
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
            tokenizer does not know, `valid_fraction` is out of range, or there is no such
            tokenizer.
        ModuleNotFoundError: "bpe:V" needs the package tokenizers.
    """
    if not 0 < valid_fraction <= 1:
        raise ValueError(f"`valid_fraction` must be in (0, 1], got {valid_fraction}")
    units = sources.of_files(source) if isinstance(source, Path) else list(source)
    folder.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder)
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
    num_train = int(sum(shard.num_tokens for shard in written) * (1 - valid_fraction))
    corpus = Corpus(folder, tokenizer, tuple(written), num_train)
    _save(corpus)
    for path in set(folder.glob("tokens*.bin")) - {folder / shard.name for shard in written}:
        # of a text that was here before
        path.unlink()
    return corpus


def is_corpus(folder: Path) -> bool:
    """Whether `build` wrote `folder`."""
    return (folder / "corpus.json").is_file()


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
    for shard in corpus.shards if check else ():
        tokens = folder / shard.name
        if not tokens.is_file() or shards.sha256(tokens) != shard.sha256:
            raise ValueError(f"{tokens} is damaged: its content does not fit its checksum")
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
        return bpe.learn(_beginning(units, share, progress), size)
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
        for block in sources.characters(unit, read):
            if left <= 0:
                content = block.encode("utf-8")
                yield content[: len(content) + left].decode("utf-8", errors="ignore")
                return
            yield block
