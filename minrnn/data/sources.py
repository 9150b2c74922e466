"""Where a text comes from: files, or the rows of a dataset, in units that can be read side by side.

How a text is cut into units depends on the text alone, and so do its ids: not on how many processes
read it.
"""

import codecs
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from minrnn.data import text_files

_BLOCK = 1 << 22
# bytes of a unit, about
_UNIT = 1 << 26
# rows of a dataset that are read at a time
_ROWS = 1000


class Block(NamedTuple):
    """Some bytes of a text; none end a file."""

    where: str
    """the file"""
    offset: int
    """in it"""
    content: bytes
    read: int
    """how much of the unit's size was read for it"""


class Passage(NamedTuple):
    """Some characters of a text."""

    offset: int
    """where they begin, as in `Block`: bytes of the file, or rows of the dataset"""
    where: str
    """the file"""
    text: str


class Unit(Protocol):
    """A part of a text."""

    @property
    def size(self) -> int:
        """How much there is to read, for a progress bar."""
        ...

    def blocks(self) -> Iterator[Block]:
        """The text, one block after the other."""
        ...

    def place(self, passage: Passage, index: int) -> str:
        """Where the character `index` of `passage` is, for a person."""
        ...


class Span(NamedTuple):
    """The bytes [start, stop) of a file."""

    path: Path
    start: int
    stop: int
    is_last: bool
    """whether the file ends there"""


@dataclass(frozen=True)
class FileUnit:
    """Parts of files, one behind the other."""

    spans: tuple[Span, ...]
    many: bool
    """of several files: each is a text of its own, and the next begins on a line of its own"""

    @property
    def size(self) -> int:
        """How many bytes there are."""
        return sum(span.stop - span.start for span in self.spans)

    def blocks(self) -> Iterator[Block]:
        """See `Unit`."""
        for span in self.spans:
            offset, last = span.start, b""
            with span.path.open("rb") as file:
                file.seek(offset)
                while block := file.read(min(_BLOCK, span.stop - offset)):
                    yield Block(str(span.path), offset, block, len(block))
                    offset, last = offset + len(block), block
            if span.is_last:
                if self.many and last and not last.endswith(b"\n"):
                    yield Block(str(span.path), offset, b"\n", 0)
                yield Block(str(span.path), offset, b"", 0)

    def place(self, passage: Passage, index: int) -> str:
        """See `Unit`; a line ends in a line feed, as in an editor."""
        left = passage.offset + len(passage.text[:index].encode())
        line, begun = 1, b""
        with Path(passage.where).open("rb") as file:
            while block := file.read(min(_BLOCK, left)):
                left -= len(block)
                line += block.count(b"\n")
                ended = block.rfind(b"\n") + 1
                begun = block[ended:] if ended else begun + block
        if begun.startswith(codecs.BOM_UTF8):
            begun = begun.removeprefix(codecs.BOM_UTF8) if line == 1 else begun
        column = len(begun.decode("utf-8", errors="replace")) + 1
        return f"{passage.where}, line {line:,}, character {column:,}"


@dataclass(frozen=True)
class RowsUnit:
    """Rows [first, stop) of a dataset, each a text that ends in a line break."""

    name: str
    split: str
    column: str
    first: int
    stop: int

    @property
    def size(self) -> int:
        """How many rows there are."""
        return self.stop - self.first

    def blocks(self) -> Iterator[Block]:
        """See `Unit`."""
        rows = open_dataset(self.name, self.split, self.column)
        for first in range(self.first, self.stop, _ROWS):
            texts = rows[first : min(first + _ROWS, self.stop)][self.column]
            _check_texts(texts, self.name, self.column, first)
            lines = (text if text.endswith("\n") else text + "\n" for text in texts)
            yield Block(self.name, first, "".join(lines).encode("utf-8"), len(texts))
        yield Block(self.name, self.stop, b"", 0)

    def place(self, passage: Passage, index: int) -> str:
        """See `Unit`; rows and characters are counted from 0, as in Python."""
        rows = open_dataset(self.name, self.split, self.column)
        row, left = passage.offset, index
        for text in rows[row : min(row + _ROWS, self.stop)][self.column]:
            size = len(text) + (not text.endswith("\n"))
            if left < size:
                break
            row, left = row + 1, left - size
        return f"{self.name}, split {self.split!r}, row {row}, character {left}"


def _check_texts(values: Sequence[Any], name: str, column: str, first: int) -> None:
    for row, value in enumerate(values, start=first):
        if not isinstance(value, str):
            kind = "null" if value is None else type(value).__name__
            raise ValueError(
                f"`column` must hold texts, {column!r} of {name} has {kind} in row {row}"
            )


