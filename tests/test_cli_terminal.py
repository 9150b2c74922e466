"""The command on terminals, and on outputs that are closed, cut off or full."""

import os
import pty
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import minrnn
from minrnn import cli
from minrnn.cli import streams

REFUSED = [
    ["train", "text", "--widht", "5"],
    ["train", "text", "--steps", "many"],
    ["train", "text", "--recipe", "foo"],
    ["train", "text", "--valid-fraction", "7"],
    ["train", "text", "--learning-rate"],
    ["train", "rl", "--bets=2"],
    ["eval", "--devise=cpu", "run"],
    ["generate"],
    ["generate", "run", "--temperature", "-1"],
    ["serve", "run", "--port", "-4"],
    ["data", "rl", "convert", "a", "b", "--to", "foo"],
    ["bench", "scan", "--quikc"],
    ["trian"],
    ["data", "text"],
]
TERMINALS = {
    "colour": {"TERM": "xterm-256color"},
    "narrow": {"TERM": "xterm-256color", "COLUMNS": "20"},
    "no-colour": {"TERM": "xterm-256color", "NO_COLOR": "1"},
    "forced": {"TERM": "dumb", "FORCE_COLOR": "1"},
}


def _on_terminal(command: list[str], environment: dict[str, str], folder: Path) -> str:
    """What `command` prints to a terminal."""
    master, slave = pty.openpty()
    inherited = {n: v for n, v in os.environ.items() if n not in ("NO_COLOR", "FORCE_COLOR")}
    pipes = {"stdin": slave, "stdout": slave, "stderr": slave}
    with subprocess.Popen(command, env=inherited | environment, cwd=folder, **pipes) as process:
        os.close(slave)
        shown = b""
        try:
            while block := os.read(master, 65536):
                shown += block
        except OSError:
            # the other side is closed, on Linux
            pass
        os.close(master)
    assert process.returncode == 0, shown
    return shown.decode().replace("\r\n", "\n")


def _script(lines: list[list[str]]) -> list[str]:
    code = "import sys; from minrnn.cli import main; "
    code += f"print(*[main(args) for args in {lines}], file=sys.stdout)"
    return [sys.executable, "-c", code]


@pytest.mark.parametrize("terminal", TERMINALS)
def test_what_is_refused_is_one_plain_line(terminal: str, tmp_path: Path) -> None:
    shown = _on_terminal(_script(REFUSED), TERMINALS[terminal], tmp_path)
    *lines, codes = shown.splitlines()
    assert codes.split() == ["2"] * len(REFUSED)
    assert len(lines) == len(REFUSED)
    for line, words in zip(lines, REFUSED, strict=True):
        assert line.startswith("minrnn")
        # neither escapes nor pieces of boxes
        assert line.isprintable()
        assert not re.search(r"[\u2500-\u257f]|-{3}", line)
        assert len(line) > len(" ".join(["minrnn", *words[:2]])) + 5
    assert "Unrecognized options: --widht; did you mean --width? (known: --help, " in lines[0]
    assert "--steps" in lines[1]
    assert "'many'" in lines[1]
    assert "'shakespeare', 'demo'" in lines[2]
    assert "`valid_fraction` must be in (0, 1), got 7.0" in lines[3]
    assert "--devise; did you mean --device?" in lines[6]
    assert "`port` must be in [0, 65535], got -4" in lines[9]


@pytest.mark.parametrize(("name", "coloured"), [("colour", True), ("no-colour", False)])
def test_help_heeds_no_color(name: str, coloured: bool, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "minrnn", "generate", "--help"]
    shown = _on_terminal(command, TERMINALS[name], tmp_path)
    assert ("\x1b[" in shown) == coloured
    assert "--temperature" in shown


def test_help_of_groups(capsys) -> None:
    for group in ("bench", "data", "data rl", "reproduce"):
        for word in ("--help", "-h"):
            assert cli.main([*group.split(), word]) == 0
            said = capsys.readouterr().out
            names = [name for name in cli.COMMANDS if name.startswith(group)]
            assert all(f"  {name} " in said for name in names)
            assert said.startswith(f"usage: minrnn {group} COMMAND ...")
    for word in ("--version", "-V"):
        assert cli.main([word]) == 0
        assert capsys.readouterr().out == f"minrnn {minrnn.__version__}\n"
    assert cli.main(["benhc", "--help"]) == 2


def test_each_summary_is_its_functions(capsys) -> None:
    for name, command in cli.COMMANDS.items():
        # help is the docstring's, where there is no configuration whose own it is
        assert (command.function().__doc__ or "").partition("\n")[0] == command.summary, name


