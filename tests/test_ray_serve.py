"""The example for Ray Serve: two replicas, one killed in the middle of a text."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.serving import ENDLESS, ask, make_run, wait_for

pytest.importorskip("ray", reason="pip install 'minrnn[examples]'")
EXAMPLE = Path(__file__).parent.parent / "examples" / "ray_serve.py"


@contextlib.contextmanager
def _deployment(run: Path, *options: str) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """Two replicas; their address, and the process that started them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    command = [sys.executable, str(EXAMPLE), str(run), "--port", str(port), *options]
    # Ray keeps a token in the home folder, and tells how it is used to its makers unless it is told
    environment = os.environ | {"HOME": str(run.parent), "RAY_USAGE_STATS_ENABLED": "0"}
    log = run.parent / "log"
    with (
        log.open("wb") as file,
        subprocess.Popen(command, env=environment, stdout=file, stderr=file) as started,
    ):
        try:
            wait_for(
                lambda: started.poll() is not None or f"on {address}\n" in log.read_text(), 120
            )
            assert started.poll() is None, log.read_text()
            yield address, started
        finally:
            if started.poll() is None:
                started.send_signal(signal.SIGTERM)
                started.wait(60)


def _replicas(started: subprocess.Popen[bytes]) -> list[int]:
    """The processes of the replicas, which Ray starts at one remove."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if (folder / "cmdline").read_bytes().startswith(b"ray::ServeReplica:minrnn"):
                home = f"HOME={Path(str(started.args[2])).parent}".encode()
                if home in (folder / "environ").read_bytes().split(b"\0"):
                    found.append(int(folder.name))
    return found


def _holds(process: int, session: str) -> bool:
    """Whether it has the lock of a session."""
    lock = f".{session}.lock"
    with contextlib.suppress(OSError):
        return any(
            os.readlink(file).endswith(lock) for file in Path(f"/proc/{process}/fd").iterdir()
        )
    return False


def _scores(answer: httpx.Response) -> list[float]:
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["logprobs"]["token_logprobs"]


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_session_goes_on_when_its_replica_is_killed(tmp_path) -> None:
    run = make_run(tmp_path / "tiny")
    asked = {"temperature": 0, "logprobs": 1}
    with _deployment(run) as (address, started):
        assert httpx.get(f"{address}/health").json() == {"status": "ok"}
        plain = _scores(ask(address, prompt="ab", max_tokens=16, **asked))
        first = _scores(ask(address, prompt="ab", max_tokens=6, session="x", **asked))
        before = _replicas(started)
        assert len(before) == 2
        body = ENDLESS | {"session": "x", "prompt": ""}
        with httpx.stream("POST", f"{address}/v1/completions", json=body, timeout=60) as answer:
            lines = answer.iter_lines()
            next(lines)
            # whichever replica this reaches
            for _ in range(8):
                busy = ask(address, prompt="", session="x", **asked)
                assert busy.json()["error"]["code"] == "session_busy"
            [holder] = [process for process in before if _holds(process, "x")]
            os.kill(holder, signal.SIGKILL)
            # the client sees that its text did not end
            with pytest.raises(httpx.RemoteProtocolError):
                list(lines)
        # from what was saved last, on the other
        rest = _scores(ask(address, prompt="", session="x", max_tokens=10, **asked))
        assert first + rest == pytest.approx(plain, abs=1e-12)
        assert len(set(plain)) > 8
        # Ray replaces the one that is gone
        wait_for(lambda: len(set(_replicas(started)) - {holder}) == 2, 60)
        started.send_signal(signal.SIGTERM)
        assert started.wait(60) == 0
    until = time.monotonic() + 20
    while _replicas(started):
        assert time.monotonic() < until, "a replica was left behind"
        time.sleep(0.1)


@pytest.mark.long
def test_the_example_refuses_in_one_line(tmp_path) -> None:
    for options, message in (
        ([str(tmp_path)], f"ray_serve.py: {tmp_path} is not a run folder\n"),
        ([str(tmp_path), "--replicas", "0"], "ray_serve.py: `--replicas` must be >= 1"),
    ):
        command = [sys.executable, str(EXAMPLE), *options]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert ended.returncode == 2
        assert ended.stderr.startswith(message)
        assert ended.stderr.count("\n") == 1
