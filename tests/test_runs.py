"""Runs over texts: what is refused before one begins, and what a run is held to afterwards."""

import json
import os
import signal
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from training import MODEL, TRAIN, assert_same_run, text_config, trained, write_text

from minrnn import checkpoint, cli
from minrnn.data import text
from minrnn.recipes import RECIPES, TextConfig
from minrnn.runs import text as runs
from minrnn.train import Event
from minrnn.train_config import TrainConfig

SMALL = ["--steps", "2", "--context", "8", "--width", "8", "--num-layers", "1", "--batch-size", "2"]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "text.txt")


@pytest.fixture(scope="module")
def corpus_run(source: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A corpus, and a run on it."""
    folder = tmp_path_factory.mktemp("corpus")
    text.build(source, folder / "corpus", "bytes", 0.2)
    return folder / "corpus", trained(folder / "corpus", folder / "run", steps=2, eval_every=2)


def _refused(capsys: pytest.CaptureFixture[str], *args: object) -> str:
    """The one line that says why `args` were refused."""
    capsys.readouterr()
    assert cli.main([str(a) for a in args]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    return said


@pytest.mark.parametrize(
    ("content", "kind", "fraction"),
    [
        (lambda x: x[::-1], "bytes", 0.2),
        (lambda x: x + x, "bytes", 0.2),
        (lambda x: x, "bytes", 0.1),
        # the same ids, with other characters for them
        (lambda x: x, "renamed", 0.2),
    ],
    ids=["other", "longer", "split", "tokenizer"],
)
def test_a_corpus_that_was_rebuilt_is_refused(
    source, tmp_path, capsys, content: Callable[[bytes], bytes], kind, fraction
) -> None:
    text.build(source, tmp_path / "corpus", "bytes", 0.2)
    run = trained(tmp_path / "corpus", tmp_path / "run", steps=2, eval_every=2)
    other = tmp_path / "other.txt"
    other.write_bytes(content(source.read_bytes()))
    tokenizer = kind
    if kind == "renamed":
        tokenizer = text.Characters("".join(map(chr, range(1, 257))))
        other.write_text("".join(chr(byte + 1) for byte in source.read_bytes()))
    text.build(other, tmp_path / "corpus", tokenizer, fraction)
    for command in (["eval", run], ["train", "--resume", run]):
        said = _refused(capsys, *command)
        assert f"the text of {run} has changed since its training began: the corpus" in said
    assert cli.main(["info", str(run)]) == 0
    # rebuilt as it was
    text.build(source, tmp_path / "corpus", "bytes", 0.2)
    assert cli.main(["eval", str(run)]) == 0


def test_a_running_training_keeps_its_corpus(corpus_run, source, tmp_path, monkeypatch) -> None:
    corpus, _ = corpus_run
    refused = []

    def rebuild(progress: runs.Progress, event: Event) -> None:
        with pytest.raises(ValueError, match="another process is at work in") as error:
            text.build(source, corpus, "bytes", 0.3)
        refused.append(error)

    monkeypatch.setattr(runs.Progress, "report", rebuild)
    trained(corpus, tmp_path / "run", steps=2, eval_every=2)
    assert refused


def test_eval_reads_corpora_as_corpora(corpus_run, source, tmp_path, capsys) -> None:
    corpus, run = corpus_run
    assert cli.main(["eval", str(run)]) == 0
    own = json.loads(capsys.readouterr().out)
    assert cli.main(["eval", str(run), "--data", str(corpus)]) == 0
    assert json.loads(capsys.readouterr().out) == own
    assert cli.main(["eval", str(run), "--data", str(corpus), "--valid-limit", "9"]) == 0
    assert json.loads(capsys.readouterr().out)["symbols"] == 9
    text.build(source, tmp_path / "other", "characters", 0.2)
    said = _refused(capsys, "eval", run, "--data", tmp_path / "other")
    assert f"must have the tokenizer of {run} (bytes, 256 tokens), its own is another" in said
    for data in (run, run / "config.json", run / "model.safetensors", run / "loss.png"):
        if data.exists():
            assert "`data` must hold text" in _refused(capsys, "eval", run, "--data", data)
    (tmp_path / "one").write_text("x")
    assert "is too short" in _refused(capsys, "eval", run, "--data", tmp_path / "one")


@pytest.mark.parametrize("limit", [None, 40])
@pytest.mark.parametrize("order", ["random", "consecutive"])
def test_eval_prints_the_figure_of_the_training(source, tmp_path, capsys, limit, order) -> None:
    config = replace(text_config(source, tmp_path / "run", steps=2, eval_every=2), windows=order)
    runs.go_on(runs.start(replace(config, valid_limit=limit)))
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    [valid] = [row["valid_loss"] for row in map(json.loads, lines) if "valid_loss" in row]
    capsys.readouterr()
    assert cli.main(["eval", str(tmp_path / "run")]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["loss"] == pytest.approx(valid, rel=1e-5)
    whole = runs.corpus_of(tmp_path / "run").num_targets()
    assert figures["symbols"] == (limit or whole)
    assert cli.main(["eval", str(tmp_path / "run"), "--valid-limit", "0"]) == 0
    assert json.loads(capsys.readouterr().out)["symbols"] == whole > 40
    assert "`valid_limit` must be >= 0" in _refused(
        capsys, "eval", tmp_path / "run", "--valid-limit", "-1"
    )


def test_validation_is_bounded_by_what_is_trained_on() -> None:
    train = TrainConfig(eval_every=25, batch_size=64)
    assert TextConfig(train=train, context=256).num_validated == 25 * 64 * 256
    assert TextConfig(train=replace(train, batch_size=1), context=8).num_validated == 32_768
    assert TextConfig(train=train, valid_limit=0).num_validated == 0
    assert TextConfig(train=train, valid_limit=7).num_validated == 7
    assert RECIPES["demo"].num_validated == 32_768


def test_the_limit_is_kept_with_the_run(source, tmp_path) -> None:
    folder = runs.start(text_config(source, tmp_path / "run"))
    assert checkpoint.read_config(folder)["text"]["valid_limit"] == 32_768
    assert runs.read(folder).num_validated == 32_768


def test_a_stop_in_a_validation_is_heeded_and_resumed(source, tmp_path, monkeypatch) -> None:
    uninterrupted = trained(source, tmp_path / "one", steps=10)
    run, report = runs.start(text_config(source, tmp_path / "run", steps=10)), runs.Progress.report
    seen = []
    # twice in one validation, then in the last
    for first, step in ((5, 5), (5, 5), (6, 10)):

        def terminate(progress: runs.Progress, event: Event, first: int = first) -> None:
            report(progress, event)
            if event.num_validated is not None and event.step >= first:
                seen.append((event.step, event.num_validated, progress.num_valid))
                os.kill(os.getpid(), signal.SIGTERM)

        with monkeypatch.context() as patch:
            patch.setattr(runs.Progress, "report", terminate)
            result = runs.go_on(run)
        assert (result.step, result.interrupted) == (step, True)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    # each after one batch of 4 windows of 16
    whole = runs.corpus_of(run).num_targets()
    assert seen == [(5, 64, whole), (5, 64, whole), (10, 64, whole)]
    result = runs.go_on(run)
    assert (result.step, result.interrupted) == (10, False)
    assert_same_run(run, uninterrupted)


IMPOSSIBLE = {
    "heads": (["--mixer", "attention", "--width", "9"], "`num_heads` must divide `width` = 9"),
    "aaren": (["--mixer", "aaren", "--num-heads", "5"], "`num_heads` must divide `width` = 8"),
    "state": (["--mixer", "s4d", "--state-size", "3"], "`state_size` must be even, got 3"),
    "ranks": (["--time-ranks", "2"], "`time_ranks` = 2 must divide the number of processes, got 1"),
    "streams": (["--windows", "consecutive", "--batch-size", "999"], "each of `batch_size` = 999"),
    "window": (["--context", "99999"], "too short: its train part must have at least 100000"),
    "bpe": (["--tokenizer", "bpe:5"], "with V > 256 symbols, got 'bpe:5'"),
    "vocabulary": (["--vocab-size", "5"], "`vocab_size` is that of the text, got 5"),
}


@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_what_cannot_work_is_named_and_leaves_no_folder(source, tmp_path, capsys, name) -> None:
    options, said = IMPOSSIBLE[name]
    command = ["train", "text", "--data", source, "--out", tmp_path / "run", *SMALL]
    refused = _refused(capsys, *command, *options)
    assert said in refused
    assert "damaged" not in refused
    assert list(tmp_path.iterdir()) == []


def test_options_that_do_not_apply_to_a_corpus_are_refused(corpus_run, tmp_path, capsys) -> None:
    corpus, _ = corpus_run
    command = ["train", "text", "--data", corpus, "--out", tmp_path / "run", *SMALL]
    said = _refused(capsys, *command, "--tokenizer", "characters")
    assert f"`tokenizer` must be 'bytes', that of the corpus {corpus}, or left out" in said
    said = _refused(capsys, *command, "--valid-fraction", "0.1")
    assert "`valid_fraction` must be 0.2" in said
    assert list(tmp_path.iterdir()) == []
    same = ["--tokenizer", "bytes", "--valid-fraction", "0.2"]
    assert cli.main([*map(str, command), *same]) == 0
    capsys.readouterr()
    assert cli.main(["info", str(tmp_path / "run")]) == 0
    assert f"text {corpus} as bytes\n" in capsys.readouterr().out


@pytest.mark.parametrize("named", [True, False])
def test_of_starts_at_once_each_folder_goes_to_one(source, tmp_path, monkeypatch, named) -> None:
    monkeypatch.chdir(tmp_path)
    config = TextConfig(data=source, context=16, model=MODEL, train=TRAIN)
    config = replace(config, out=tmp_path / "run") if named else config
    barrier, made, refused = threading.Barrier(3), [], []

    def start() -> None:
        barrier.wait()
        try:
            made.append(runs.start(config))
        except ValueError as error:
            refused.append(str(error))

    threads = [threading.Thread(target=start) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(made)) == len(made) == (1 if named else 3)
    assert len(refused) == 3 - len(made)
    assert all("is not empty" in x or "another process is at work" in x for x in refused)
    for folder in made:
        assert runs.read(folder).context == 16
        assert runs.corpus_of(folder).num_tokens


def test_a_start_that_is_stopped_leaves_nothing(source, tmp_path, monkeypatch) -> None:
    def stop(progress: runs.Progress, done: int, total: int) -> None:
        raise KeyboardInterrupt

    config = text_config(source, tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(runs.Progress, "reading", stop)
        with pytest.raises(KeyboardInterrupt):
            runs.start(config)
    assert list(tmp_path.iterdir()) == []
    assert runs.start(config) == tmp_path / "run"


def test_a_prompt_may_be_any_text(corpus_run, monkeypatch, capsys) -> None:
    _, run = corpus_run
    seen = []

    def fake(model: object, tokenizer: object, prompt: str, stop: str | None, **_: object):
        seen.append((prompt, stop))
        return iter(())

    monkeypatch.setattr("minrnn.stream.generate", fake)
    for options in (["--prompt", "None", "--stop", "None"], ["--prompt", ""], []):
        assert cli.main(["generate", str(run), *options]) == 0
    assert seen == [("None", "None"), ("\n", None), ("\n", None)]