@pytest.mark.parametrize(
    ("line", "code", "out", "error"),
    [
        # the reader leaves when it has all that it wants, before or after the rest is written
        ("--help | head -1", (0, 141), "usage: minrnn COMMAND ...\n", ""),
        ("--version >&-", 0, "", ""),
        ("--version >&- 2>&-", 0, "", ""),
        ("info nowhere 2>&-", 2, "", ""),
        ("info nowhere | head -0", 2, "", "minrnn info: nowhere is not a run folder: it has"),
        ("--version > /dev/full", 2, "", "minrnn: [Errno 28] No space left on device\n"),
        ("info $'n\\xff'", 2, "", "minrnn info: n\\udcff is not a run folder"),
    ],
)
def test_outputs_may_be_anything(
    line: str, code: int | tuple[int, ...], out: str, error: str, tmp_path
) -> None:
    script = f"exec 3>&1; {sys.executable} -m minrnn {line}; exit ${{PIPESTATUS[0]}}"
    command = ["bash", "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, cwd=tmp_path)
    assert done.returncode in (code if isinstance(code, tuple) else (code,))
    assert done.stdout == out
    assert done.stderr.startswith(error)
    assert done.stderr.count("\n") == (1 if error else 0)


def test_a_reader_that_has_gone_is_no_error() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "minrnn", "--help"]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, timeout=100)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, b"")


@pytest.mark.parametrize("start", [["-m", "minrnn"], ["-m", "minrnn", "info", "--help"]])
def test_interrupted_imports_leave_no_traceback(start: list[str], tmp_path: Path) -> None:
    # torch that never finishes to import
    (tmp_path / "torch.py").write_text("import time\nprint('!', flush=True)\ntime.sleep(60)\n")
    path = os.pathsep.join([str(tmp_path), str(Path(minrnn.__file__).parents[1])])
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    command = [sys.executable, *start]
    with subprocess.Popen(command, env=os.environ | {"PYTHONPATH": path}, **pipes) as process:
        assert process.stdout.readline() == b"!\n"
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130
        assert process.stderr.read() == b"\n"


def test_interrupts_elsewhere_stay_pythons() -> None:
    code = "import minrnn, signal; print(signal.getsignal(2) is signal.default_int_handler)"
    for argv in ([], ["minrnn"]):
        done = subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True)
        assert done.stdout == "True\n"


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (MemoryError(), "not enough memory"),
        (MemoryError("Unable to allocate 1 TiB"), "not enough memory: Unable to allocate 1 TiB"),
        (torch.OutOfMemoryError("CUDA out of memory.\nMore"), "not enough memory: CUDA out of"),
        (ValueError("one\n  two"), "one two"),
        (OSError(2, "No such file", "a\x1b[1mb\udcff"), "No such file: 'a\\x1b[1mb\\udcff'"),
        (ModuleNotFoundError("No module named 'rich'", name="rich"), "pip install 'minrnn[train]'"),
    ],
)
def test_foreseen_errors_are_a_line(error: Exception, said: str, monkeypatch, capsys) -> None:
    def fail(run: Path | None = None) -> int:
        raise error

    monkeypatch.setattr("minrnn.cli.text.show_info", fail)
    assert cli.main(["info"]) == 2
    shown = capsys.readouterr().err
    assert said in shown
    assert shown.count("\n") == 1


@pytest.mark.parametrize("error", [RuntimeError("a bug"), KeyError("a bug"), AssertionError()])
def test_bugs_keep_their_traceback(error: Exception, monkeypatch) -> None:
    def fail(run: Path | None = None) -> int:
        raise error

    monkeypatch.setattr("minrnn.cli.text.show_info", fail)
    with pytest.raises(type(error)):
        cli.main(["info"])


def test_a_line_is_one_whatever_it_holds(capsys) -> None:
    streams.complain("a\nb\tc\x07\udcff é")
    assert capsys.readouterr().err == "a b\\tc\\x07\\udcff é\n"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("train text --width 0", "minrnn train text: `width` must be >= 1, got 0\n"),
        ("train text --chunk -1", "minrnn train text: `chunk` must be >= 0, got -1\n"),
        ("train rl --context 0", "minrnn train rl: `context` must be >= 1, got 0\n"),
        ("generate run --top-k -1", "minrnn generate: `top_k` must be"),
        ("train rl --reference 1", "argument count 2 of `FLOAT FLOAT`\n"),
    ],
)
def test_reasons_have_no_marks_and_no_names_of_classes(line: str, said: str, capsys) -> None:
    assert cli.main(line.split()) == 2
    shown = capsys.readouterr().err
    assert said in shown
    assert "[" not in shown.replace("['1']", "").replace("tuple[float, float]", "")
