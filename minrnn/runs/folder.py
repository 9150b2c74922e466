"""The folder of a run: which is free, and how it is made so that a failure leaves none."""

import contextlib
import itertools
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from minrnn.checkpoint import SaveError
from minrnn.files import locked

_LOCK = ".lock"


def restarted_in(out: Path | None, default: Path) -> Path | None:
    """The run folder of the first start, if torchrun started this process again; else None."""
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) == 0:
        return None
    # the last of those that are there
    *_, folder = default, *itertools.takewhile(Path.exists, _numbered(default))
    folder = out or folder
    return folder if (folder / "config.json").is_file() else None


@contextlib.contextmanager
def new_folder(folder: Path, writes: Sequence[str], *, numbered: bool = False) -> Iterator[Path]:
    """Make a run folder; if the block fails, remove what it `writes` there, and the folder if made.

    Of several processes that ask for one folder at the same time, one gets it.

    Args:
        folder: missing or empty.
        writes: names of files and folders.
        numbered: take the first of `folder`, `folder`-2, ... that does not exist.

    Raises:
        ValueError: the folder holds something already, another process has it, or its name is not
            UTF-8.
        SaveError: it cannot be made.
    """
    try:
        str(folder.resolve()).encode("utf-8")
    except UnicodeEncodeError as error:
        # TensorBoard writes to no other
        raise ValueError(
            f"the run folder must have a name in UTF-8, got {str(folder)!r}"
        ) from error
    if not numbered:
        _require_empty(folder)
    try:
        folder, made = _make(folder, numbered)
    except OSError as error:
        raise SaveError(f"cannot make the folder {folder}: {error.strerror}") from error
    with locked(folder / _LOCK):
        # another process may have been first
        _require_empty(folder)
        try:
            yield folder
        except BaseException:
            # never hide the reason for it
            with contextlib.suppress(OSError):
                for path in (folder / name for name in (*writes, _LOCK)):
                    if path.is_dir():
                        shutil.rmtree(path, ignore_errors=True)
                    else:
                        path.unlink(missing_ok=True)
                if made:
                    folder.rmdir()
            raise


def _require_empty(folder: Path) -> None:
    if folder.exists() and (
        not folder.is_dir() or any(path.name != _LOCK for path in folder.iterdir())
    ):
        raise ValueError(
            f"{folder} is not empty; resume the run in it by --resume {folder}, "
            "or choose another --out"
        )


def _make(folder: Path, numbered: bool) -> tuple[Path, bool]:
    """The folder, and whether it was made just now."""
    for path in _numbered(folder):
        try:
            path.mkdir(parents=True)
            return path, True
        except FileExistsError:
            if not numbered:
                return path, False
    raise AssertionError


def _numbered(folder: Path) -> Iterator[Path]:
    yield folder
    for number in itertools.count(2):
        yield folder.with_name(f"{folder.name}-{number}")
