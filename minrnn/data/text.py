"""A text of any size as a memory-mapped file of ids, and batches cut from it."""

import codecs
import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from minrnn.data import bpe, tokenizers
from minrnn.data.batch import Batch
from minrnn.data.bpe import BPE
from minrnn.data.tokenizers import Bytes, Characters, Kind, Tokenizer
from minrnn.files import remove_leftovers, replacing, write_atomically

Split = Literal["train", "valid"]

_BLOCK = 1 << 22
_NUM_CODE_POINTS = 0x110000


@dataclass(frozen=True)
class Corpus:
    """A text as ids on disk, cut into a training part and a validation part behind it.

    The folder holds `tokens.bin`, the ids one after the other, and `corpus.json`.
    """

    folder: Path
    tokenizer: Tokenizer
    num_tokens: int
    num_train: int
    """Ids [0, num_train) are for training, [num_train, num_tokens) for validation."""
    sha256: str
    """Of `tokens.bin`."""

    def tokens(self, split: Split) -> np.ndarray:
        """The ids of one part, memory-mapped.

        Each call maps the file anew: pages that were read through a mapping count as this
        process's memory until it is closed.
        """
        dtype = _id_dtype(self.tokenizer.vocab_size)
        everything = np.memmap(self.folder / "tokens.bin", dtype, "r", shape=(self.num_tokens,))
        train = split == "train"
        return everything[: self.num_train] if train else everything[self.num_train :]

    def num_bytes(self, split: Split) -> int:
        """The bytes of UTF-8 that the symbols of one part stand for, its first left out."""
        tokens, lengths = self.tokens(split)[1:], self.tokenizer.byte_lengths
        blocks = range(0, len(tokens), _BLOCK)
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


