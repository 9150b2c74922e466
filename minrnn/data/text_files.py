"""Which files are the text that a person names, and which are no text at all."""

import codecs
import json
import os
from collections.abc import Iterator
from pathlib import Path

# how a file begins -> what it is; none of these is text, in any encoding
_FORMATS = {
    b"\x89PNG\r\n": "a PNG image",
    b"\xff\xd8\xff": "a JPEG image",
    b"GIF87a": "a GIF image",
    b"GIF89a": "a GIF image",
    b"%PDF-": "a PDF",
    b"\x1f\x8b": "compressed by gzip",
    b"BZh91AY&SY": "compressed by bzip2",
    b"\xfd7zXZ\x00": "compressed by xz",
    b"\x28\xb5\x2f\xfd": "compressed by zstd",
    b"PK\x03\x04": "a zip archive",
    b"PAR1\x15": "a Parquet file; --dataset reads the folder that it is in",
    b"ARROW1\x00\x00": "an Arrow file; --dataset reads what `save_to_disk` wrote",
    b"\x89HDF\r\n": "an HDF5 file",
    b"SQLite format 3\x00": "an SQLite database",
    b"\x7fELF": "a program",
    b"\x93NUMPY": "a NumPy array",
}
_HEAD = 1 << 16


def of(source: Path) -> list[Path]:
    """The file `source`, or all files in a folder in the order of their paths.

    Links are followed; hidden files and folders are left out.

    Raises:
        FileNotFoundError: there is no `source`.
        ValueError: it has no files, or one of them is no text: a link to nothing, a device, a
            picture, an archive, or what a command of ours wrote.
    """
    if not source.is_file() and not source.is_dir():
        what = "is neither" if source.exists() else "does not exist"
        raise FileNotFoundError(f"`data` must name a file or folder, {source} {what}")
    if source.is_file():
        _check_output(source)
        files = [source]
    else:
        files = sorted(_inside(source), key=lambda path: path.parts)
    if not files:
        raise ValueError(f"`data` must hold text, the folder {source} has no files")
    for path in files:
        _check_content(path)
    return files


def beginning(path: Path) -> int:
    """Where the text of a file begins: after a byte order mark of UTF-8, if there is one."""
    with path.open("rb") as file:
        return len(codecs.BOM_UTF8) if file.read(3) == codecs.BOM_UTF8 else 0


def check_characters(path: str, head: bytes) -> None:
    """A file that is read as characters does not hold null bytes all over, as other encodings do.

    Raises:
        ValueError: it does.
    """
    head = head[:_HEAD]
    nulls = head.count(0)
    # a few may be meant
    if nulls > max(3, len(head) // 20):
        raise ValueError(
            f"`data` must be UTF-8, {path} has {nulls:,} null bytes among its first "
            f"{len(head):,}: it is binary or UTF-16; the tokenizer 'bytes' accepts it"
        )


def _inside(source: Path) -> Iterator[Path]:
    """The files below the folder `source`, those behind links too."""

    def refuse(error: OSError) -> None:
        raise error

    for name, folders, files in os.walk(source, onerror=refuse, followlinks=True):
        folder = Path(name)
        if is_corpus(folder):
            raise ValueError(f"`data` must hold text, {folder} is a corpus")
        if _is_run(folder):
            own = folder / "corpus"
            hint = f"; its text as tokens is {own}" if is_corpus(own) else ""
            raise ValueError(f"`data` must hold text, {folder} is a run folder{hint}")
        folders[:] = [inner for inner in folders if not inner.startswith(".")]
        for inner in (folder / inner for inner in folders):
            if inner.is_symlink() and inner.resolve() in (folder.resolve() / "x").parents:
                raise ValueError(f"`data` must hold text, {inner} is a link to a folder around it")
        for file in (folder / file for file in files if not file.startswith(".")):
            if not file.is_file():
                what = "a link to nothing" if file.is_symlink() else "not a file"
                raise ValueError(f"`data` must hold text, {file} is {what}")
            yield file


def is_corpus(folder: Path) -> bool:
    """Whether `minrnn.data.text.build` wrote `folder`."""
    return (folder / "corpus.json").is_file()


def check_outside(data: Path, out: Path) -> None:
    """What is written to the folder `out` is not read as text the next time.

    Raises:
        ValueError: `out` lies inside the folder `data`.
    """
    if data.is_dir() and data.resolve() in (out.resolve() / "x").parents:
        raise ValueError(
            f"`out` = {out} lies inside the text's folder {data} and would be read as text; choose "
            "another folder"
        )


def _is_run(folder: Path) -> bool:
    try:
        saved = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(saved, dict) and str(saved.get("format", "")).startswith("minrnn.run/")


def _check_output(path: Path) -> None:
    """`path` is no file that a command of ours wrote for itself."""
    folder = path.absolute().parent
    of_corpus = path.name == "corpus.json" or path.match("tokens*.bin")
    of_run = path.name in ("config.json", "metrics.jsonl")
    if (of_corpus and is_corpus(folder)) or (of_run and _is_run(folder)):
        raise ValueError(f"`data` must hold text, {path} is of {folder}, which a command wrote")


def _check_content(path: Path) -> None:
    with path.open("rb") as file:
        head = file.read(16)
    kind = next((what for start, what in _FORMATS.items() if head.startswith(start)), None)
    # 8 bytes that say how long the JSON behind them is
    if head[8:10] == b'{"' and 2 <= int.from_bytes(head[:8], "little") < path.stat().st_size:
        kind = "a safetensors file"
    if kind is not None:
        raise ValueError(f"`data` must hold text, {path} is {kind}")
