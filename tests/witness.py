"""`minrnn` with a witness: python -m tests.witness LOG serve ...

Every server that is started so writes into LOG when it has got hold of a session and before it lets
go of it, by a clock that all processes of the machine share.
"""

import os
import sys
import time
from pathlib import Path
from typing import NamedTuple

from minrnn import cli
from minrnn.serve.claims import Claims


class Held(NamedTuple):
    """A time in which a process had a session."""

    process: int
    begin: float
    end: float


def held(log: Path, gone: dict[int, float]) -> dict[str, list[Held]]:
    """Who had each session when, in the order in which they began.

    Args:
        log: what the servers wrote.
        gone: when processes were killed.
    """
    begun: dict[tuple[int, str], float] = {}
    found: dict[str, list[Held]] = {}
    for line in log.read_text().splitlines():
        what, process, name, seconds = line.split()
        place = (int(process), name)
        if what == "takes":
            assert place not in begun
            begun[place] = float(seconds)
        else:
            found.setdefault(name, []).append(Held(place[0], begun.pop(place), float(seconds)))
    for (process, name), begin in begun.items():
        found.setdefault(name, []).append(Held(process, begin, gone[process]))
    return {name: sorted(some, key=lambda one: one.begin) for name, some in found.items()}


def _witness(log: Path) -> None:
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    take, release = Claims.take, Claims.release

    def write(what: str, name: str) -> None:
        # one write of less than a page is whole, whoever else writes
        os.write(file, f"{what} {os.getpid()} {name} {time.monotonic()!r}\n".encode())

    async def taken(self: Claims, owner: str, name: str) -> None:
        await take(self, owner, name)
        write("takes", name)

    async def released(self: Claims, owner: str, name: str) -> None:
        write("leaves", name)
        await release(self, owner, name)

    Claims.take, Claims.release = taken, released


if __name__ == "__main__":
    _witness(Path(sys.argv[1]))
    sys.exit(cli.main(sys.argv[2:]))
