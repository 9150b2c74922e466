"""The server among bad clients: keys, limits, those that vanish or do not read, signals."""

import contextlib
import json
import random
import socket
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from minrnn.serve.config import Limits
from minrnn.serve.engine import EngineConfig
from tests.serving import ENDLESS, ask, make_run, served, wait_for


@pytest.fixture
def run(tmp_path):
    return make_run(tmp_path / "tiny")


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
        # one byte is of the headers, sent before anything is drawn
        if after > 1000:
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


@pytest.mark.long
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
