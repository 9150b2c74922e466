"""Which sessions are in use: each by one request of one server at a time."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from minrnn.serve.schemas import Refused
from minrnn.serve.sessions import SessionStore


class Claims:
    """Sessions that requests of this server have taken; used in the thread of the event loop.

    Args:
        store: where the sessions are; other servers may use it too.
    """

    def __init__(self, store: SessionStore) -> None:
        self.store = store
        self.busy: set[tuple[str, str]] = set()
        # of these, those that nothing is saved of yet
        self._new: set[tuple[str, str]] = set()

    async def take(self, owner: str, name: str) -> None:
        """Claim a session; `release` must follow.

        Raises:
            Refused: another request has it, here or on another server.
        """
        if (owner, name) in self.busy:
            raise _busy(name)
        self.busy.add((owner, name))
        asked = asyncio.ensure_future(asyncio.to_thread(self.store.claim, owner, name))
        try:
            free = await asyncio.shield(asked)
        except asyncio.CancelledError:
            # the thread goes on; what it claims is let go of
            asked.add_done_callback(lambda _: asyncio.ensure_future(self.release(owner, name)))
            raise
        except OSError as error:
            self.busy.discard((owner, name))
            message = "the sessions cannot be reached"
            raise Refused(503, "sessions_unavailable", message, "session") from error
        if not free:
            self.busy.discard((owner, name))
            raise _busy(name)

    async def begin(self, owner: str, name: str) -> None:
        """Count a claimed session that nothing is saved of yet among the owner's.

        Raises:
            Refused: the owner has as many as are allowed.
        """
        saved = await asyncio.to_thread(self.store.names, owner)
        # nothing else runs here from now on: two new ones cannot both be the last
        begun = sum(1 for other, _ in self._new if other == owner)
        if len(saved) + begun >= self.store.most:
            message = f"a key may have {self.store.most} sessions"
            raise Refused(429, "too_many_sessions", message, "session")
        self._new.add((owner, name))

    async def release(self, owner: str, name: str) -> None:
        """Let go of a session."""
        # goes on if the request is cancelled meanwhile
        await asyncio.shield(asyncio.ensure_future(self._release(owner, name)))

    async def _release(self, owner: str, name: str) -> None:
        try:
            await asyncio.to_thread(self.store.release, owner, name)
        finally:
            self.busy.discard((owner, name))
            self._new.discard((owner, name))

    @asynccontextmanager
    async def held(self, owner: str, name: str, is_new: bool = False) -> AsyncIterator[None]:
        """A session that is claimed inside the block, and counted if it is new.

        Raises:
            Refused: another request has it, or there are too many.
        """
        await self.take(owner, name)
        try:
            if is_new:
                await self.begin(owner, name)
            yield
        finally:
            await self.release(owner, name)


def _busy(name: str) -> Refused:
    return Refused(409, "session_busy", f"session {name!r} is in use", "session")
