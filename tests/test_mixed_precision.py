"""Training in bfloat16 and float16: it learns alike, and float16's scaler does what it must."""

import functools
import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from training import KILLER, assert_same_run, python, text_config, trained, write_text

from minrnn import checkpoint, train
from minrnn.data import shakespeare
from minrnn.data.windows import Windows
from minrnn.models import LanguageModel, ModelConfig
from minrnn.runs import text as runs
from minrnn.tasks import TextTask
from minrnn.train import NonFiniteLossError

ROOT = Path(__file__).parents[1]
# of the loss, from which it takes some thirty halvings until the gradient fits in float16
TOO_LARGE = 2.0**40
SCALED = f"""
import functools, torch
torch.amp.GradScaler = functools.partial(torch.amp.GradScaler, init_scale={TOO_LARGE})
{KILLER}"""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "text.txt")


@pytest.fixture
def scaled(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Sets what the scaler begins with."""
    scaler = torch.amp.GradScaler

    def begin_with(scale: float) -> None:
        patched = functools.partial(scaler, init_scale=scale)
        monkeypatch.setattr(torch.amp, "GradScaler", patched)

    return begin_with


def _lines(run: Path, name: str) -> list[float]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line[name] for line in lines if name in line]


def test_losses_are_those_of_float32(source, tmp_path) -> None:
    options = {"steps": 60, "eval_every": 20, "learning_rate": 1e-2}
    names = {"no": "float32", "bf16": "bfloat16", "fp16": "float16"}
    runs_of = {
        name: trained(source, tmp_path / name, precision=precision, **options)
        for precision, name in names.items()
    }
    wanted = _lines(runs_of["float32"], "valid_loss")
    assert wanted[-1] < 2.0
    # The second is taken where the loss falls by 1.4 % a step: rounding moves it by up to 0.08 of
    # a step (float16, processors with AVX512-FP16; without 0.015). The last, where it is flat, is
    # measured at most 2.0e-3 and 3.4e-4 off; not 0, which would be float32 under another name.
    for name, tolerance in (("bfloat16", 1e-2), ("float16", 1e-3)):
        losses = _lines(runs_of[name], "valid_loss")
        assert losses == pytest.approx(wanted, rel=1e-2)
        assert losses[-1] == pytest.approx(wanted[-1], rel=tolerance)
        assert losses != wanted


@pytest.mark.slow
def test_losses_of_the_demo_are_those_of_float32(tmp_path) -> None:
    """Its model and learning rates, over 150 steps with short sequences."""
    data = tmp_path / "plays.txt"
    data.write_text(shakespeare.plays(), encoding="utf-8")
    options = "--steps 150 --batch-size 8 --context 32 --eval-every 25 --valid-limit 2048"
    command = [sys.executable, ROOT / "docs" / "loss_curves.py", "--data", data]
    command += ["--out", tmp_path / "runs", *options.split()]
    done = subprocess.run(command, capture_output=True, text=True)
    # it exits with 1 if an evaluation is more than 1 % off
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line for line in done.stdout.splitlines() if line.startswith("| ")]
    assert len(rows) == 2 + 150 // 25


def _train(source: Path, folder: Path, **fields: object) -> LanguageModel:
    """Trains, in float16 if nothing else is said, with what surrounds it in a run left out."""
    folder.mkdir()
    checkpoint.write_config(folder, {})
    config = text_config(source, folder, **({"precision": "fp16"} | fields))
    corpus = runs.text_data.build(source, folder / "corpus", "characters", 0.1)
    torch.manual_seed(0)
    model = LanguageModel(ModelConfig(corpus.tokenizer.vocab_size, 16, num_layers=1, dropout=0.0))
    train.train(model, TextTask(Windows(corpus, 16)), config.train, folder)
    return model


def test_a_step_that_overflows_is_skipped_and_halves_the_scale(source, tmp_path, scaled) -> None:
    scaled(TOO_LARGE)
    torch.manual_seed(0)
    one = _train(source, tmp_path / "1", steps=1, log_every=1)
    two = _train(source, tmp_path / "2", steps=2, log_every=1)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert _lines(tmp_path / "2", "loss_scale") == [TOO_LARGE / 2, TOO_LARGE / 4]
    tensors, _ = checkpoint.read_tensors(tmp_path / "2" / "training_state" / "last.safetensors")
    assert not any(x.any() for name, x in tensors.items() if name.startswith("optimizer."))
    # a norm that is not finite has no place in JSON
    assert _lines(tmp_path / "2", "grad_norm") == []
    many = _train(source, tmp_path / "60", steps=60, log_every=1, learning_rate=1e-2)
    assert not torch.equal(many.head.weight, one.head.weight)
    scales, norms = (_lines(tmp_path / "60", name) for name in ("loss_scale", "grad_norm"))
    skipped = 60 - len(norms)
    assert scales[: skipped + 1][-1] == TOO_LARGE / 2**skipped == scales[-1]
    assert _lines(tmp_path / "60", "loss")[-1] < 2.6 < _lines(tmp_path / "60", "loss")[0]


def test_gradients_are_clipped_after_the_scale_is_taken_out(source, tmp_path, scaled) -> None:
    options = {"steps": 1, "log_every": 1, "clip_norm": 0.05}
    _train(source, tmp_path / "float32", precision="no", **options)
    wanted = _lines(tmp_path / "float32", "grad_norm")
    for scale in (2.0**4, 2.0**14):
        scaled(scale)
        folder = tmp_path / str(scale)
        _train(source, folder, **options)
        # measured 4.3e-5
        assert _lines(folder, "grad_norm") == pytest.approx(wanted, rel=1e-4)
        tensors, _ = checkpoint.read_tensors(folder / "training_state" / "last.safetensors")
        means = torch.cat([x.flatten() for name, x in tensors.items() if name.endswith("exp_avg")])
        # after one step a tenth of the gradient
        assert 10 * means.norm().item() == pytest.approx(0.05, rel=1e-4)


def test_a_gradient_that_is_never_finite_stops(source, tmp_path, scaled, monkeypatch) -> None:
    scaled(4.0)
    loss = TextTask.loss

    def steep(task: TextTask, answers: Tensor, batch: train.Batch) -> Tensor:
        if answers.requires_grad:
            answers.register_hook(lambda grad: grad * float("inf"))
        return loss(task, answers, batch)

    monkeypatch.setattr(TextTask, "loss", steep)
    # scales of 4 and 2 are given up first
    with pytest.raises(NonFiniteLossError, match=r"the gradient's norm became \w+ in step 3"):
        _train(source, tmp_path / "run", steps=10)


@pytest.mark.long
def test_killed_and_resumed_in_float16_it_ends_the_same(source, tmp_path, scaled) -> None:
    scaled(TOO_LARGE)
    options = {"precision": "fp16", "accumulation": 2, "steps": 40, "eval_every": 10}
    uninterrupted = trained(source, tmp_path / "uninterrupted", **options)
    run = runs.start(text_config(source, tmp_path / "run", **options))
    # inside the save of step 20, and after that of step 30
    for calls in (15, 6):
        assert python(SCALED, calls, run).returncode == -signal.SIGKILL
    last = run / "training_state" / "last.safetensors"
    assert checkpoint.read_tensors(last)[1]["scaler"]["scale"] < TOO_LARGE / 2**9
    runs.go_on(run)
    assert_same_run(run, uninterrupted)
    assert checkpoint.read_tensors(last)[1]["scaler"]["_growth_tracker"] > 0


def test_a_save_without_a_scaler_is_refused(source, tmp_path) -> None:
    run = trained(source, tmp_path / "run", steps=5)
    saved = checkpoint.read_config(run)
    saved["text"]["train"] |= {"precision": "fp16", "steps": 10}
    checkpoint.write_config(run, saved)
    with pytest.raises(ValueError, match=r"is no training state: it has no 'scaler'"):
        runs.go_on(run)