def of_files(source: Path) -> list[Unit]:
    """The units of a file, or of all files in a folder in the order of their paths.

    A byte order mark of UTF-8 at the start of a file is left out.

    Raises:
        FileNotFoundError: there is no `source`.
        ValueError: it is empty, or holds what is no text: see `minrnn.data.text_files`.
    """
    files = text_files.of(source)
    many = len(files) > 1
    units: list[Unit] = []
    held: list[Span] = []
    room = _UNIT
    for path in files:
        start, end = text_files.beginning(path), path.stat().st_size
        while True:
            stop = end if end - start <= room else _cut(path, start, start + room, end)
            held.append(Span(path, start, stop, stop == end))
            room -= stop - start
            if stop == end:
                break
            # what is left of the file begins another unit
            units.append(FileUnit(tuple(held), many))
            held, room, start = [], _UNIT, stop
        if room <= 0:
            units.append(FileUnit(tuple(held), many))
            held, room = [], _UNIT
    if held:
        units.append(FileUnit(tuple(held), many))
    if not sum(unit.size for unit in units):
        raise ValueError(f"`data` must hold text, {source} is empty")
    return units


def of_dataset(name: str, split: str, column: str, rows: int = 100_000) -> list[Unit]:
    """The units of a Hugging Face dataset.

    Args:
        name: of the Hub, or a folder that `save_to_disk` wrote or that holds data files.
        split: e.g. "train".
        column: that has the text.
        rows: of a unit.

    Raises:
        ValueError: there is no such split or column, or no rows.
        FileNotFoundError: there is no such dataset.
        ModuleNotFoundError: the package datasets is not installed.
    """
    count = len(open_dataset(name, split, column))
    if not count:
        raise ValueError(f"`dataset` must have rows, {name} ({split}) has none")
    firsts = range(0, count, rows)
    return [RowsUnit(name, split, column, n, min(n + rows, count)) for n in firsts]


def open_dataset(name: str, split: str, column: str) -> Any:
    """The rows of a dataset."""
    try:
        import datasets
        from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "`dataset` needs the package datasets, which is not installed: "
            "pip install 'minrnn[datasets]'"
        ) from error
    try:
        if Path(name, "dataset_info.json").is_file() or Path(name, "dataset_dict.json").is_file():
            found = datasets.load_from_disk(name)
            if isinstance(found, datasets.DatasetDict):
                if split not in found:
                    known = ", ".join(map(str, found))
                    raise ValueError(f"`split` must be one of {known}, got {split!r}")
                found = found[split]
        else:
            found = datasets.load_dataset(name, split=split)
    except DatasetNotFoundError as error:
        raise FileNotFoundError(f"`dataset` must name a dataset, got {name!r}: {error}") from error
    except DatasetGenerationError as error:
        # its own message says nothing; that of the reader has the row
        reason = error.__cause__ or error
        raise ValueError(
            f"`dataset` must hold rows, {name!r} cannot be read: {reason!s:.300}"
        ) from error
    if column not in found.column_names:
        known = ", ".join(found.column_names)
        raise ValueError(f"`column` must be one of {known}, got {column!r}")
    return found


def characters(unit: Unit, progress: Callable[[int], None]) -> Iterator[Passage]:
    """The text of a unit; `progress` gets what was read, before each passage.

    Raises:
        ValueError: it is not UTF-8.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    for path, offset, block, read in unit.blocks():
        # the first bytes of a character that the block before ended in
        begun = len(decoder.getstate()[0])
        progress(read)
        if offset <= len(codecs.BOM_UTF8):
            text_files.check_characters(path, block)
        try:
            yield Passage(offset - begun, path, decoder.decode(block, final=not block))
        except UnicodeDecodeError as error:
            raise ValueError(
                f"`data` must be UTF-8, {path} has byte 0x{error.object[error.start]:02x} at "
                f"offset {offset - begun + error.start} ({error.reason}); the tokenizer 'bytes' "
                "accepts it"
            ) from error


def _cut(path: Path, start: int, stop: int, end: int) -> int:
    """The last place in (start, stop] where a text may be cut, or the first one behind it.

    That is in front of a space or line break behind an ASCII character that is none: no character
    of UTF-8 and no symbol of byte pair encoding crosses it (see `minrnn.data.bpe`).
    """
    with path.open("rb") as file:
        firsts = [max(start, stop - _BLOCK), *range(stop, end, _BLOCK)]
        for first in firsts:
            place = _last_end(file, first, min(_BLOCK, (stop if first < stop else end) - first))
            if place is not None:
                return place
    return end


def _last_end(file: Any, first: int, size: int) -> int | None:
    file.seek(first)
    block = file.read(size)
    for place in range(len(block) - 1, 0, -1):
        if block[place] in b" \n" and 0x21 <= block[place - 1] < 0x7F:
            return first + place
    return None


def total(units: Sequence[Unit]) -> int:
    """How much there is to read in all."""
    return sum(unit.size for unit in units)
