"""Files that are whole or not there: written under a temporary name, synced, then renamed."""

import contextlib
import errno
import os
import secrets
import stat
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

if sys.platform == "win32":
    fcntl = None
else:
    import fcntl


def write_atomically(
    path: str | os.PathLike[str], content: bytes, *, private: bool = False
) -> None:
    """Replace the file at `path` by `content`; if that fails, the old file stays as it was."""
    with replacing(path, private=private) as file:
        file.write(content)


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str], *, private: bool = False) -> Iterator[BinaryIO]:
    """A file to write to that takes the name `path` when the block ends without an error.

    Args:
        path: a file that is there keeps its permissions; a new one has those of any new file.
        private: nobody but the owner may read the file, whatever was there.

    Raises:
        OSError: the folder is missing or not writable, or the disk is full; what stood at `path`
            still stands there, and nothing is left beside it.
    """
    path = Path(path)
    # the leading dot and the ending keep a file that a killed process left behind recognisable
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    # the kernel applies the umask: Python can only read it by setting it, for all threads
    rights = 0o600 if private else 0o666
    try:
        with open(temporary, "xb", opener=lambda name, how: os.open(name, how, rights)) as file:
            if not private:
                _take_rights(path, file.fileno())
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        if isinstance(error, OSError) and (error.filename in (None, str(temporary))):
            # the system names the temporary file, or none, e.g. when the disk is full
            error.filename = str(path)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    _sync_folder(path.parent)


def _take_rights(path: Path, handle: int) -> None:
    """Give the open file the permissions of the one that it will replace."""
    if os.name == "nt":
        return
    try:
        old = stat.S_IMODE(path.stat().st_mode) & 0o777
    except OSError:
        return
    if old != stat.S_IMODE(os.fstat(handle).st_mode):
        # some file systems have no permissions to set
        with contextlib.suppress(PermissionError, NotImplementedError):
            os.fchmod(handle, old)


def make_private_folder(folder: Path) -> None:
    """Make `folder`, which nobody but the owner may open, if it is missing.

    Raises:
        OSError: it cannot be made.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    if not folder.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder))


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


def _sync_folder(folder: Path) -> None:
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
