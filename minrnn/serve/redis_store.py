"""Sessions in Redis, for servers on many machines."""

import contextlib
import secrets
import threading
from collections.abc import Iterator
from typing import Any

from minrnn.serve.sessions import ClaimLostError, SessionStore, place_of

# seconds that a claim lasts unless it is renewed; a server that dies holds its sessions so long
LEASE = 10.0
_TIMEOUT = 5.0

# each a single act, whatever else goes on
_WRITE = """
local claimed = redis.call('GET', KEYS[1])
if (claimed or '') ~= ARGV[1] then return 0 end
redis.call('SET', KEYS[2], ARGV[2])
redis.call('SADD', KEYS[3], ARGV[3])
redis.call('SADD', KEYS[4], ARGV[4])
return 1
"""
_REMOVE = """
redis.call('SREM', KEYS[2], ARGV[1])
redis.call('SREM', KEYS[3], ARGV[2])
return redis.call('DEL', KEYS[1])
"""
_RENEW = """
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
return redis.call('PEXPIRE', KEYS[1], ARGV[2])
"""
_RELEASE = """
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
return redis.call('DEL', KEYS[1])
"""


class RedisStore(SessionStore):
    """Sessions as keys of Redis; a claim is a key that runs out unless it is renewed.

    A server that has lost a claim, because it was cut off for longer than the lease, cannot save
    that session any more: writing checks the claim and writes in one act.

    Args:
        url: e.g. redis://localhost:6379/0.
        model: what tells one model's sessions from another's, e.g. a checksum of its weights.
        most: sessions of one owner.
        lease: seconds that a claim lasts.

    Raises:
        OSError: Redis does not answer.
        ValueError: `url` is none.
        ModuleNotFoundError: the package redis is not installed.
    """

    def __init__(self, url: str, model: str, most: int = 1000, lease: float = LEASE) -> None:
        super().__init__(model, most)
        try:
            import redis
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "sessions in Redis need the package redis: pip install 'minrnn[redis]'"
            ) from error
        self.lease = lease
        self._failed: type[Exception] = redis.RedisError
        self._redis: Any = redis.Redis.from_url(
            url, socket_timeout=_TIMEOUT, socket_connect_timeout=_TIMEOUT
        )
        with self._answering():
            self._redis.ping()
        scripts = (_WRITE, _REMOVE, _RENEW, _RELEASE)
        registered = [self._redis.register_script(script) for script in scripts]
        self._write, self._remove, self._renew, self._release = registered
        self._tokens: dict[tuple[str, str], str] = {}
        self._lock, self._ended = threading.Lock(), threading.Event()
        self._renewing = threading.Thread(target=self._keep, name="leases", daemon=True)
        self._renewing.start()

    def names(self, owner: str) -> list[str]:
        """The names of an owner's sessions, sorted."""
        with self._answering():
            return sorted(name.decode() for name in self._redis.smembers(self._key("names", owner)))

    def count(self) -> int:
        """Sessions of all owners."""
        with self._answering():
            return int(self._redis.scard("minrnn:all"))

    def read(self, owner: str, name: str) -> bytes | None:
        """What was written under the name; None if nothing was."""
        with self._answering():
            return self._redis.get(self._key("session", owner, name))

    def write(self, owner: str, name: str, content: bytes) -> None:
        """Write a session, if the claim of this server stands, or nobody has one.

        Raises:
            ClaimLostError: another server has claimed it, or may have.
            OSError: Redis does not answer.
        """
        keys = [self._key(kind, owner, name) for kind in ("claim", "session")]
        keys += [self._key("names", owner), "minrnn:all"]
        with self._lock:
            token = self._tokens.get((owner, name), "")
        with self._answering():
            done = self._write(keys, [token, content, name, keys[1]])
        if not done:
            raise ClaimLostError(f"session {name!r} is no longer claimed by this server")

    def remove(self, owner: str, name: str) -> bool:
        """Remove a session; False if there was none."""
        key = self._key("session", owner, name)
        with self._answering():
            found = self._remove([key, self._key("names", owner), "minrnn:all"], [name, key])
        return bool(found)

    def claim(self, owner: str, name: str) -> bool:
        """Take a session for this server; False if another has it."""
        token, key = secrets.token_hex(16), self._key("claim", owner, name)
        with self._answering():
            if not self._redis.set(key, token, nx=True, px=int(1000 * self.lease)):
                return False
        with self._lock:
            self._tokens[owner, name] = token
        return True

    def release(self, owner: str, name: str) -> None:
        """Let go of a claimed session; if Redis does not answer, the lease runs out."""
        with self._lock:
            token = self._tokens.pop((owner, name), None)
        if token is not None:
            with contextlib.suppress(OSError), self._answering():
                self._release([self._key("claim", owner, name)], [token])

    def close(self) -> None:
        """Let go of all."""
        self._ended.set()
        self._renewing.join()
        for place in list(self._tokens):
            self.release(*place)
        self._redis.close()

    def _keep(self) -> None:
        """Renew every claim before it runs out."""
        while not self._ended.wait(self.lease / 3):
            with self._lock:
                held = dict(self._tokens)
            for (owner, name), token in held.items():
                # if Redis does not answer, the next turn tries again
                with contextlib.suppress(OSError), self._answering():
                    milliseconds = int(1000 * self.lease)
                    self._renew([self._key("claim", owner, name)], [token, milliseconds])

    def _key(self, kind: str, owner: str, *name: str) -> str:
        return ":".join(("minrnn", kind, place_of(owner), *name))

    @contextlib.contextmanager
    def _answering(self) -> Iterator[None]:
        """What goes wrong with Redis is an OSError, as with a disk."""
        try:
            yield
        except self._failed as error:
            raise OSError(f"Redis: {error}") from error
