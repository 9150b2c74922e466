"""Sessions: states saved under names, each in a file of its owner's folder."""

import hashlib
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minrnn.checkpoint import read_tensors, write_tensors
from minrnn.files import remove_leftovers
from minrnn.state import State

# also a file's name
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_ENDING = ".session"


@dataclass(frozen=True)
class Session:
    """Where a text stands: a state, and the symbols behind it that it has not read yet.

    Args:
        state: of one row.
        unread: symbols that are read first when the text goes on.
        num_symbols: of the whole text, those not read included.
        created: seconds since 1970.
        updated: seconds since 1970.
    """

    state: State
    unread: tuple[int, ...]
    num_symbols: int
    created: float
    updated: float


class SessionStore:
    """A folder of sessions; a file is whole or not there, whatever kills the process.

    Args:
        folder: made if missing.
        model: what tells one model's sessions from another's, e.g. a checksum of its weights.
        most: sessions of one owner.

    Raises:
        OSError: the folder cannot be made.

    Example:
        >>> import tempfile, torch
        >>> store = SessionStore(Path(tempfile.mkdtemp()), "a model")
        >>> now = Session(State({"h": torch.ones(1, 2)}), (5,), 9, 0.0, 0.0)
        >>> store.save("an owner", "chapter-1", now)
        >>> store.load("an owner", "chapter-1").unread, store.names("an owner")
        ((5,), ['chapter-1'])
        >>> store.names("another")
        []
    """

    def __init__(self, folder: Path, model: str, most: int = 1000) -> None:
        self.folder, self.model, self.most = folder, model, most
        folder.mkdir(parents=True, exist_ok=True)
        for owned in folder.iterdir():
            if owned.is_dir():
                remove_leftovers(owned)

    def names(self, owner: str) -> list[str]:
        """The names of an owner's sessions, sorted."""
        return sorted(path.name.removesuffix(_ENDING) for path in self._files(owner))

    def count(self) -> int:
        """Sessions of all owners."""
        return sum(1 for _ in self.folder.glob(f"*/*{_ENDING}"))

    def exists(self, owner: str, name: str) -> bool:
        """Whether there is such a session."""
        return self._path(owner, name).is_file()

    def is_full(self, owner: str) -> bool:
        """Whether an owner has as many sessions as are allowed."""
        return sum(1 for _ in self._files(owner)) >= self.most

    def load(self, owner: str, name: str) -> Session:
        """Read a session.

        Raises:
            FileNotFoundError: there is none of that name.
            ValueError: the name is none, the file is damaged, or it is of another model.
        """
        path = self._path(owner, name)
        if not path.is_file():
            raise FileNotFoundError(f"there is no session {name!r}")
        tensors, notes = read_tensors(path)
        if notes.get("model") != self.model:
            raise ValueError(f"session {name!r} is of another model")
        return Session(
            State.unflatten(tensors),
            tuple(notes["unread"]),
            notes["num_symbols"],
            notes["created"],
            notes["updated"],
        )

    def save(self, owner: str, name: str, session: Session) -> None:
        """Write a session, in place of an older one of that name.

        Raises:
            ValueError: the name is none.
            OSError: it cannot be written; the older one stays.
        """
        path = self._path(owner, name)
        path.parent.mkdir(exist_ok=True)
        notes: dict[str, Any] = {
            "model": self.model,
            "unread": list(session.unread),
            "num_symbols": session.num_symbols,
            "created": session.created,
            "updated": session.updated,
        }
        write_tensors(path, session.state.flatten(), notes)

    def fork(self, owner: str, name: str, to: str) -> Session:
        """Copy a session under the name `to`.

        Raises:
            FileNotFoundError: there is none of that name.
            FileExistsError: there is one named `to`.
            ValueError: a name is none.
        """
        if self.exists(owner, to):
            raise FileExistsError(f"there is a session {to!r} already")
        old = self.load(owner, name)
        now = time.time()
        forked = Session(old.state, old.unread, old.num_symbols, now, now)
        self.save(owner, to, forked)
        return forked

    def delete(self, owner: str, name: str) -> None:
        """Remove a session.

        Raises:
            FileNotFoundError: there is none of that name.
            ValueError: the name is none.
        """
        try:
            self._path(owner, name).unlink()
        except FileNotFoundError:
            raise FileNotFoundError(f"there is no session {name!r}") from None

    def _files(self, owner: str) -> Iterator[Path]:
        return self._folder(owner).glob(f"[!.]*{_ENDING}")

    def _folder(self, owner: str) -> Path:
        # an owner may be called anything
        return self.folder / hashlib.sha256(owner.encode()).hexdigest()[:32]

    def _path(self, owner: str, name: str) -> Path:
        if not _NAME.fullmatch(name):
            raise ValueError(
                "a session's name must be 1 to 64 of the letters A-Z, a-z, 0-9, '.', '_', '-', "
                f"the first a letter or digit, got {name!r:.80}"
            )
        return self._folder(owner) / f"{name}{_ENDING}"
