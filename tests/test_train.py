"""Training: it learns, and whatever interrupts it, it ends with the same weights and metrics."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from training import (
    KILLER,
    MODEL,
    TRAIN,
    assert_same_run,
    python,
    text_config,
    trained,
    write_text,
)

from minrnn import checkpoint, files, launching, train
from minrnn.data import text
from minrnn.data.windows import Windows
from minrnn.evaluation import evaluate
from minrnn.models import LanguageModel
from minrnn.recipes import RECIPES
from minrnn.runs import text as runs
from minrnn.tasks import TextTask
from minrnn.train import NonFiniteLossError
from minrnn.train_config import TrainConfig


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "text.txt")


@pytest.fixture(scope="module")
def uninterrupted(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that all others must equal."""
    return trained(source, tmp_path_factory.mktemp("runs") / "uninterrupted")


def test_run_folder_holds_what_it_says(uninterrupted: Path) -> None:
    names = {path.name for path in uninterrupted.iterdir()}
    assert names >= {"config.json", "model.safetensors", "metrics.jsonl", "corpus", "tensorboard"}
    lines = (uninterrupted / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["step"] for row in rows if "valid_loss" in row] == [5, 10, 15, 20]
    assert [row["step"] for row in rows if "loss" in row] == list(range(2, 21, 2))
    _, notes = checkpoint.read_tensors(uninterrupted / "training_state" / "last.safetensors")
    best = min((row for row in rows if "valid_loss" in row), key=lambda row: row["valid_loss"])
    assert (notes["best_loss"], notes["best_step"]) == (best["valid_loss"], best["step"])
    split = json.loads((uninterrupted / "config.json").read_text())["split"]
    assert split["train"][1] == split["valid"][0] == int(0.9 * split["valid"][1])


def test_weights_on_disk_have_the_best_loss(uninterrupted: Path) -> None:
    model, _ = checkpoint.load(uninterrupted)
    task = TextTask(Windows(text.load(uninterrupted / "corpus"), 16))
    _, notes = checkpoint.read_tensors(uninterrupted / "training_state" / "last.safetensors")
    assert evaluate(model, task.loss, task.validation(4)) == notes["best_loss"]


def test_training_learns(source: Path, tmp_path) -> None:
    run = trained(source, tmp_path / "run", steps=150, learning_rate=1e-2, eval_every=150)
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    # an untrained model stands at log 18 = 2.9
    assert last["valid_loss"] < 1.2


def test_killed_inside_saves_and_resumed_it_ends_the_same(source, tmp_path, uninterrupted) -> None:
    run = tmp_path / "run"
    run.mkdir()
    # a run that was killed before its text was read
    checkpoint.write_config(run, {"text": runs._to_json(text_config(source, run))})
    # calls that sync or rename, in the order in which a life makes them: 3 for each file (content,
    # name, folder): ids, corpus and configuration once; at each evaluation the metrics (1 call),
    # the last state and the best weights; and weights that a killed life still owed
    for calls in (1, 4, 9, 9, 10, 5, 8, 2):
        assert python(KILLER, calls, run).returncode == -signal.SIGKILL
    ended = python(KILLER, 10_000, run)
    assert ended.returncode == 0, ended.stderr
    assert_same_run(run, uninterrupted)


def test_stopped_by_sigterm_it_saves_and_resumes(source, tmp_path, uninterrupted) -> None:
    run = runs.start(text_config(source, tmp_path / "run"))
    report = runs.Progress.report

    def terminate(progress: runs.Progress, event: train.Event) -> None:
        report(progress, event)
        if event.step == 7 and event.valid_loss is None:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs.Progress, "report", terminate)
        result = runs.go_on(run)
    assert (result.step, result.interrupted) == (7, True)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert runs.go_on(run).step == 20
    assert_same_run(run, uninterrupted)


def test_a_finished_run_stays_as_it_is(source, tmp_path) -> None:
    run = trained(source, tmp_path / "run", steps=5)
    before = {path: path.read_bytes() for path in run.rglob("*.safetensors")}
    assert runs.go_on(run).step == 5
    assert {path: path.read_bytes() for path in run.rglob("*.safetensors")} == before


def test_patience_ends_a_training_that_gets_no_better(source, tmp_path) -> None:
    # no weight moves by so little, so that all evaluations are equal
    options = {"learning_rate": 1e-20, "min_learning_rate": 0.0, "eval_every": 2}
    result = runs.go_on(runs.start(text_config(source, tmp_path, **options, patience=3)))
    assert (result.step, result.best_step) == (8, 2)
    assert not result.interrupted
    again = runs.go_on(tmp_path)
    assert again == result


