"""Saves of a model that processes share: each writes its parts, and any number of them reads."""

import os
import pickle
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks
from shards import figures
from test_ranks import CONFIG as LONG
from test_ranks import _curve, _train
from torch import nn
from torch.distributed.fsdp import fully_shard

from minrnn import checkpoint, ranks, training_state
from minrnn.data import text
from tests.training import write_text

# the learning rate of a step does not depend on how many there are to be
CONFIG = replace(LONG, steps=12, eval_every=4, warmup_steps=2, min_learning_rate=1e-2)
LAST = Path("training_state", "last.safetensors")


class _Odd(nn.Module):
    """Sizes that two processes cannot share evenly, and some that they cannot share at all."""

    def __init__(self) -> None:
        super().__init__()
        self.few = nn.Linear(3, 1)
        self.odd = nn.Linear(5, 7)
        self.scalar = nn.Parameter(torch.randn(1))
        self.norm = nn.BatchNorm1d(7)
        self.tied = nn.Linear(5, 7)
        self.tied.weight = self.odd.weight


def _check_odd(folder: Path) -> None:
    torch.manual_seed(0)
    among = ranks.of()
    model = _Odd().double()
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters())
    for number, p in enumerate(model.parameters()):
        p.grad = torch.ones_like(p) * number
    optimizer.step()
    training = training_state.Training(model, optimizer, among)
    training_state.save(folder, training, [], lambda: {"step": 3}, 3)
    wanted = {name: training_state.whole(x) for name, x in model.state_dict().items()}
    moments = [training_state.whole(s["exp_avg"]) for s in optimizer.state.values()]
    if ranks.is_first():
        torch.save((wanted, moments), folder / "wanted.pt")


def _sharded(folder: Path, steps: int, order: str = "consecutive") -> None:
    os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    _train(folder, replace(CONFIG, steps=steps), order)


def _check_sharded(folder: Path) -> None:
    _check_odd(folder / "odd")
    _sharded(folder / "four", 4)
    # what the parts are: no process has written a whole tensor that it shares
    shards = folder / "four" / "training_state" / "shards-00000004"
    assert len(list(shards.iterdir())) == 2
    if ranks.is_first():
        for name in ("through", "full"):
            shutil.copytree(folder / "four", folder / name)
    dist.barrier()
    _sharded(folder / "through", 12)
    # a save of one process, in the format of before
    _sharded(folder / "plain", 12)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "write_tensors", _full_disk)
        with pytest.raises((checkpoint.SaveError, SystemExit)):
            _sharded(folder / "full", 8)


