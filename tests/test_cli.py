"""The command: what it prints, and one line with exit code 2 for whatever a person gets wrong."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from minrnn import cli, info, recipes
from minrnn.runs import text as runs

SMALL = ["--context", "16", "--width", "16", "--num-layers", "1", "--steps", "4"]
SMALL += ["--batch-size", "4", "--eval-every", "2", "--valid-limit", "100"]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small text."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("To be, or not to be, that is the question.\n" * 30)
    return path


@pytest.fixture(scope="module")
def run(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small run, trained by the command."""
    out = tmp_path_factory.mktemp("runs") / "run"
    assert cli.main(["train", "text", "--data", str(source), "--out", str(out), *SMALL]) == 0
    return out


def _refused(capsys: pytest.CaptureFixture[str], *args: object) -> str:
    """The one line that says why `args` were refused."""
    capsys.readouterr()
    assert cli.main([str(a) for a in args]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1
    assert said.err.startswith("minrnn")
    return said.err


def test_training_writes_a_whole_run(run: Path, capsys) -> None:
    names = {path.name for path in run.iterdir()}
    assert {"config.json", "model.safetensors", "metrics.jsonl", "loss.png"} <= names
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert any((run / "tensorboard").iterdir())
    assert cli.main(["train", "--resume", str(run)]) == 0
    assert "best validation loss" in capsys.readouterr().out


def test_the_first_free_folder_is_taken(source: Path, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("demo", "demo-2"):
        args = ["train", "text", "--recipe", "demo", "--data", str(source), *SMALL]
        assert cli.main(args) == 0
        assert runs.read(Path("runs") / name).train.steps == 4


def test_a_recipe_fills_in_what_is_not_given(source: Path, tmp_path, monkeypatch) -> None:
    seen = []
    monkeypatch.setattr("minrnn.cli.text.train_text", lambda config: seen.append(config) or 0)
    cli.main(["train", "text", "--recipe", "demo", "--data", str(source), "--width", "9"])
    demo = recipes.RECIPES["demo"]
    assert seen[0].model.width == 9
    assert (seen[0].train, seen[0].context, seen[0].recipe) == (demo.train, demo.context, "demo")


@pytest.mark.parametrize(
    ("kind", "name"), [("text", "demo"), ("text", "shakespeare"), ("rl", "paper")]
)
def test_a_recipe_follows_the_steps_and_the_rate_that_are_given(monkeypatch, kind, name) -> None:
    seen = []
    function = f"minrnn.cli.{kind}.train_{kind}"
    monkeypatch.setattr(function, lambda config: seen.append(config) or 0)
    command = ["train", kind, "--recipe", name, "--steps", "9", "--learning-rate", "2e-5"]
    assert cli.main(command) == 0
    rates = [seen[0].train.learning_rate_at(step) for step in range(10)]
    assert max(rates) == pytest.approx(2e-5, rel=1e-12)


def test_a_schedule_that_rises_is_refused(capsys) -> None:
    few = ("train", "text", "--steps", "9")
    assert "`warmup_steps` must be at most `steps` = 9" in _refused(
        capsys, *few, "--warmup-steps", "10"
    )
    low = ("train", "text", "--learning-rate", "2e-5", "--min-learning-rate", "1e-4")
    assert "`min_learning_rate` must be at most `learning_rate` = 2e-05" in _refused(capsys, *low)


def test_eval_measures_the_whole_validation_part(run: Path, source: Path, capsys) -> None:
    assert cli.main(["eval", str(run), "--valid-limit", "0"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["symbols"] == 129 - 1
    assert figures["bits"] == pytest.approx(figures["loss"] * 1.442695, rel=1e-6)
    assert cli.main(["eval", str(run), "--data", str(source), "--context", "8"]) == 0
    other = json.loads(capsys.readouterr().out)
    assert other["symbols"] == 43 * 30 - 1
    assert other["context"] == 8


def test_eval_reads_as_the_training_validated(source: Path, tmp_path, capsys) -> None:
    run = tmp_path / "streams"
    options = ["--width", "8", "--num-layers", "1", "--context", "16", "--batch-size", "4"]
    options += ["--windows", "consecutive", "--steps", "4", "--out", str(run)]
    assert cli.main(["train", "text", "--data", str(source), *options]) == 0
    best = float(re.findall(r"best validation loss (\S+) nats", capsys.readouterr().out)[0])
    assert cli.main(["eval", str(run)]) == 0
    assert json.loads(capsys.readouterr().out)["loss"] == pytest.approx(best, abs=1e-4)


def test_generate_streams_what_was_asked_for(run: Path, capsys) -> None:
    command = ["generate", str(run), "--prompt", "To be", "--length", "30", "--seed", "1"]
    assert cli.main(command) == 0
    first = capsys.readouterr().out
    assert len(first) == 31
    assert cli.main([*command, "--stop", first[10:12]]) == 0
    assert capsys.readouterr().out == first[: first.index(first[10:12])] + "\n"
    assert cli.main([*command, "--top-k", "1"]) == 0
    greedy = capsys.readouterr().out
    for options in (["--temperature", "0"], ["--top-p", "0.001"], ["--temperature", "1e-40"]):
        assert cli.main([*command, *options]) == 0
        assert capsys.readouterr().out == greedy
    assert cli.main(["generate", str(run), "--length", "0"]) == 0
    assert capsys.readouterr().out == "\n"


def test_info_says_which_kernel_serves_what(run: Path, capsys) -> None:
    assert cli.main(["info"]) == 0
    said = capsys.readouterr().out
    assert "minrnn 0.1.0" in said
    assert {"CPU", "CUDA", "MPS"} == set(info.kernels())
    assert all(kernel in said for kernel in info.kernels()["CPU"].values())
    assert cli.main(["info", str(run)]) == 0
    said = capsys.readouterr().out
    assert "saved at step 4 of 4" in said
    assert "1,161 to train on, 129 to validate on" in said


def test_help_names_every_command(capsys) -> None:
    assert cli.main([]) == 0
    said = capsys.readouterr().out
    assert all(name in said for name in cli.COMMANDS)
    for name in cli.COMMANDS:
        with pytest.raises(SystemExit) as stopped:
            cli.main([*name.split(), "--help"])
        assert stopped.value.code == 0


def test_texts_are_written(tmp_path, capsys) -> None:
    assert cli.main(["data", "shakespeare", str(tmp_path / "plays.txt")]) == 0
    assert (tmp_path / "plays.txt").stat().st_size > 4_900_000
    said = _refused(capsys, "data", "shakespeare", tmp_path / "none" / "plays.txt")
    assert "No such file or directory" in said


def test_bad_texts_are_refused(source: Path, tmp_path, capsys) -> None:
    train = ("train", "text", *SMALL, "--out", tmp_path / "run", "--data")
    assert "does not exist" in _refused(capsys, *train, tmp_path / "none")
    (tmp_path / "empty").write_text("")
    assert "is empty" in _refused(capsys, *train, tmp_path / "empty")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"abcde", "too short: its train part must have at least 17 symbols"),
        (b"abc" * 40 + b"\xc3(", "has byte 0xc3 at offset 120 (invalid continuation byte)"),
    ],
    ids=["short", "invalid"],
)
def test_bad_content_is_refused_and_leaves_nothing(tmp_path, capsys, content, said) -> None:
    text, run = tmp_path / "text", tmp_path / "run"
    text.write_bytes(content)
    command = ["train", "text", *SMALL, "--out", str(run), "--data", str(text)]
    assert said in _refused(capsys, *command)
    assert not run.exists()
    # once the text is mended, the same command works, into an empty folder too
    run.mkdir()
    _refused(capsys, *command)
    text.write_bytes(b"abcdefgh" * 40)
    assert cli.main(command) == 0


def test_invalid_utf8_is_read_as_bytes(tmp_path, capsys) -> None:
    text = tmp_path / "text"
    text.write_bytes(b"abc\xff" * 60)
    args = ["--data", str(text), "--out", str(tmp_path / "run"), "--tokenizer", "bytes"]
    assert cli.main(["train", "text", *SMALL, *args]) == 0


def test_bad_prompts_are_refused(run: Path, capsys) -> None:
    said = _refused(capsys, "generate", run, "--prompt", "To bé")
    assert "character 'é' (U+00E9) at place 4 is not among the" in said
    assert "`device` must be one of this" in _refused(capsys, "generate", run, "--device", "foo")
    assert "`temperature` must be" in _refused(capsys, "generate", run, "--temperature", "-1")


def test_bad_run_folders_are_refused(run: Path, source: Path, tmp_path, capsys) -> None:
    for command in ("generate", "eval", "info"):
        assert "is not a run folder" in _refused(capsys, command, tmp_path)
    assert "is not a run folder" in _refused(capsys, "train", "--resume", tmp_path)
    said = _refused(capsys, "train", "text", "--data", source, "--out", run)
    assert f"{run} is not empty; resume the run in it by --resume {run}" in said


def test_bad_checkpoints_are_refused(run: Path, tmp_path, capsys) -> None:
    copy = tmp_path / "copy"
    subprocess.run(["cp", "-r", run, copy], check=True)
    weights = copy / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-4] ^= 0xFF
    weights.write_bytes(content)
    assert "does not fit its checksum" in _refused(capsys, "generate", copy)
    weights.write_bytes(content[:-9])
    assert "is damaged or truncated" in _refused(capsys, "eval", copy)
    last = copy / "training_state" / "last.safetensors"
    last.write_bytes(last.read_bytes()[:1000])
    assert "is damaged or truncated" in _refused(capsys, "train", "--resume", copy)


