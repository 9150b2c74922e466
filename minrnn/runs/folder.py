"""The folder of a run: which is free, and how it is made so that a failure leaves none."""

import contextlib
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from minrnn.checkpoint import SaveError


def free_folder(parent: Path, name: str) -> Path:
    """The first of parent/name, parent/name-2, ... that does not exist."""
    number = 1
    while (folder := parent / (name if number == 1 else f"{name}-{number}")).exists():
        number += 1
    return folder


@contextlib.contextmanager
def new_folder(folder: Path, writes: Sequence[str]) -> Iterator[None]:
    """Make `folder`; if the block fails, remove what it `writes` there, and the folder if made.

    Raises:
        ValueError: the folder holds something already.
        SaveError: it cannot be made.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(
            f"{folder} is not empty; go on with a run in it by --resume {folder}, "
            "or choose another --out"
        )
    made = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SaveError(f"cannot make the folder {folder}: {error.strerror}") from error
    try:
        yield
    except (ValueError, OSError, ImportError):
        # never hide the reason for it
        with contextlib.suppress(OSError):
            for name in writes:
                path = folder / name
                if path.is_dir():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    path.unlink(missing_ok=True)
            if made:
                folder.rmdir()
        raise