def test_a_full_disk_keeps_the_save_before(source, tmp_path, uninterrupted) -> None:
    run = runs.start(text_config(source, tmp_path / "run"))
    writes = checkpoint.write_tensors

    def full(path: Path, *args: object) -> None:
        if path.name == "last.safetensors" and path.exists():
            raise _Stop
        writes(path, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "write_tensors", full)
        with pytest.raises(_Stop):
            runs.go_on(run)
    # a real process whose files cannot grow beyond 4 kB
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))"
    failed = python(f"{limit}\n{KILLER}", 10_000, run)
    assert failed.returncode == 2
    assert "cannot save" in failed.stderr
    assert "File too large; the file that was there is whole" in failed.stderr
    assert checkpoint.read_tensors(run / "training_state" / "last.safetensors")[1]["step"] == 5
    runs.go_on(run)
    assert_same_run(run, uninterrupted)


class _Stop(Exception):
    """Ends a training from within."""


def test_a_non_finite_loss_stops_and_keeps_the_last_save(source, tmp_path) -> None:
    run = runs.start(text_config(source, tmp_path / "run"))
    with pytest.MonkeyPatch.context() as patch:
        loss = TextTask.loss
        calls = iter(range(10_000))

        def broken(task: TextTask, answers: torch.Tensor, batch: object) -> torch.Tensor:
            # 5 steps and an evaluation pass, one more step, then the loss breaks
            return loss(task, answers, batch) * (float("nan") if next(calls) >= 20 else 1.0)

        patch.setattr(TextTask, "loss", broken)
        with pytest.raises(NonFiniteLossError, match=r"became nan in step \d+; the save of step 5"):
            runs.go_on(run)
    tensors, notes = checkpoint.read_tensors(run / "training_state" / "last.safetensors")
    assert notes["step"] == 5
    assert all(torch.isfinite(x).all() for x in tensors.values())


def test_a_damaged_save_is_refused(source, tmp_path) -> None:
    run = trained(source, tmp_path / "run", steps=5)
    last = run / "training_state" / "last.safetensors"
    last.write_bytes(last.read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"last\.safetensors is damaged or truncated"):
        runs.go_on(run)


