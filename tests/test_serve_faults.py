"""The server among bad clients: keys, limits, those that vanish or do not read, signals."""

import contextlib
import json
import random
import re
import signal
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
import torch

from minrnn import cli
from minrnn.checkpoint import read_tensors
from minrnn.serve import server
from minrnn.serve.config import Limits
from minrnn.serve.engine import EngineConfig
from minrnn.serve.sessions import Session, SessionStore
from minrnn.state import State
from tests.serving import make_run, process, served, wait_for

ENDLESS = {"model": "tiny", "prompt": "abc", "max_tokens": 100_000, "stream": True}


@pytest.fixture
def run(tmp_path):
    return make_run(tmp_path / "tiny")


def ask(address: str, key: str = "", **fields) -> httpx.Response:
    body = {"model": "tiny", "prompt": "abc", "max_tokens": 8, "seed": 1} | fields
    headers = {"authorization": f"Bearer {key}"} if key else {}
    return httpx.post(f"{address}/v1/completions", json=body, headers=headers, timeout=30)


def test_keys_share_nothing(run) -> None:
    with served(run, keys=["first", "second"]) as (address, service):
        for key in ("", "third", "firstsecond", "first2"):
            assert ask(address, key).status_code == 401
        answer = httpx.get(f"{address}/v1/models", headers={"authorization": "Basic first"})
        assert answer.status_code == 401
        assert answer.json()["error"]["code"] == "invalid_api_key"
        assert answer.headers["www-authenticate"] == "Bearer"
        assert ask(address, "first", session="mine").status_code == 200
        second = {"authorization": "Bearer second"}
        assert httpx.get(f"{address}/v1/sessions", headers=second).json()["data"] == []
        for method, path in (("GET", ""), ("DELETE", ""), ("POST", "/fork")):
            body = {"name": "other"} if path else None
            answer = httpx.request(
                method, f"{address}/v1/sessions/mine{path}", headers=second, json=body
            )
            assert answer.status_code == 404
        # one prompt of two keys is read twice, of one key once
        engine = service.worker.engine
        before = engine.num_read
        texts = [ask(address, key).json()["choices"] for key in ("second", "first")]
        assert texts[0] == texts[1]
        assert engine.num_read == before + 3
        # what can be seen without a key says nothing of texts
        assert httpx.get(f"{address}/health").json() == {"status": "ok"}
        assert "mine" not in httpx.get(f"{address}/metrics").text


def test_limits_have_their_status(run) -> None:
    limits = Limits(streams=3, streams_per_key=2, sessions_per_key=1, body_bytes=2000)
    with contextlib.ExitStack() as stack:
        address, service = stack.enter_context(served(run, limits, keys=["a", "b"]))
        assert ask(address, "a", n=3).status_code == 429
        client = stack.enter_context(
            httpx.Client(headers={"authorization": "Bearer a"}, timeout=30)
        )
        with client.stream("POST", f"{address}/v1/completions", json=ENDLESS | {"n": 2}) as open_:
            assert open_.status_code == 200
            assert ask(address, "a").json()["error"]["code"] == "too_many_streams"
            full = ask(address, "b", n=2)
            assert (full.status_code, full.headers["retry-after"]) == (503, "1")
            assert ask(address, "b").status_code == 200
        wait_for(lambda: service.open.total() == 0)
        assert ask(address, "a", session="one").status_code == 200
        assert ask(address, "a", session="two").json()["error"]["code"] == "too_many_sessions"
        answer = client.post(f"{address}/v1/sessions/one/fork", json={"name": "two"})
        assert answer.status_code == 429
        assert ask(address, "a", prompt="a" * 3000).status_code == 413
        # a length that is not said beforehand
        endless = (b"a" * 500 for _ in range(100))
        answer = client.post(f"{address}/v1/completions", content=endless)
        assert answer.status_code == 413
        assert answer.json()["error"]["code"] == "body_too_large"
        assert ask(address, "a").status_code == 200


def test_time_is_limited(run) -> None:
    with served(run, Limits(seconds=0.2)) as (address, service):
        found = ask(address, max_tokens=100_000).json()["choices"][0]
        assert (found["finish_reason"], found["ended"]) == ("length", "time")
        assert 0 < len(found["text"]) < 100_000
        assert not service.open.total()


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'{"model": "tiny"',
        b"\xff\xfe",
        b'{"model": NaN}',
        b"[" * 5000,
        json.dumps({"model": "tiny", "prompt": "\ud800"}).encode(),
    ],
)
def test_malformed_bodies_are_refused(run, body) -> None:
    with served(run) as (address, service):
        answer = httpx.post(
            f"{address}/v1/completions", content=body, headers={"content-type": "application/json"}
        )
        assert answer.status_code == 400, answer.text
        assert answer.json()["error"]["message"]
        assert not service.open.total()
        assert httpx.get(f"{address}/nothing").json()["error"]["code"] == "not_found"
        assert httpx.put(f"{address}/v1/completions").status_code == 405


