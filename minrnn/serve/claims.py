"""Which sessions are in use: each by one request at a time."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from minrnn.serve.schemas import Refused
from minrnn.serve.sessions import SessionStore


class Claims:
    """Sessions that requests have taken; used in the thread of the event loop.

    Args:
        store: where the sessions are.
    """

    def __init__(self, store: SessionStore) -> None:
        self.store = store
        self.busy: set[tuple[str, str]] = set()
        # of these, those that have no file yet
        self._new: set[tuple[str, str]] = set()

    def take(self, owner: str, name: str) -> None:
        """Claim a session; `release` must follow.

        Raises:
            Refused: another request has it.
        """
        if (owner, name) in self.busy:
            raise Refused(409, "session_busy", f"session {name!r} is in use", "session")
        self.busy.add((owner, name))

    async def begin(self, owner: str, name: str) -> None:
        """Count a claimed session that has no file yet among the owner's.

        Raises:
            Refused: the owner has as many as are allowed.
        """
        saved = await asyncio.to_thread(self.store.names, owner)
        # nothing else runs from here on: two new ones cannot both be the last
        begun = sum(1 for other, _ in self._new if other == owner)
        if len(saved) + begun >= self.store.most:
            message = f"a key may have {self.store.most} sessions"
            raise Refused(429, "too_many_sessions", message, "session")
        self._new.add((owner, name))

    def release(self, owner: str, name: str) -> None:
        """Let go of a session."""
        self.busy.discard((owner, name))
        self._new.discard((owner, name))

    @asynccontextmanager
    async def held(self, owner: str, name: str, is_new: bool = False) -> AsyncIterator[None]:
        """A session that is claimed inside the block, and counted if it is new.

        Raises:
            Refused: another request has it, or there are too many.
        """
        self.take(owner, name)
        try:
            if is_new:
                await self.begin(owner, name)
            yield
        finally:
            self.release(owner, name)
