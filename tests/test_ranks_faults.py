"""Processes of a training are killed, and it goes on, on as many as there are then."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from minrnn import checkpoint
from tests.training import write_text

STEPS = 240
OPTIONS = (
    *("--steps", str(STEPS), "--eval-every", "20", "--log-every", "1", "--context", "16"),
    *("--width", "8", "--num-layers", "1", "--batch-size", "8", "--dropout", "0"),
    *("--learning-rate", "1e-2", "--tokenizer", "bytes"),
)
RUN = (sys.executable, "-m", "torch.distributed.run", "--standalone")


def _launched(ranks: int, *command: str, restarts: int = 0) -> subprocess.Popen[str]:
    """torchrun in a session of its own, so that nothing of it is left behind."""
    options = ("--nproc-per-node", str(ranks), "--max-restarts", str(restarts), "-m", "minrnn")
    return subprocess.Popen(
        [*RUN, *options, *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def _end(process: subprocess.Popen[str]) -> tuple[int, str]:
    try:
        said, _ = process.communicate(timeout=180)
    finally:
        # by then nothing should be left of the session
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, said


def _workers(process: subprocess.Popen[str]) -> list[int]:
    path = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    return [int(pid) for pid in path.read_text().split()]


def _lines(run: Path) -> list[dict[str, float]]:
    metrics = run / "metrics.jsonl"
    whole = metrics.read_text().rpartition("\n")[0] if metrics.exists() else ""
    return [json.loads(line) for line in whole.splitlines()]


def _step_saved(run: Path) -> int:
    last = run / "training_state" / "last.safetensors"
    return checkpoint.read_tensors(last)[1]["step"] if last.exists() else 0


def _wait_for_step(run: Path, step: int, process: subprocess.Popen[str]) -> None:
    while not (lines := _lines(run)) or lines[-1]["step"] < step:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)


def _curve(run: Path, key: str) -> dict[int, float]:
    return {row["step"]: row[key] for row in _lines(run) if key in row}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("faults")
    source = write_text(folder / "text.txt")
    command = ("train", "text", "--data", str(source), "--out", str(folder / "whole"), *OPTIONS)
    assert _end(_launched(1, *command))[0] == 0
    return folder


def _assert_same_curve(run: Path, whole: Path) -> None:
    for key in ("loss", "valid_loss"):
        wanted = _curve(whole, key)
        assert len(wanted) == (STEPS if key == "loss" else STEPS // 20)
        # float32: sums in another order, over hundreds of steps
        assert _curve(run, key) == pytest.approx(wanted, rel=1e-3), key


@pytest.mark.slow
def test_killed_five_times_and_resumed_on_other_numbers_of_ranks(undisturbed) -> None:
    run, draw = undisturbed / "killed", random.Random(0)
    source = str(undisturbed / "text.txt")
    command = ("train", "text", "--data", source, "--out", str(run), *OPTIONS)
    for ranks, least in zip((2, 4, 1, 2, 4), (15, 60, 100, 130, 190), strict=True):
        process = _launched(ranks, *command)
        step = least + draw.randrange(20)
        _wait_for_step(run, step, process)
        os.kill(draw.choice(_workers(process)), signal.SIGKILL)
        code, said = _end(process)
        assert code != 0
        # a reader finds a whole save, at most as old as it may be
        assert _step_saved(run) >= step - step % 20 - 20, said
        command = ("train", "--resume", str(run))
    code, said = _end(_launched(2, *command))
    assert code == 0, said
    _assert_same_curve(run, undisturbed / "whole")
    assert list(run.rglob("*.tmp")) == []


@pytest.mark.slow
def test_torchrun_itself_starts_it_again(undisturbed) -> None:
    run = undisturbed / "restarted"
    source = str(undisturbed / "text.txt")
    command = ("train", "text", "--data", source, "--out", str(run), *OPTIONS)
    process = _launched(2, *command, restarts=1)
    _wait_for_step(run, 50, process)
    os.kill(_workers(process)[1], signal.SIGKILL)
    code, said = _end(process)
    assert code == 0, said
    assert "another process ended" in said
    assert "Traceback" not in said
    _assert_same_curve(run, undisturbed / "whole")


@pytest.mark.long
def test_a_refusal_is_one_line_and_ends_all(tmp_path) -> None:
    source = write_text(tmp_path / "text.txt")
    command = ("train", "text", "--data", str(source), "--out", str(tmp_path / "run"), *OPTIONS)
    code, said = _end(_launched(2, *command, "--batch-size", "3"))
    assert code != 0
    assert "`batch_size` = 3 must be a multiple" in said
    # what has a traceback is torchrun's own report
    assert "launching.py" not in said
    code, said = _end(_launched(2, "train", "text", "--data", str(tmp_path / "none")))
    assert code != 0
    assert said.count("`data` must name a file or folder") == 1