def _vanish(address: str, after: int) -> None:
    """Send a request by hand, read so many bytes, and reset the connection."""
    host, port = address.removeprefix("http://").split(":")
    body = json.dumps(ENDLESS).encode()
    with socket.create_connection((host, int(port))) as client:
        head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n"
        client.sendall(head.encode() + b"content-type: application/json\r\n\r\n" + body)
        while after > 0:
            after -= len(client.recv(min(after, 1000)))
        # no farewell: what is left unread is thrown away
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")


@pytest.mark.parametrize("after", [0, 1, 5000])
def test_a_client_that_vanishes_frees_its_place(run, after) -> None:
    with served(run) as (address, service):
        for _ in range(3):
            _vanish(address, after)
        engine = service.worker.engine
        if after:
            assert engine.num_read > 0
        wait_for(lambda: not service.open.total() and not engine.busy)
        assert ask(address).status_code == 200


def test_a_client_that_waits_for_the_whole_and_vanishes(run) -> None:
    with served(run) as (address, service):
        body = ENDLESS | {"stream": False}
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{address}/v1/completions", json=body, timeout=0.3)
        wait_for(lambda: not service.open.total() and not service.worker.engine.busy)


def test_a_client_that_does_not_read_is_given_up(run) -> None:
    with served(run, Limits(client_seconds=0.3)) as (address, service):
        host, port = address.removeprefix("http://").split(":")
        body = json.dumps(ENDLESS).encode()
        with socket.socket() as client:
            # small buffers fill soon
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.connect((host, int(port)))
            head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n"
            client.sendall(head.encode() + b"content-type: application/json\r\n\r\n" + body)
            wait_for(lambda: service.open.total() == 1)
            wait_for(lambda: not service.open.total() and not service.worker.engine.busy, 60)


def test_many_clients_a_tenth_cancels(run) -> None:
    with served(run, engine=EngineConfig(batch_size=16)) as (address, service):
        expected = {seed: ask(address, seed=seed, max_tokens=30).json() for seed in range(8)}

        def one(number: int) -> None:
            if number % 10 == 0:
                _vanish(address, random.randrange(2000))
            else:
                found = ask(address, seed=number % 8, max_tokens=30).json()
                assert found["choices"] == expected[number % 8]["choices"]

        with ThreadPoolExecutor(16) as pool:
            list(pool.map(one, range(200)))
        wait_for(lambda: not service.open.total() and not service.worker.engine.busy)
        assert service.worker.num_errors == 0
        assert not service.claims.busy
        assert len([t for t in threading.enumerate() if t.name == "engine"]) == 1


def test_a_step_that_fails_ends_its_texts_alone(run, monkeypatch) -> None:
    with served(run) as (address, service):
        engine = service.worker.engine
        step = engine.step

        def broken() -> None:
            monkeypatch.setattr(engine, "step", step)
            raise RuntimeError("not enough memory")

        monkeypatch.setattr(engine, "step", broken)
        answer = ask(address)
        assert answer.status_code == 500
        assert answer.json()["error"]["type"] == "server_error"
        assert "memory" not in answer.text
        assert ask(address).status_code == 200
        assert httpx.get(f"{address}/health").status_code == 200
        assert "minrnn_engine_errors_total 1.0" in httpx.get(f"{address}/metrics").text
        assert not service.open.total()


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


def test_metrics_count(run) -> None:
    with served(run) as (address, _):
        ask(address, max_tokens=8)
        ask(address, max_tokens=5)
        ask(address, max_tokens=-1)
        found = httpx.get(f"{address}/metrics").text
        for line in (
            'minrnn_http_requests_total{path="/v1/completions",status="200"} 2.0',
            'minrnn_http_requests_total{path="/v1/completions",status="400"} 1.0',
            "minrnn_symbols_drawn_total 13.0",
            "minrnn_symbols_read_total 3.0",
            "minrnn_symbols_found_total 3.0",
            "minrnn_texts_open 0.0",
        ):
            assert line in found.splitlines(), line


def test_curl_and_the_page(run) -> None:
    with served(run) as (address, _):
        body = json.dumps({"model": "tiny", "prompt": "abc", "seed": 1, "stream": True})
        command = ["curl", "-sN", f"{address}/v1/completions", "-d", body]
        command += ["-H", "content-type: application/json"]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        assert said.startswith("data: {")
        assert said.endswith("data: [DONE]\n\n")
        page = httpx.get(f"{address}/")
        assert page.headers["content-type"].startswith("text/html")
        # it needs nothing from elsewhere
        assert "http" not in page.text


def test_sigterm_finishes_what_it_can_and_saves_the_rest(run) -> None:
    with process(run, "--grace", "1") as (address, server):
        lines: list[str] = []
        with httpx.stream("POST", f"{address}/v1/completions", json=ENDLESS, timeout=30) as long_:
            reading = long_.iter_lines()
            lines.append(next(reading))
            short = threading.Thread(target=lambda: lines.append(ask(address, max_tokens=50).text))
            short.start()
            short.join()
            server.send_signal(signal.SIGTERM)
            lines += [line for line in reading if line]
        assert lines[-1] == "data: [DONE]"
        last = json.loads(lines[-2].removeprefix("data: "))["choices"][0]
        assert last["ended"] == "closed"
        assert server.wait(20) == 0
    # the text goes on where it stood
    name, drawn = last["session"]["name"], last["session"]["num_symbols"] - 3
    with process(run) as (address, server):
        assert httpx.get(f"{address}/v1/sessions/{name}").json()["num_symbols"] == drawn + 3
        assert ask(address, prompt="", session=name).status_code == 200


