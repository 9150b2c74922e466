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

from minrnn import checkpoint, files, launching, plots, train
from minrnn.data import text
from minrnn.data.windows import Windows
from minrnn.evaluation import evaluate
from minrnn.models import LanguageModel
from minrnn.recipes import RECIPES, RL_RECIPES, fitted
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


@pytest.mark.long
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


def test_learning_rate_rises_then_falls_along_a_cosine() -> None:
    config = TrainConfig(steps=110, warmup_steps=10, learning_rate=1.0, min_learning_rate=0.1)
    rates = [config.learning_rate_at(step) for step in range(111)]
    assert rates[:10] == pytest.approx([0.1 * n for n in range(1, 11)])
    assert rates[10] == 1.0
    assert rates[60] == pytest.approx(0.55)
    assert rates[110] == pytest.approx(0.1)
    assert rates[10:] == sorted(rates[10:], reverse=True)


@pytest.mark.parametrize("learning_rate", [2e-5, 1e-3, 0.3, 1e-30])
@pytest.mark.parametrize("steps", [1, 7, 100, 101, 5000])
def test_the_schedule_follows_its_peak_and_its_length(learning_rate, steps) -> None:
    """The minimum is a tenth of the peak, and the warm-up no longer than the training."""
    config = TrainConfig(steps=steps, learning_rate=learning_rate)
    rates = [config.learning_rate_at(step) for step in range(steps + 1)]
    warmup = min(100, steps)
    assert max(rates) == pytest.approx(learning_rate, rel=1e-12)
    assert rates[warmup - 1] == pytest.approx(learning_rate, rel=1e-12)
    assert rates[:warmup] == sorted(rates[:warmup])
    assert rates[warmup:] == sorted(rates[warmup:], reverse=True)
    if steps > 100:
        assert rates[-1] == pytest.approx(learning_rate / 10, rel=1e-12)


def test_the_schedules_of_the_recipes_are_what_they_were() -> None:
    for config, lowest, warmup in (
        (RECIPES["shakespeare"], 1e-4, 100),
        (RECIPES["demo"], 4e-4, 50),
        (RL_RECIPES["paper"], 1e-3, 10_000),
        (RL_RECIPES["cpu"], 1e-5, 200),
    ):
        train_ = config.train
        explicit = replace(train_, min_learning_rate=lowest, warmup_steps=warmup)
        for step in (0, 7, warmup - 1, warmup, warmup + 1, train_.steps // 2, train_.steps):
            assert train_.learning_rate_at(step) == explicit.learning_rate_at(step)


@pytest.mark.parametrize("name", ["shakespeare", "demo", "paper", "cpu"])
def test_a_recipe_keeps_the_shape_of_its_schedule(name) -> None:
    recipe = (RECIPES | RL_RECIPES)[name]
    assert fitted(recipe, None, None) == recipe
    train_ = fitted(recipe, 5, 2e-5).train
    rates = [train_.learning_rate_at(step) for step in range(6)]
    assert max(rates) == pytest.approx(2e-5, rel=1e-12)
    # longer and higher
    train_ = fitted(recipe, 100_000, 0.01).train
    ratio = recipe.train.learning_rate_at(recipe.train.steps) / recipe.train.learning_rate
    assert train_.learning_rate_at(100_000) == pytest.approx(ratio * 0.01, rel=1e-9)
    with pytest.raises(ValueError, match="`steps` must be >= 1, got 0"):
        fitted(recipe, 0, None)
    with pytest.raises(ValueError, match=r"`learning_rate` must be > 0, got -1\.0"):
        fitted(recipe, None, -1.0)


def test_a_run_of_before_with_a_long_warm_up_is_read(source, tmp_path) -> None:
    run = trained(source, tmp_path / "run", steps=5)
    saved = checkpoint.read_config(run)
    saved["text"]["train"] |= {"min_learning_rate": 1e-2, "warmup_steps": 100}
    checkpoint.write_config(run, saved)
    config = runs.read(run).train
    assert (config.min_learning_rate, config.warmup_steps) == (1e-3, 5)


def test_a_run_that_was_stopped_at_once_has_no_picture(source, tmp_path) -> None:
    """And no warning, which is an error here."""
    run = runs.start(text_config(source, tmp_path / "run"))
    metrics = run / "metrics.jsonl"
    metrics.write_text("")
    assert plots.draw_loss(run) is None
    assert not (run / "loss.png").exists()
    metrics.write_text(json.dumps({"step": 1, "valid_loss": 2.0}) + "\n")
    assert plots.draw_loss(run) == run / "loss.png"


@pytest.mark.parametrize("ranks", [1, 3])
def test_one_process_alone_hashes_the_corpus(source, tmp_path, monkeypatch, ranks) -> None:
    run = trained(source, tmp_path / "run", steps=5)
    hashed = []
    sha256 = text.shards.sha256
    monkeypatch.setattr(text.shards, "sha256", lambda path: hashed.append(path) or sha256(path))
    monkeypatch.setattr(runs.ranks, "on_first", lambda make: None if ranks > 1 else make())
    monkeypatch.setattr(runs, "train", lambda *_: None)
    runs.go_on(run)
    assert len(hashed) == (1 if ranks == 1 else 0)
    assert text.load(run / "corpus", check=False).shards == text.load(run / "corpus").shards


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
        (
            "min_learning_rate",
            2e-3,
            r"`min_learning_rate` must be at most `learning_rate` = 0\.001",
        ),
        ("warmup_steps", 5001, "`warmup_steps` must be at most `steps` = 5000, got 5001"),
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
