"""Sessions: states saved under names, and the one interface of what keeps them.

Several servers may share a store, so that any of them goes on with any session; each session is
claimed by one of them at a time.
"""

import hashlib
import re
import time
from abc import ABC, abstractmethod
from dataclasses import dataclass

from minrnn.checkpoint import from_bytes, to_bytes
from minrnn.state import State

# also a file's name
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


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


class ClaimLostError(OSError):
    """A session was to be saved by a server that holds it no more."""


class SessionStore(ABC):
    """Where sessions are kept. Its methods may wait for a disk or a network.

    Args:
        model: what tells one model's sessions from another's, e.g. a checksum of its weights.
        most: sessions of one owner.
    """

    def __init__(self, model: str, most: int = 1000) -> None:
        self.model, self.most = model, most

    @abstractmethod
    def names(self, owner: str) -> list[str]:
        """The names of an owner's sessions, sorted."""

    @abstractmethod
    def count(self) -> int:
        """Sessions of all owners."""

    @abstractmethod
    def read(self, owner: str, name: str) -> bytes | None:
        """What was written under the name; None if nothing was."""

    @abstractmethod
    def write(self, owner: str, name: str, content: bytes) -> None:
        """Write a session, whole or not at all.

        Raises:
            ClaimLostError: another server has claimed it, or may have.
            OSError: it cannot be written; an older one stays.
        """

    @abstractmethod
    def remove(self, owner: str, name: str) -> bool:
        """Remove a session; False if there was none."""

    @abstractmethod
    def claim(self, owner: str, name: str) -> bool:
        """Take a session, there or not, for this server; False if another has it."""

    @abstractmethod
    def release(self, owner: str, name: str) -> None:
        """Let go of a claimed session."""

    @abstractmethod
    def close(self) -> None:
        """Let go of all."""

    def load(self, owner: str, name: str) -> Session:
        """Read a session.

        Raises:
            FileNotFoundError: there is none of that name.
            ValueError: the name is none, what was saved is damaged, or it is of another model.
        """
        check_name(name)
        content = self.read(owner, name)
        if content is None:
            raise FileNotFoundError(f"there is no session {name!r}")
        tensors, notes = from_bytes(content, f"session {name!r}")
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
            ClaimLostError: another server has claimed it, or may have.
            OSError: it cannot be written; the older one stays.
        """
        check_name(name)
        notes = {
            "model": self.model,
            "unread": list(session.unread),
            "num_symbols": session.num_symbols,
            "created": session.created,
            "updated": session.updated,
        }
        self.write(owner, name, to_bytes(session.state.flatten(), notes))

    def fork(self, owner: str, name: str, to: str) -> Session:
        """Copy a session under the name `to`.

        Raises:
            FileNotFoundError: there is none of that name.
            FileExistsError: there is one named `to`.
            ValueError: a name is none.
        """
        check_name(to)
        if self.read(owner, to) is not None:
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
        check_name(name)
        if not self.remove(owner, name):
            raise FileNotFoundError(f"there is no session {name!r}")


def check_name(name: str) -> None:
    """`name` can be a session's.

    Raises:
        ValueError: it cannot.
    """
    if not _NAME.fullmatch(name):
        raise ValueError(
            "a session's name must be 1 to 64 of the letters A-Z, a-z, 0-9, '.', '_', '-', "
            f"the first a letter or digit, got {name!r:.80}"
        )


def place_of(owner: str) -> str:
    """An owner, who may be called anything, as a short name of letters and digits."""
    return hashlib.sha256(owner.encode()).hexdigest()[:32]
