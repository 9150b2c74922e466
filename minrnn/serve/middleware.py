"""What holds for every request before and after its route: sizes, times, counts."""

import asyncio
import json
import time
from collections.abc import Awaitable, Callable
from typing import Any

from minrnn.serve.config import Limits
from minrnn.serve.metrics import Metrics
from minrnn.serve.schemas import error

Message = dict[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Any, Receive, Send], Awaitable[None]]


class Guard:
    """Refuses bodies that are too large or do not come, counts answers.

    A body is read before its route is called: it is small.

    Args:
        app: what is guarded.
        limits: the sizes and times.
        metrics: where answers are counted.
        paths: those that are counted by name; others are counted as "other".
    """

    def __init__(self, app: App, limits: Limits, metrics: Metrics, paths: frozenset[str]) -> None:
        self.app, self.limits, self.metrics, self.paths = app, limits, metrics, paths

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        begun, status = time.perf_counter(), 0

        async def noted(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            body = await self._read(scope, receive)
            if isinstance(body, bytes):
                await self.app(scope, _given(body, receive), noted)
            else:
                await _refuse(*body, noted)
        except Exception:
            # the 500 is sent outside of here
            status = status or 500
            raise
        finally:
            path = scope["path"] if scope["path"] in self.paths else "other"
            self.metrics.requests.labels(path, str(status)).inc()
            self.metrics.seconds.labels(path).observe(time.perf_counter() - begun)

    async def _read(self, scope: Any, receive: Receive) -> bytes | tuple[int, str, str]:
        """The body, or the status, code and message with which it is refused."""
        most, seconds = self.limits.body_bytes, self.limits.client_seconds
        too_large = 413, "body_too_large", f"the body must have <= {most} bytes"
        if _declared(scope) > most:
            return too_large
        body, until = bytearray(), time.monotonic() + seconds
        while True:
            try:
                message = await asyncio.wait_for(receive(), until - time.monotonic())
            except asyncio.TimeoutError:
                return 408, "timeout", f"the body must arrive within {seconds:g} seconds"
            body += message.get("body", b"")
            if len(body) > most:
                return too_large
            if not message.get("more_body"):
                return bytes(body)


def _given(body: bytes, receive: Receive) -> Receive:
    """The body in one message, then whatever else comes."""
    messages = [{"type": "http.request", "body": body, "more_body": False}]

    async def given() -> Message:
        return messages.pop() if messages else await receive()

    return given


async def _refuse(status: int, code: str, message: str, send: Send) -> None:
    body = json.dumps(error(message, code)).encode()
    # what follows of the body is not read: the connection ends here
    headers = [(b"content-type", b"application/json"), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _declared(scope: Any) -> int:
    for name, value in scope["headers"]:
        if name == b"content-length" and value.isdigit():
            return int(value)
    return 0
