"""Files that are whole or not there: written under a temporary name, synced, then renamed."""

import contextlib
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

if sys.platform == "win32":
    fcntl = None
else:
    import fcntl


def write_atomically(path: str | os.PathLike[str], content: bytes) -> None:
    """Replace the file at `path` by `content`; if that fails, the old file stays as it was."""
    with replacing(path) as file:
        file.write(content)


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A file to write to that takes the name `path` when the block ends without an error.

    Raises:
        OSError: the folder is missing or not writable, or the disk is full; what stood at `path`
            still stands there, and nothing is left beside it.
    """
    path = Path(path)
    # the leading dot and the ending keep a file that a killed process left behind recognisable
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes files private; a user expects the usual rights
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException as error:
        if isinstance(error, OSError) and error.filename is None:
            # the system does not say which file, e.g. when the disk is full
            error.filename = str(path)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    _sync_folder(path.parent)


@contextlib.contextmanager
def locked(path: str | os.PathLike[str], *, shared: bool = False) -> Iterator[None]:
    """Keep other processes out of the block; the lock ends with the process, however it ends.

    Args:
        path: a file for the lock, made if missing; it has to exist for a shared lock.
        shared: keep out only those that do not share the lock.

    Raises:
        ValueError: another process is inside.
    """
    if fcntl is None:
        yield
        return
    with Path(path).open("rb" if shared else "wb") as file:
        try:
            fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"another process is at work in {Path(path).parent}") from error
        yield


def remove_leftovers(folder: str | os.PathLike[str], older_than: float = 0.0) -> None:
    """Delete the temporary files that a killed process left in `folder`.

    Args:
        folder: whose subfolders are left alone.
        older_than: seconds since they were written to, where other processes may be writing.
    """
    for path in Path(folder).glob(".*.tmp"):
        with contextlib.suppress(FileNotFoundError):
            if not older_than or time.time() - path.stat().st_mtime > older_than:
                path.unlink()


def _umask() -> int:
    # there is no way to read the mask but to set it
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync_folder(folder: Path) -> None:
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
