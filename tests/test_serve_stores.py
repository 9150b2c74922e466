"""Stores of sessions that several servers share: the folder and Redis, held to the same."""

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
import torch

from minrnn.serve.folder_store import FolderStore
from minrnn.serve.redis_store import RedisStore
from minrnn.serve.sessions import ClaimLostError, Session, SessionStore
from minrnn.state import State
from tests import redis_server
from tests.serving import ask, make_run, served, wait_for

Open = Callable[..., SessionStore]


@pytest.fixture(params=["folder", "redis"])
def open_store(request, tmp_path) -> Iterator[Open]:
    """Opens the same store again and again, as servers would."""
    opened: list[SessionStore] = []
    if request.param == "folder":

        def make(model: str = "a model", most: int = 1000) -> SessionStore:
            opened.append(FolderStore(tmp_path / "sessions", model, most))
            return opened[-1]

        yield make
    else:
        with redis_server.running(tmp_path) as (address, _):

            def make(model: str = "a model", most: int = 1000) -> SessionStore:
                opened.append(RedisStore(address, model, most, lease=0.6))
                return opened[-1]

            yield make
            for store in opened:
                store.close()
        return
    for store in opened:
        store.close()


def _session(number: int = 1) -> Session:
    state = State({"0": State({"h": torch.full((1, 7), float(number)), "c": torch.ones(1, 3, 2)})})
    return Session(state, (3, number), 9, 1.5, 2.5)


def test_what_one_saves_another_loads_to_the_bit(open_store) -> None:
    one, two = open_store(), open_store()
    assert (one.names("me"), one.count()) == ([], 0)
    one.save("me", "x", _session())
    found = two.load("me", "x")
    assert (found.unread, found.num_symbols, found.created, found.updated) == ((3, 1), 9, 1.5, 2.5)
    for name, x in found.state.flatten().items():
        assert torch.equal(x, _session().state.flatten()[name])
    assert two.names("me") == ["x"]
    assert (two.names("you"), two.count()) == ([], 1)
    assert two.fork("me", "x", "y").unread == (3, 1)
    with pytest.raises(FileExistsError, match="there is a session 'y' already"):
        one.fork("me", "x", "y")
    one.delete("me", "x")
    assert (two.names("me"), two.count()) == (["y"], 1)
    for call in (two.load, two.delete):
        with pytest.raises(FileNotFoundError, match="there is no session 'x'"):
            call("me", "x")
    with pytest.raises(ValueError, match="session 'y' is of another model"):
        open_store("another model").load("me", "y")
    for call in (one.load, one.delete):
        with pytest.raises(ValueError, match=r"a session's name must be 1 to 64"):
            call("me", "../x")


def test_a_session_is_claimed_by_one(open_store) -> None:
    one, two = open_store(), open_store()
    assert one.claim("me", "x")
    assert not two.claim("me", "x")
    assert not one.claim("me", "x")
    assert two.claim("me", "y")
    assert two.claim("you", "x")
    # longer than a lease: it is renewed
    time.sleep(1.0)
    assert not two.claim("me", "x")
    one.save("me", "x", _session())
    one.release("me", "x")
    assert two.claim("me", "x")
    one.release("me", "x")
    assert not one.claim("me", "x")
    two.close()
    assert one.claim("me", "x")


def test_of_many_that_claim_at_once_one_gets_it(open_store) -> None:
    stores = [open_store() for _ in range(4)]
    with ThreadPoolExecutor(8) as pool:
        for number in range(20):
            name = f"s{number}"
            claims = list(pool.map(lambda store, name=name: store.claim("me", name), stores * 2))
            assert sum(claims) == 1
            winner = stores[claims.index(True) % 4]
            # claimed and let go of by several threads at once
            list(pool.map(lambda _, winner=winner, name=name: winner.release("me", name), range(2)))
            assert stores[0].claim("me", name)


