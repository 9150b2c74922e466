"""What the documents show, run as it stands."""

import doctest
import re
import sys
from pathlib import Path

import pytest

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


# transformers has left Python 3.10 behind
DOCUMENTS = ["migrate.md", "precision.md", "transformers.md"][: 2 + (sys.version_info >= (3, 11))]


@pytest.mark.parametrize("name", DOCUMENTS)
def test_examples_of_the_documents_run(name: str) -> None:
    result = doctest.testfile(str(ROOT / "docs" / name), module_relative=False)
    assert result.failed == 0
    assert result.attempted > 0


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