def _full_disk(path: Path, *args: object) -> None:
    raise checkpoint.SaveError(f"cannot save {path}: no space")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of two processes, and those of one that they are held to."""
    folder = tmp_path_factory.mktemp("shards")
    text.build(write_text(folder / "text.txt"), folder / "corpus", "bytes", 0.1)
    _train(folder / "plain", replace(CONFIG, steps=4), "consecutive")
    _train(folder / "one", CONFIG, "consecutive")
    (folder / "odd").mkdir()
    on_ranks(2, _check_sharded, folder)
    return folder


def _assert_close(ours: Path, theirs: Path) -> None:
    """Rounding apart: processes add in another order."""
    assert _curve(ours) == pytest.approx(_curve(theirs), abs=1e-9)
    weights, notes = checkpoint.read_tensors(ours / "model.safetensors")
    wanted, wanted_notes = checkpoint.read_tensors(theirs / "model.safetensors")
    assert notes == wanted_notes
    assert weights.keys() == wanted.keys()
    for name, x in wanted.items():
        torch.testing.assert_close(weights[name], x, atol=1e-9, rtol=0)


@pytest.mark.parametrize("name", ["through", "plain"])
def test_a_sharded_training_continues_from_any_save(folder, name) -> None:
    _assert_close(folder / name, folder / "one")
    # of older saves nothing is left
    kept = sorted(path.name for path in (folder / name / "training_state").iterdir())
    assert kept == ["last.safetensors", "shards-00000012"]


def test_one_process_continues_from_shards(folder, tmp_path) -> None:
    run = folder / "four-one"
    shutil.copytree(folder / "four", run)
    _train(run, CONFIG, "consecutive")
    _assert_close(run, folder / "one")
    assert [path.name for path in (run / "training_state").iterdir()] == ["last.safetensors"]
    tensors, notes = checkpoint.read_tensors(run / LAST)
    assert "shards" not in notes
    assert "optimizer.head.weight.exp_avg_sq" in tensors


def test_a_save_that_failed_leaves_the_one_before(folder) -> None:
    run = folder / "full"
    assert checkpoint.read_notes(run / LAST)["step"] == 4
    # shards of a save that does not count
    assert len(list((run / "training_state").glob("shards-*"))) == 2
    _train(run, CONFIG, "consecutive")
    _assert_close(run, folder / "one")
    assert not list((run / "training_state").glob("shards-*"))


def test_nothing_in_a_save_is_a_pickle(folder) -> None:
    for path in (folder / "through").rglob("*"):
        if path.is_file():
            with path.open("rb") as file, pytest.raises(Exception):  # noqa: B017, PT011
                pickle.load(file)
    assert {path.suffix for path in (folder / "through" / "training_state").rglob("*.*")} == {
        ".safetensors"
    }


@pytest.mark.parametrize("fault", ["cut", "flipped", "missing", "strange", "elsewhere"])
def test_damaged_shards_are_refused(folder, tmp_path, fault) -> None:
    run = folder / f"damaged-{fault}"
    shutil.copytree(folder / "four", run)
    shards = run / "training_state" / "shards-00000004"
    one, _ = sorted(shards.iterdir())
    content = bytearray(one.read_bytes())
    message = rf"{one.name} is damaged: its content does not fit its checksum"
    if fault == "cut":
        one.write_bytes(content[:-4])
    elif fault == "flipped":
        content[-4] ^= 1
        one.write_bytes(content)
    elif fault == "elsewhere":
        tensors, notes = checkpoint.read_tensors(run / LAST)
        notes["shards"]["folder"] = "../../four/training_state/shards-00000004"
        checkpoint.write_tensors(run / LAST, tensors, notes)
        shutil.rmtree(shards)
        message = "is damaged: it must have the files"
    else:
        message = "is damaged: it must have the files"
        one.rename(run / "aside") if fault == "missing" else (
            shards / "more.safetensors"
        ).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        _train(run, CONFIG, "consecutive")


def test_shards_of_another_model_are_refused(folder) -> None:
    run = folder / "other"
    shutil.copytree(folder / "four", run)
    training = training_state.Training(
        nn.Linear(3, 2), torch.optim.AdamW(nn.Linear(3, 2).parameters()), ranks.Ranks()
    )
    with pytest.raises(ValueError, match=r"does not fit its configuration: .* got \("):
        training_state.restore(run / "training_state", training)


def test_parameters_that_cannot_be_shared_evenly(folder) -> None:
    model = _Odd().double()
    optimizer = torch.optim.AdamW(model.parameters())
    training_state.restore(folder / "odd", training_state.Training(model, optimizer, ranks.Ranks()))
    wanted, moments = torch.load(folder / "odd" / "wanted.pt", weights_only=True)
    for name, x in model.state_dict().items():
        assert torch.equal(x, wanted[name]), name
    found = [optimizer.state[p]["exp_avg"] for p in model.parameters()]
    assert all(torch.equal(x, y) for x, y in zip(found, moments, strict=True))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("count", [2, 4])
def test_a_save_takes_no_more_memory_than_training(count) -> None:
    for found in figures(count):
        assert max(found["save"], found["weights"]) < 1.3 * found["training"]
        # the measurement sees what it is about
        assert found["gathered"] > 1.3 * found["training"]
