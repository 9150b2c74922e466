"""The folder of a run: which is free, and how it is made so that a failure leaves none."""

import contextlib
import itertools
import os
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


def chosen_folder(parent: Path, name: str) -> Path:
    """`free_folder`; but after a restart by torchrun, the one that was free at the first start."""
    if not restarted():
        return free_folder(parent, name)
    names = itertools.chain([name], (f"{name}-{n}" for n in itertools.count(2)))
    folders = (parent / name for name in names)
    return next(last for last, after in itertools.pairwise(folders) if not after.exists())


def restarted() -> bool:
    """Whether torchrun started this process again after one of the training's ended."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


@contextlib.contextmanager
def new_folder(folder: Path, writes: Sequence[str]) -> Iterator[None]:
    """Make `folder`; if the block fails, remove what it `writes` there, and the folder if made.

    Raises:
        ValueError: the folder holds something already, or its name is not UTF-8.
        SaveError: it cannot be made.
    """
    try:
        str(folder.resolve()).encode("utf-8")
    except UnicodeEncodeError as error:
        # TensorBoard writes to no other
        raise ValueError(
            f"the run folder must have a name in UTF-8, got {str(folder)!r}"
        ) from error
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