def test_a_lost_claim_cannot_be_saved(tmp_path) -> None:
    with redis_server.running(tmp_path) as (address, process):
        one = RedisStore(address, "a model", lease=0.3)
        two = RedisStore(address, "a model", lease=0.3)
        assert one.claim("me", "x")
        one.save("me", "x", _session(1))
        # cut off for longer than the lease: nothing is renewed
        one._ended.set()
        one._renewing.join()
        wait_for(lambda: two.claim("me", "x"))
        with pytest.raises(ClaimLostError, match="session 'x' is no longer claimed by this server"):
            one.save("me", "x", _session(2))
        two.save("me", "x", _session(3))
        one.release("me", "x")
        assert not one.claim("me", "x")
        assert one.load("me", "x").unread == (3, 3)
        # a Redis that is gone
        process.kill()
        process.wait()
        for call in (lambda: two.save("me", "x", _session()), lambda: two.names("me")):
            with pytest.raises(OSError, match="Redis: "):
                call()
        two.release("me", "x")
        two.close()
    with pytest.raises(OSError, match="Redis: "):
        RedisStore(address, "a model")
    with pytest.raises(ValueError, match="scheme"):
        RedisStore("nowhere", "a model")


def test_a_damaged_session_is_named(open_store) -> None:
    store = open_store()
    store.save("me", "x", _session())
    content = bytearray(store.read("me", "x") or b"")
    for place, message in ((-1, "does not fit its checksum"), (9, "damaged")):
        broken = bytes(content[:place] + bytes([content[place] ^ 1]) + content[place:][1:])
        store.write("me", "x", broken)
        with pytest.raises(ValueError, match=f"session 'x' is damaged.*{message}|{message}"):
            store.load("me", "x")


def test_two_servers_go_on_with_each_others_sessions(tmp_path) -> None:
    run = make_run(tmp_path / "tiny")
    with served(run) as (one, first), served(run) as (two, _):
        whole = ask(one, prompt="ab", max_tokens=20, seed=3, temperature=0).json()["choices"][0]
        begun = ask(one, prompt="ab", max_tokens=8, session="x", temperature=0).json()["choices"][0]
        rest = ask(two, prompt="", max_tokens=12, session="x", temperature=0).json()["choices"][0]
        assert begun["text"] + rest["text"] == whole["text"]
        # what runs on one is busy on the other
        with httpx.stream(
            "POST",
            f"{one}/v1/completions",
            json={"model": "tiny", "prompt": "a", "max_tokens": 10_000, "stream": True}
            | {"session": "x"},
        ) as answer:
            assert answer.status_code == 200
            refused = ask(two, prompt="", session="x")
            assert refused.json()["error"]["code"] == "session_busy"
        wait_for(lambda: not first.open.total())
        assert ask(two, prompt="", session="x").status_code == 200


def test_sessions_that_cannot_be_reached_are_said(tmp_path, monkeypatch) -> None:
    run = make_run(tmp_path / "tiny")
    with served(run) as (address, service):

        def gone(*args: object) -> bool:
            raise OSError("Redis: connection refused")

        monkeypatch.setattr(service.sessions, "claim", gone)
        answer = ask(address, session="x")
        assert answer.status_code == 503
        assert answer.json()["error"]["code"] == "sessions_unavailable"
        assert not service.claims.busy
        assert not service.open.total()
        assert ask(address).status_code == 200


_HOLDER = """
import sys, time
from pathlib import Path
from minrnn.serve.folder_store import FolderStore
store = FolderStore(Path(sys.argv[1]), "a model")
assert store.claim("me", "x")
print("held", flush=True)
time.sleep(60)
"""


def test_a_killed_server_lets_go_of_a_folders_sessions(tmp_path: Path) -> None:
    command = [sys.executable, "-c", _HOLDER, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        store = FolderStore(tmp_path, "a model")
        assert not store.claim("me", "x")
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    assert store.claim("me", "x")
    store.close()
    assert list(tmp_path.rglob("*.lock")) == []
