"""Trainings by several processes are those of one."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks

from minrnn import checkpoint, launching
from minrnn.data import text
from minrnn.data.batch import Batch
from minrnn.data.windows import Windows
from minrnn.models import LanguageModel, ModelConfig
from minrnn.ranks import Ranks, is_on_cpu
from minrnn.tasks import TextTask
from minrnn.train import train
from minrnn.train_config import TrainConfig
from tests.training import write_text

CONFIG = TrainConfig(
    steps=50, batch_size=8, warmup_steps=5, learning_rate=1e-2, eval_every=25, log_every=1
)
MODEL = ModelConfig(vocab_size=256, width=8, num_layers=2, dropout=0.0)


def _train(folder: Path, config: TrainConfig, order: str = "random") -> None:
    """Train a model of float64 in a run folder, in this process and those beside it."""
    if not dist.is_initialized() or dist.get_rank() == 0:
        folder.mkdir(exist_ok=True)
        checkpoint.write_config(folder, {"model": checkpoint.dataclasses.asdict(MODEL)})
    if dist.is_initialized():
        dist.barrier()
    torch.manual_seed(0)
    model = LanguageModel(MODEL).double()
    windows = Windows(text.load(folder.parent / "corpus"), 16, order, config.batch_size)
    train(model, TextTask(windows, 500), config, folder)


def _curve(folder: Path) -> list[float]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [x for row in lines for key, x in row.items() if key in ("loss", "valid_loss")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    text.build(write_text(folder / "text.txt"), folder / "corpus", "bytes", 0.1)
    for order in ("random", "consecutive"):
        _train(folder / f"one-{order}", CONFIG, order)
    return folder


def _check_trainings(folder: Path, ranks: int) -> None:
    for order in ("random", "consecutive"):
        for time_ranks in (1, 2, 4):
            if ranks % time_ranks == 0:
                config = replace(CONFIG, time_ranks=time_ranks)
                _train(folder / f"{ranks}-{time_ranks}-{order}", config, order)
    _train(folder / f"{ranks}-chunk", replace(CONFIG, chunk=5, accumulation=2), "consecutive")
    _train(folder / f"{ranks}-time-chunk", replace(CONFIG, chunk=4, time_ranks=2), "consecutive")
    # what `accelerate launch --use_fsdp --fsdp_version 2` says
    os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    sharded, original = [], launching.fully_shard
    launching.fully_shard = lambda part: sharded.append(type(part).__name__) or original(part)
    _train(folder / f"{ranks}-sharded-random", CONFIG)
    assert sharded == ["Block", "Block", "LanguageModel"]
    _train(folder / f"{ranks}-sharded-time-random", replace(CONFIG, time_ranks=2))


@pytest.mark.long
@pytest.mark.parametrize("ranks", [2, 4])
def test_curves_are_those_of_one_process(folder, ranks) -> None:
    on_ranks(ranks, _check_trainings, folder, ranks)
    for made in folder.glob(f"{ranks}-*"):
        order = "random" if made.name.endswith("random") else "consecutive"
        wanted = _curve(folder / f"one-{order}")
        assert len(wanted) == 52
        assert _curve(made) == pytest.approx(wanted, abs=1e-5), made.name
        ours, _ = checkpoint.read_tensors(made / "model.safetensors")
        theirs, _ = checkpoint.read_tensors(folder / f"one-{order}" / "model.safetensors")
        for name, x in theirs.items():
            torch.testing.assert_close(ours[name], x, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("asked", "on_cpu"), [("true", True), ("1", True), ("false", False)])
def test_a_gpu_is_left_alone_if_asked(monkeypatch, asked, on_cpu) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    # what `accelerate launch --cpu` sets
    monkeypatch.setenv("ACCELERATE_USE_CPU", asked)
    assert is_on_cpu() == on_cpu


def test_processes_share_each_piece_of_a_sequence() -> None:
    steps = torch.arange(24).repeat(2, 1)
    batch = Batch(steps, steps + 1, steps >= 0)
    three = [Ranks(time=n, num_time=3) for n in range(3)]
    assert three[1].part(batch).inputs[0].tolist() == list(range(8, 16))
    assert three[1].part(batch, chunk=100).inputs[0].tolist() == list(range(8, 16))
    assert three[2].part(batch, chunk=4).inputs[0].tolist() == [8, 9, 10, 11, 20, 21, 22, 23]
    pieces = torch.stack([one.part(batch, 2).targets.unflatten(1, (4, 2)) for one in three], 2)
    assert pieces.flatten(1).equal(batch.targets)
    for num_time, chunk, message in (
        (5, 0, "multiple of 20 steps, `time_ranks` = 5, got 24"),
        (3, 5, "multiple of 15 steps, `time_ranks` = 3 times `chunk` = 5, got 24"),
        (25, 0, "multiple of 25 steps, `time_ranks` = 25, got 24"),
    ):
        with pytest.raises(ValueError, match=message):
            Ranks(num_time=num_time).part(batch, chunk)