def test_unknown_words_are_refused_with_the_known(source: Path, capsys) -> None:
    assert "unknown command 'trian' (known: train text, " in _refused(capsys, "trian")
    said = _refused(capsys, "data", "shakespear", "x")
    assert "(known: data text, data shakespeare, data tiny-shakespeare, " in said
    said = _refused(capsys, "train", "text", "--recipe", "shakespear", "--data", source)
    assert "shakespear" in said
    assert "'shakespeare', 'demo'" in said
    said = _refused(capsys, "train", "text", "--data", source, "--widht", "3")
    assert "--widht" in said
    assert "(known: --help, --recipe, --data, " in said
    assert "--width" in said
    assert "the run folder. (required)" in _refused(capsys, "generate")
    said = _refused(capsys, "train", "text", "--data", source, "--steps", "many")
    assert "--steps" in said
    assert "`steps` must be >= 1" in _refused(capsys, "train", "text", "--steps", "0")


def test_a_loss_that_breaks_is_refused(source: Path, tmp_path, capsys) -> None:
    broken = ["--learning-rate", "1e30", "--warmup-steps", "0", "--clip-norm", "1e30"]
    said = _refused_last(
        capsys, "train", "text", "--data", source, "--out", tmp_path / "run", *SMALL, *broken
    )
    assert "became" in said
    assert "in step" in said
    assert cli.main(["info", str(tmp_path / "run")]) == 0


def _refused_last(capsys: pytest.CaptureFixture[str], *args: object) -> str:
    """As `_refused`, after work that has printed its progress."""
    capsys.readouterr()
    assert cli.main([str(a) for a in args]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    return said


def test_output_may_be_cut_off(run: Path) -> None:
    command = f"{sys.executable} -m minrnn generate {run} --length 3000 | head -c 5"
    ended = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=60)
    assert len(ended.stdout) == 5
    assert ended.stderr == ""
