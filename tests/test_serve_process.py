"""The server as a process: signals, kills, files of keys, what the command refuses."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time

import httpx
import pytest

from minrnn import cli
from minrnn.serve import server
from tests import redis_server
from tests.serving import ENDLESS, ask, make_run, process


@pytest.fixture
def run(tmp_path):
    return make_run(tmp_path / "tiny")


@pytest.mark.long
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


@pytest.mark.long
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
    half = files[0].parent / ".one.session.abc.tmp"
    half.write_bytes(b"half")
    # what another server may be writing now stays
    new = files[0].parent / ".two.session.abc.tmp"
    new.write_bytes(b"half")
    os.utime(half, (time.time() - 1000, time.time() - 1000))
    assert len(saved) == 2
    with process(run) as (address, _):
        assert {path: path.read_bytes() for path in files} == saved
        assert list(files[0].parent.glob(".*.tmp")) == [new]
        assert httpx.get(f"{address}/v1/sessions").json()["data"] == ["one", "two"]
        first = ask(address, prompt="", session="one", temperature=0).json()["choices"][0]["text"]
        httpx.post(f"{address}/v1/sessions/two/fork", json={"name": "three"})
        assert len(first) == 8


@pytest.mark.long
def test_a_session_goes_on_elsewhere_when_its_server_is_killed(run, tmp_path) -> None:
    with redis_server.running(tmp_path) as (store, _):
        for options in ((), ("--redis", store)):
            with process(run, *options) as (one, server), process(run, *options) as (two, _):
                plain = ask(one, prompt="ab", max_tokens=16, temperature=0).json()
                asked = {"session": "x", "temperature": 0}
                first = ask(one, prompt="ab", max_tokens=6, **asked).json()
                body = ENDLESS | {"session": "x", "prompt": ""}
                with httpx.stream("POST", f"{one}/v1/completions", json=body) as answer:
                    lines = answer.iter_lines()
                    next(lines)
                    busy = ask(two, prompt="", max_tokens=10, **asked)
                    assert busy.json()["error"]["code"] == "session_busy"
                    server.send_signal(signal.SIGKILL)
                    # the client sees that its text did not end
                    with pytest.raises(httpx.RemoteProtocolError):
                        list(lines)
                # until its lease has run out
                while (answer := ask(two, prompt="", max_tokens=10, **asked)).status_code == 409:
                    time.sleep(0.2)
                rest = answer.json()
                texts = [found["choices"][0]["text"] for found in (first, rest, plain)]
                assert texts[0] + texts[1] == texts[2]


def test_an_address_is_listened_on_once(run) -> None:
    with process(run) as (address, _):
        port = address.rsplit(":", 1)[1]
        other = make_run(run.parent / "other")
        command = ["-m", "minrnn", "serve", str(other), "--port", port]
        again = subprocess.run(
            [sys.executable, *command], capture_output=True, text=True, timeout=60
        )
        assert again.returncode == 2
        assert f"cannot listen on 127.0.0.1:{port}" in again.stderr


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
    monkeypatch.delitem(sys.modules, "minrnn.serve.server")
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert cli.main(["serve", str(run)]) == 2
    assert "pip install 'minrnn[serve]'" in capsys.readouterr().err