def test_accumulation_gives_the_gradient_of_the_whole_batch(source, tmp_path) -> None:
    config = text_config(source, tmp_path / "run", steps=1, batch_size=8, weight_decay=0.0)
    updates = []
    for accumulation in (1, 4):
        torch.manual_seed(0)
        model = LanguageModel(replace(MODEL, vocab_size=256, dropout=0.0))
        folder = tmp_path / str(accumulation)
        folder.mkdir()
        checkpoint.write_config(folder, {})
        task = TextTask(Windows(text.build(source, folder / "corpus", "bytes", 0.1), 16))
        # the parts of the second run are the rows of the first run's batch
        whole = task.batch(8, (0, 0, 0))
        parts = iter(train.Batch(whole.inputs[n], whole.targets[n], whole.mask[n])
                     for n in torch.arange(8).split(8 // accumulation))  # fmt: skip
        task.batch = lambda size, seed, rows, parts=parts: next(parts)
        train.train(model, task, replace(config.train, accumulation=accumulation), folder)
        updates.append(model.head.weight.detach())
    torch.testing.assert_close(updates[0], updates[1], rtol=1e-4, atol=1e-6)


def test_learning_rate_rises_then_falls_along_a_cosine() -> None:
    config = TrainConfig(steps=110, warmup_steps=10, learning_rate=1.0, min_learning_rate=0.1)
    rates = [config.learning_rate_at(step) for step in range(111)]
    assert rates[:10] == pytest.approx([0.1 * n for n in range(1, 11)])
    assert rates[10] == 1.0
    assert rates[60] == pytest.approx(0.55)
    assert rates[110] == pytest.approx(0.1)
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_vectors_are_not_decayed() -> None:
    model = LanguageModel(replace(MODEL, vocab_size=5))
    optimizer = launching.optimizer_of(model, TRAIN)
    decayed = {id(p) for g in optimizer.param_groups if g["weight_decay"] for p in g["params"]}
    for name, parameter in model.named_parameters():
        vector = name.endswith("bias") or "norm" in name or "bias_ih" in name
        assert (id(parameter) in decayed) is not vector, name


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("steps", 0, "`steps` must be >= 1, got 0"),
        ("batch_size", 0, "`batch_size` must be >= 1, got 0"),
        ("learning_rate", 0.0, r"`learning_rate` must be > 0, got 0\.0"),
        ("clip_norm", -1.0, r"`clip_norm` must be > 0, got -1\.0"),
        ("weight_decay", -0.1, r"`weight_decay` must be >= 0, got -0\.1"),
        ("beta2", 1.0, r"`beta2` must be in \[0, 1\), got 1\.0"),
        ("accumulation", 3, "`batch_size` = 64 must be a multiple of `accumulation` = 3"),
    ],
)
def test_wrong_settings_are_named(field: str, value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig(**{field: value})


def test_recipes_are_what_they_say() -> None:
    paper = RECIPES["shakespeare"]
    assert (paper.context, paper.train.batch_size, paper.train.steps) == (256, 64, 5000)
    assert (paper.model.width, paper.model.num_layers, paper.model.expansion) == (384, 3, 2)
    assert (paper.train.eval_every, paper.train.learning_rate) == (25, 1e-3)
    # the validation part of tiny Shakespeare, 111,540 characters, is read whole
    assert paper.num_validated == 25 * 64 * 256 > 111_540
    assert all(name == config.recipe for name, config in RECIPES.items())


def test_what_a_resume_needs_must_be_there(source, tmp_path) -> None:
    run = trained(source, tmp_path / "run", steps=10)
    metrics, weights = run / "metrics.jsonl", run / "model.safetensors"
    last = run / "training_state" / "last.safetensors"
    metrics.write_bytes(metrics.read_bytes()[:-5])
    with pytest.raises(ValueError, match=r"metrics\.jsonl is damaged: it must have at least"):
        runs.go_on(run)
    last.rename(run / "aside")
    with pytest.raises(ValueError, match=r"has weights, but .*last\.safetensors is missing"):
        runs.go_on(run)
    weights.rename(last)
    with pytest.raises(ValueError, match="is no training state: it has no 'best_step'"):
        runs.go_on(run)


def test_a_text_that_changed_is_refused(source, tmp_path) -> None:
    copy, run = tmp_path / "text", tmp_path / "run"
    copy.write_bytes(source.read_bytes())
    trained(copy, run, steps=5)
    [tokens] = (run / "corpus").glob("tokens*.bin")
    tokens.write_bytes(tokens.read_bytes()[::-1])
    with pytest.raises(ValueError, match=r"tokens-00000-\w+\.bin is damaged"):
        runs.go_on(run)
    (run / "corpus" / "corpus.json").unlink()
    copy.write_bytes(source.read_bytes()[::-1])
    with pytest.raises(ValueError, match="has changed since its training began"):
        runs.go_on(run)


def test_two_processes_cannot_train_one_run(source, tmp_path) -> None:
    run = trained(source, tmp_path / "run", steps=5)
    with (
        files.locked(run / ".lock"),
        pytest.raises(ValueError, match=r"another process is at work in .*run"),
    ):
        runs.go_on(run)


def test_a_run_folder_inside_its_text_is_refused(source, tmp_path) -> None:
    (tmp_path / "a.txt").write_bytes(source.read_bytes())
    with pytest.raises(ValueError, match="lies inside the text's folder"):
        runs.start(text_config(tmp_path, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_killed_at_any_time_and_resumed_it_ends_the_same(source, tmp_path, uninterrupted) -> None:
    run = runs.start(text_config(source, tmp_path / "run"))
    command = [sys.executable, "-c", KILLER, "10000", str(run)]
    for lives in range(12):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        # from before the first step to after the last, whatever the machine's speed
        time.sleep(2.0 + 0.15 * lives)
        process.kill()
        process.wait()
    assert python(KILLER, 10_000, run).returncode == 0
    assert_same_run(run, uninterrupted)


def test_errors_of_the_logs_are_save_errors(source, tmp_path, monkeypatch) -> None:
    run = runs.start(text_config(source, tmp_path / "run"))

    sync = os.fsync

    def full(handle: int) -> None:
        if os.readlink(f"/proc/self/fd/{handle}").endswith("metrics.jsonl"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(handle)

    monkeypatch.setattr(train.os, "fsync", full)
    with pytest.raises(
        checkpoint.SaveError, match=r"cannot write .*metrics\.jsonl: .*No space left"
    ):
        runs.go_on(run)
