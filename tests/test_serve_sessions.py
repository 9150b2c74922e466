"""Sessions: claimed one by one, saved whole, of one model."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
import torch

from minrnn.checkpoint import read_tensors
from minrnn.serve.config import Limits
from minrnn.serve.folder_store import FolderStore
from minrnn.serve.sessions import Session
from minrnn.state import State
from tests.serving import ask, make_run, served


@pytest.fixture
def run(tmp_path):
    return make_run(tmp_path / "tiny")


def test_sessions_are_claimed_one_by_one(run) -> None:
    with served(run, Limits(sessions_per_key=2)) as (address, service):
        with ThreadPoolExecutor(8) as pool:
            asked = [pool.submit(ask, address, session=f"s{n}") for n in range(8)]
            statuses = sorted(one.result().status_code for one in asked)
        assert statuses[:2] == [200, 200]
        # those that came while two were under way were refused
        assert len(service.sessions.names("")) == 2
        assert set(statuses[2:]) <= {200, 429}
        assert not service.claims.busy


def test_a_session_that_cannot_be_saved_is_said(run, monkeypatch) -> None:
    with served(run) as (address, service):

        def full(*args: object) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(service.sessions, "save", full)
        whole = ask(address, session="x")
        assert whole.status_code == 500
        assert whole.json()["error"]["code"] == "session_not_saved"
        stream = ask(address, session="x", stream=True).text.split("\n\n")
        assert json.loads(stream[-2].removeprefix("data: "))["error"]["code"] == "session_not_saved"
        assert not service.claims.busy
        assert not service.open.total()
        found = httpx.get(f"{address}/metrics").text
        assert 'minrnn_http_requests_total{path="/v1/completions",status="500"} 1.0' in found


def test_a_session_is_not_deleted_while_it_is_read(run, monkeypatch) -> None:
    with served(run) as (address, service):
        assert ask(address, session="x").status_code == 200
        load, begun, go_on = service.sessions.load, threading.Event(), threading.Event()

        def slow(*args: str) -> Session:
            begun.set()
            assert go_on.wait(20)
            return load(*args)

        monkeypatch.setattr(service.sessions, "load", slow)
        with ThreadPoolExecutor(1) as pool:
            asked = pool.submit(ask, address, session="x", prompt="")
            assert begun.wait(20)
            assert httpx.delete(f"{address}/v1/sessions/x").status_code == 409
            fork = httpx.post(f"{address}/v1/sessions/y/fork", json={"name": "x"})
            assert fork.status_code == 409
            go_on.set()
            assert asked.result().status_code == 200
        assert httpx.delete(f"{address}/v1/sessions/x").status_code == 200
        assert httpx.delete(f"{address}/v1/sessions/x").status_code == 404


def test_sessions_of_another_model_are_refused(tmp_path) -> None:
    session = Session(State({"h": torch.ones(1, 2)}), (1,), 5, 0.0, 0.0)
    FolderStore(tmp_path, "one model").save("me", "x", session)
    other = FolderStore(tmp_path, "another model")
    with pytest.raises(ValueError, match="session 'x' is of another model"):
        other.load("me", "x")
    [path] = tmp_path.glob("*/x.session")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="damaged"):
        FolderStore(tmp_path, "one model").load("me", "x")
    with pytest.raises(ValueError, match=r"a session's name must be 1 to 64 .* got '../x'"):
        other.load("me", "../x")


def test_session_files_hold_the_state_to_the_bit(tmp_path) -> None:
    store = FolderStore(tmp_path, "a model")
    state = State({"0": State({"h": torch.randn(1, 7), "conv": torch.randn(1, 3, 2).double()})})
    store.save("me", "x", Session(state, (3, 4), 9, 1.5, 2.5))
    found = store.load("me", "x")
    assert (found.unread, found.num_symbols, found.created, found.updated) == ((3, 4), 9, 1.5, 2.5)
    for name, x in found.state.flatten().items():
        assert torch.equal(x, state.flatten()[name])
    [path] = tmp_path.glob("*/x.session")
    assert set(read_tensors(path)[0]) == {"0.h", "0.conv"}