def build(
    source: Path,
    folder: Path,
    tokenizer: Kind | Tokenizer,
    valid_fraction: float,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Corpus:
    """Read a text of any size into a corpus folder, in blocks.

    Args:
        source: a UTF-8 file, or a folder whose files are read in the order of their paths (hidden
            ones left out), each ending in a line break.
        folder: where to write; made if missing.
        tokenizer: "characters", whose vocabulary is then taken from the text; "bytes"; "bpe:V",
            whose V symbols are learnt from the training part; or one that exists already.
        valid_fraction: the last part of the text is for validation, 0 < valid_fraction <= 1.
        progress: told the bytes read so far and in all.

    Raises:
        FileNotFoundError: there is no `source`.
        ValueError: it is empty, is not UTF-8 (characters, bpe), holds a character that the given
            tokenizer does not know, `valid_fraction` is out of range, or there is no such
            tokenizer.
        ModuleNotFoundError: "bpe:V" needs the package tokenizers.
    """
    if not 0 < valid_fraction <= 1:
        raise ValueError(f"`valid_fraction` must be in (0, 1], got {valid_fraction}")
    files = _files(source)
    total = sum(path.stat().st_size for path in files)
    if total == 0:
        raise ValueError(f"`data` must hold text, {source} is empty")
    folder.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder)
    if isinstance(tokenizer, str):
        num_train = int(total * (1 - valid_fraction))
        tokenizer = _made(tokenizer, files, num_train, lambda done: progress(done // 2, total))
    if isinstance(tokenizer, Bytes):
        blocks = _bytes(files, lambda done: progress(done, total))
        ids = (np.frombuffer(block, dtype=np.uint8) for _, _, block in blocks)
    else:
        blocks = _characters(files, lambda done: progress((total + done) // 2, total))
        whole = isinstance(tokenizer, BPE)
        ids = tokenizer.encode_blocks(blocks) if whole else map(tokenizer.encode, blocks)
    num_tokens, digest = 0, hashlib.sha256()
    with replacing(folder / "tokens.bin") as file:
        for block in ids:
            content = block.astype(_id_dtype(tokenizer.vocab_size)).tobytes()
            file.write(content)
            digest.update(content)
            num_tokens += len(block)
    corpus = Corpus(
        folder, tokenizer, num_tokens, int(num_tokens * (1 - valid_fraction)), digest.hexdigest()
    )
    _save(corpus)
    return corpus


def load(folder: Path) -> Corpus:
    """Open a corpus folder that `build` wrote.

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
        corpus = Corpus(folder, tokenizer, num_tokens, num_train, saved["sha256"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged: {error!r}") from error
    if not 0 <= num_train <= num_tokens:
        raise ValueError(f"{path} is damaged: `num_train` must be in [0, {num_tokens}]")
    tokens = folder / "tokens.bin"
    if not tokens.is_file() or _sha256(tokens) != corpus.sha256:
        raise ValueError(f"{tokens} is damaged: its content does not fit its checksum")
    return corpus


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _save(corpus: Corpus) -> None:
    saved = {
        "tokenizer": corpus.tokenizer.to_json(),
        "num_tokens": corpus.num_tokens,
        "num_train": corpus.num_train,
        "sha256": corpus.sha256,
    }
    content = json.dumps(saved, ensure_ascii=False, indent=1)
    write_atomically(corpus.folder / "corpus.json", content.encode("utf-8"))


def _id_dtype(vocab_size: int) -> np.dtype:
    return np.min_scalar_type(vocab_size - 1)


def _batch(windows: np.ndarray, mask: np.ndarray) -> Batch:
    # (B, T + 1): each symbol is to be told from those before it
    ids = torch.from_numpy(windows)
    return Batch(ids[:, :-1], ids[:, 1:], torch.from_numpy(mask))


def _files(source: Path) -> list[Path]:
    if source.is_file():
        return [source]
    if not source.is_dir():
        what = "is neither" if source.exists() else "does not exist"
        raise FileNotFoundError(f"`data` must name a file or folder, {source} {what}")
    inside = (path.relative_to(source) for path in source.rglob("*"))
    shown = sorted(p for p in inside if not any(part.startswith(".") for part in p.parts))
    files = [source / path for path in shown if (source / path).is_file()]
    if not files:
        raise ValueError(f"`data` must hold text, the folder {source} has no files")
    return files


def _bytes(files: list[Path], progress: Callable[[int], None]) -> Iterator[tuple[Path, int, bytes]]:
    """(file, offset, bytes) block by block; an empty block marks the end of each file."""
    done = 0
    for path in files:
        offset, last = 0, b""
        with path.open("rb") as file:
            while block := file.read(_BLOCK):
                yield path, offset, block
                offset, last = offset + len(block), block
                progress(done + offset)
        done += offset
        # files of a folder are separate texts: the next one starts on a line of its own
        if len(files) > 1 and last and not last.endswith(b"\n"):
            yield path, offset, b"\n"
        yield path, offset, b""


def _characters(files: list[Path], progress: Callable[[int], None]) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8")()
    for path, offset, block in _bytes(files, progress):
        # the first bytes of a character that the block before ended in
        begun = len(decoder.getstate()[0])
        try:
            yield decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            raise ValueError(
                f"`data` must be UTF-8, {path} has byte 0x{error.object[error.start]:02x} at "
                f"offset {offset - begun + error.start} ({error.reason}); the tokenizer 'bytes' "
                "accepts it"
            ) from error


def _beginning(blocks: Iterator[str], size: int) -> Iterator[str]:
    """The first `size` bytes of the text; a character that they cut in two is left out."""
    for block in blocks:
        content = block.encode("utf-8")
        yield content[:size].decode("utf-8", errors="ignore")
        size -= len(content)
        if size <= 0:
            return


def _made(
    kind: Kind, files: list[Path], num_train: int, progress: Callable[[int], None]
) -> Tokenizer:
    """The tokenizer `kind`, from the text; BPE from its first `num_train` bytes."""
    size = tokenizers.bpe_size(kind)
    if size:
        return bpe.learn(_beginning(_characters(files, progress), num_train), size)
    return Bytes() if kind == Bytes.kind else Characters(_vocabulary(files, progress))


def _vocabulary(files: list[Path], progress: Callable[[int], None]) -> str:
    seen = np.zeros(_NUM_CODE_POINTS, dtype=bool)
    for text in _characters(files, progress):
        seen[np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)] = True
    return "".join(map(chr, np.flatnonzero(seen)))
