"""Short trainings on a small text, and what two runs that must be equal are held to."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import torch

from minrnn import checkpoint
from minrnn.models import ModelConfig
from minrnn.recipes import TextConfig
from minrnn.runs import text as runs
from minrnn.train_config import TrainConfig

MODEL = ModelConfig(width=16, num_layers=1, dropout=0.1)
TRAIN = TrainConfig(steps=20, batch_size=4, warmup_steps=5, eval_every=5, log_every=2)

# Kills its own process at the n-th file that is synced or renamed: inside a save, or between two.
KILLER = """
import os, signal, sys, torch
torch.set_num_threads(1)
calls = 0
def killing(function, moment):
    def wrapped(*args, **named):
        global calls
        calls += 1
        if calls == int(sys.argv[1]) and moment == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        function(*args, **named)
    return wrapped
os.replace, os.fsync = killing(os.replace, "before"), killing(os.fsync, "before")
from minrnn.cli import main
sys.exit(main(["train", "--resume", sys.argv[2]]))
"""


def write_text(path: Path) -> Path:
    """A small text with something to learn in it."""
    path.write_text("".join(f"{n} and {n} are {2 * n}.\n" for n in range(200)))
    return path


def text_config(source: Path, out: Path, **fields: object) -> TextConfig:
    steps = fields.get("steps", TRAIN.steps)
    config = replace(TRAIN, **{"warmup_steps": min(TRAIN.warmup_steps, steps)} | fields)
    return TextConfig(data=source, out=out, context=16, model=MODEL, train=config)


def trained(source: Path, out: Path, **fields: object) -> Path:
    runs.go_on(runs.start(text_config(source, out, **fields)))
    return out


def assert_same_run(ours: Path, theirs: Path) -> None:
    assert (ours / "metrics.jsonl").read_bytes() == (theirs / "metrics.jsonl").read_bytes()
    for name in ("model.safetensors", "training_state/last.safetensors"):
        tensors, notes = checkpoint.read_tensors(ours / name)
        expected, expected_notes = checkpoint.read_tensors(theirs / name)
        assert notes == expected_notes
        assert tensors.keys() == expected.keys()
        assert all(torch.equal(tensors[key], x) for key, x in expected.items())
    assert list(ours.rglob("*.tmp")) == []


def python(script: str, *args: object, **options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", script, *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, **options)
