"""What the documents show, run as it stands."""

import doctest
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import minrnn
from tests.serving import make_run, served

ROOT = Path(__file__).parents[1]
README, CHINESE = ROOT / "README.md", ROOT / "README.zh-TW.md"


def _examples(path: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", path.read_text(encoding="utf-8"), flags=re.DOTALL)


def test_readme_examples_run(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for example in _examples(README):
        exec(compile(example, "README.md", "exec"), names)
    assert "that is the question" in capsys.readouterr().out


PAGES = sorted((ROOT / "docs").glob("*.md"))
# transformers has left Python 3.10 behind
SESSIONS = [path for path in PAGES if ">>>" in path.read_text(encoding="utf-8")]
SESSIONS = [p for p in SESSIONS if p.name != "transformers.md" or sys.version_info >= (3, 11)]


@pytest.mark.parametrize("path", SESSIONS, ids=lambda path: path.name)
def test_examples_of_the_documents_run(path: Path) -> None:
    result = doctest.testfile(str(path), module_relative=False)
    assert result.failed == 0
    assert result.attempted > 0


def test_all_python_in_the_documents_is_run() -> None:
    programs = {path.name: sum(">>>" not in one for one in _examples(path)) for path in PAGES}
    # each by a test below
    assert {name: n for name, n in programs.items() if n} == {"scale.md": 1, "serving.md": 2}
    for path in PAGES:
        text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
        # what is only indented is no Python that nobody runs
        assert not re.findall(r"^ {4,}(?:import|from \S+ import) .*", text, flags=re.MULTILINE)


def test_the_example_of_a_split_sequence_runs(tmp_path) -> None:
    [example] = _examples(ROOT / "docs" / "scale.md")
    check = """
whole = minrnn.LanguageModel(model.config)
whole.load_state_dict(model.state_dict())
expected, last = whole(ids)
mine = expected.chunk(2, dim=1)[mesh.get_local_rank("time")]
torch.testing.assert_close(y, mine, rtol=1e-4, atol=1e-5)
for ours, theirs in zip(state.flatten().values(), last.flatten().values(), strict=True):
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
torch.distributed.destroy_process_group()
"""
    (tmp_path / "example.py").write_text(example + check)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", str(tmp_path / "example.py")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr


def test_the_examples_of_the_server_run(tmp_path, monkeypatch, capsys) -> None:
    client, engine = _examples(ROOT / "docs" / "serving.md")
    monkeypatch.chdir(tmp_path)
    run = make_run(tmp_path / "runs" / "demo", minrnn.Bytes())
    with served(run) as (address, _):
        client = client.replace("http://127.0.0.1:8000", address).replace('"demo"', '"tiny"')
        exec(compile(client, "serving.md", "exec"), {})
    assert capsys.readouterr().out
    exec(compile(engine, "serving.md", "exec"), {})
    assert capsys.readouterr().out.endswith(" [length]\n")


def test_first_readme_example_is_short() -> None:
    lines = [line for line in _examples(README)[0].splitlines() if line.strip()]
    assert len(lines) <= 12


def test_readme_is_short_and_opens_with_the_two_commands() -> None:
    text = README.read_text(encoding="utf-8")
    assert text.count("\n") < 150
    first = text.index("    make demo")
    assert first < text.index("    make test") < text.index("##")


def test_readmes_say_the_same() -> None:
    assert _examples(README) == _examples(CHINESE)
    english, chinese = (path.read_text(encoding="utf-8") for path in (README, CHINESE))
    assert english.count("\n## ") == chinese.count("\n## ")
    for figure in re.findall(r"\| ([\d.e,-]+(?: bytes)?) \| `", english):
        assert figure.split()[0] in chinese


@pytest.mark.parametrize("path", sorted(ROOT.glob("*.md")) + sorted((ROOT / "docs").glob("*.md")))
def test_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\((?!http|#)([^)#]+)", path.read_text(encoding="utf-8")):
        assert (path.parent / target).exists(), target
