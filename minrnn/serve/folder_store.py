"""Sessions in a folder, each in a file of its owner's; for servers on one machine."""

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from minrnn.checkpoint import SaveError
from minrnn.files import make_private_folder, remove_leftovers, write_atomically
from minrnn.serve.sessions import SessionStore, place_of

if sys.platform == "win32":
    fcntl = None
else:
    import fcntl

_ENDING = ".session"
# seconds after which a file that is half written belongs to no server that still runs
_LEFT = 600.0


class FolderStore(SessionStore):
    """A folder of sessions; a file is whole or not there, whatever kills the process.

    A claim is a lock on a file beside it, which goes with the process, however it ends. Sessions
    hold what users wrote: only the user that the server runs as may open the files and the
    folders that this makes, whatever the umask.

    Args:
        folder: made if missing; one that is there keeps its permissions.
        model: what tells one model's sessions from another's, e.g. a checksum of its weights.
        most: sessions of one owner.

    Raises:
        OSError: the folder cannot be made.

    Example:
        >>> import tempfile, torch
        >>> from minrnn.serve.sessions import Session
        >>> from minrnn.state import State
        >>> store = FolderStore(Path(tempfile.mkdtemp()), "a model")
        >>> now = Session(State({"h": torch.ones(1, 2)}), (5,), 9, 0.0, 0.0)
        >>> store.save("an owner", "chapter-1", now)
        >>> store.load("an owner", "chapter-1").unread, store.names("an owner")
        ((5,), ['chapter-1'])
        >>> store.names("another")
        []
    """

    def __init__(self, folder: Path, model: str, most: int = 1000) -> None:
        super().__init__(model, most)
        self.folder = folder
        self._claimed: dict[tuple[str, str], int] = {}
        make_private_folder(folder)
        for owned in folder.iterdir():
            if owned.is_dir():
                _close_to_others(owned)
                remove_leftovers(owned, _LEFT)

    def names(self, owner: str) -> list[str]:
        """The names of an owner's sessions, sorted."""
        return sorted(path.name.removesuffix(_ENDING) for path in self._files(owner))

    def count(self) -> int:
        """Sessions of all owners."""
        return sum(1 for _ in self.folder.glob(f"*/[!.]*{_ENDING}"))

    def read(self, owner: str, name: str) -> bytes | None:
        """What was written under the name; None if nothing was."""
        try:
            return self._path(owner, name).read_bytes()
        except FileNotFoundError:
            return None

    def write(self, owner: str, name: str, content: bytes) -> None:
        """Write a session, whole or not at all.

        Raises:
            OSError: it cannot be written; an older one stays.
        """
        path = self._path(owner, name)
        try:
            make_private_folder(path.parent)
            write_atomically(path, content, private=True)
        except OSError as error:
            raise SaveError(f"cannot save {path}: {error.strerror or error}") from error

    def remove(self, owner: str, name: str) -> bool:
        """Remove a session; False if there was none."""
        try:
            self._path(owner, name).unlink()
        except FileNotFoundError:
            return False
        return True

    def claim(self, owner: str, name: str) -> bool:
        """Take a session for this server; False if another has it."""
        path = self._lock(owner, name)
        make_private_folder(path.parent)
        while True:
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
            if fcntl is not None:
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    os.close(handle)
                    return False
            if _is_file_of(handle, path):
                self._claimed[owner, name] = handle
                return True
            # its holder removed it between our opening and our locking it
            os.close(handle)

    def release(self, owner: str, name: str) -> None:
        """Let go of a claimed session."""
        handle = self._claimed.pop((owner, name), None)
        if handle is not None:
            # removed while it is locked: who opened it before sees that it is gone
            with contextlib.suppress(FileNotFoundError):
                self._lock(owner, name).unlink()
            os.close(handle)

    def close(self) -> None:
        """Let go of all."""
        for place in list(self._claimed):
            self.release(*place)

    def _files(self, owner: str) -> Iterator[Path]:
        return self._folder(owner).glob(f"[!.]*{_ENDING}")

    def _folder(self, owner: str) -> Path:
        return self.folder / place_of(owner)

    def _path(self, owner: str, name: str) -> Path:
        return self._folder(owner) / f"{name}{_ENDING}"

    def _lock(self, owner: str, name: str) -> Path:
        return self._folder(owner) / f".{name}.lock"


def _close_to_others(folder: Path) -> None:
    """Close a folder of sessions, if it is ours: an older version left it open to all."""
    if os.name != "nt" and folder.stat().st_mode & 0o077 and folder.stat().st_uid == os.geteuid():
        folder.chmod(0o700)


def _is_file_of(handle: int, path: Path) -> bool:
    try:
        found = path.stat()
    except FileNotFoundError:
        return False
    own = os.fstat(handle)
    return (own.st_dev, own.st_ino) == (found.st_dev, found.st_ino)