def test_sigkill_leaves_saved_sessions_whole(run) -> None:
    saved = {}
    with process(run) as (address, server):
        for name in ("one", "two"):
            assert ask(address, session=name, prompt="ab").status_code == 200
        files = sorted((run / "sessions").glob("*/*.session"))
        saved = {path: path.read_bytes() for path in files}
        body = ENDLESS | {"session": "one"}
        with httpx.stream("POST", f"{address}/v1/completions", json=body, timeout=30) as answer:
            # closing the iterator would close the connection
            lines = answer.iter_lines()
            next(lines)
            server.send_signal(signal.SIGKILL)
            server.wait(20)
    # what a kill in the middle of a write leaves
    (files[0].parent / ".one.session.abc.tmp").write_bytes(b"half")
    assert len(saved) == 2
    with process(run) as (address, _):
        assert {path: path.read_bytes() for path in files} == saved
        assert not list(files[0].parent.glob("*.tmp"))
        assert httpx.get(f"{address}/v1/sessions").json()["data"] == ["one", "two"]
        first = ask(address, prompt="", session="one", temperature=0).json()["choices"][0]["text"]
        httpx.post(f"{address}/v1/sessions/two/fork", json={"name": "three"})
        assert len(first) == 8


def test_one_server_for_one_folder_of_sessions(run) -> None:
    with process(run) as (address, _):
        command = ["-m", "minrnn", "serve", str(run), "--port", "0"]
        again = subprocess.run(
            [sys.executable, *command], capture_output=True, text=True, timeout=60
        )
        assert again.returncode == 2
        assert "another process is at work" in again.stderr
        port = address.rsplit(":", 1)[1]
        other = make_run(run.parent / "other")
        command = ["-m", "minrnn", "serve", str(other), "--port", port]
        again = subprocess.run(
            [sys.executable, *command], capture_output=True, text=True, timeout=60
        )
        assert again.returncode == 2
        assert f"cannot listen on 127.0.0.1:{port}" in again.stderr


def test_sessions_of_another_model_are_refused(tmp_path) -> None:
    session = Session(State({"h": torch.ones(1, 2)}), (1,), 5, 0.0, 0.0)
    SessionStore(tmp_path, "one model").save("me", "x", session)
    other = SessionStore(tmp_path, "another model")
    with pytest.raises(ValueError, match="session 'x' is of another model"):
        other.load("me", "x")
    [path] = tmp_path.glob("*/x.session")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="damaged"):
        SessionStore(tmp_path, "one model").load("me", "x")
    with pytest.raises(ValueError, match=r"a session's name must be 1 to 64 .* got '../x'"):
        other.load("me", "../x")


def test_session_files_hold_the_state_to_the_bit(tmp_path) -> None:
    store = SessionStore(tmp_path, "a model")
    state = State({"0": State({"h": torch.randn(1, 7), "conv": torch.randn(1, 3, 2).double()})})
    store.save("me", "x", Session(state, (3, 4), 9, 1.5, 2.5))
    found = store.load("me", "x")
    assert (found.unread, found.num_symbols, found.created, found.updated) == ((3, 4), 9, 1.5, 2.5)
    for name, x in found.state.flatten().items():
        assert torch.equal(x, state.flatten()[name])
    [path] = tmp_path.glob("*/x.session")
    assert set(read_tensors(path)[0]) == {"0.h", "0.conv"}


def test_key_files(tmp_path) -> None:
    path = tmp_path / "keys"
    with pytest.raises(FileNotFoundError, match="`keys` must name a file of API keys"):
        server.read_keys(path)
    path.write_text("# ours\n\n")
    with pytest.raises(ValueError, match="at least one API key"):
        server.read_keys(path)
    path.write_text("# ours\n one \ntwo\n")
    assert server.read_keys(path) == ["one", "two"]


def test_the_command_refuses_in_one_line(run, tmp_path, monkeypatch, capsys) -> None:
    for arguments, message in (
        ([tmp_path / "none"], "none is not a run folder"),
        ([run, "--port", "70000"], r"`port` must be in \[0, 65535\], got 70000"),
        ([run, "--keys", tmp_path / "keys"], "`keys` must name a file of API keys"),
        ([run, "--streams", "0"], "`streams` must be >= 1, got 0"),
        ([run, "--device", "none"], "`device` must be one of this machine's, got 'none'"),
    ):
        assert cli.main(["serve", *map(str, arguments)]) == 2
        said = capsys.readouterr()
        assert said.out == ""
        assert re.fullmatch(f"minrnn serve: .*{message}.*\n", said.err), said.err
    monkeypatch.setitem(sys.modules, "minrnn.serve.server", None)
    assert cli.main(["serve", str(run)]) == 2
    assert "pip install 'minrnn[serve]'" in capsys.readouterr().err
