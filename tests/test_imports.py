"""Imports point one way, `import minrnn` is light, and every public name is documented."""

import ast
import inspect
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

import minrnn

PACKAGE = Path(minrnn.__file__).parent

# storeys from the bottom up: a module imports from its own storey or from those below
STOREYS = [
    {"ops", "files", "configs", "splitmix", "generators", "tensor_files", "startup", "errors"},
    {"state", "distributed", "onnx", "sampling", "environments"},
    {"layers"},
    {"mixers"},
    {"blocks"},
    {"models"},
    {"decision"},
    {"data", "losses", "plain"},
    {"checkpoint", "tasks", "train_config", "ranks", "gradients"},
    {"training_state", "launching", "evaluation"},
    {"train", "stream", "interrupts", "events", "packing"},
    {"serve"},
    {"plots", "progress", "recipes", "acting"},
    {"collecting"},
    {"runs"},
    {"info"},
    {"bench", "hf"},
    {"experiments"},
    {"cli"},
    {"__main__"},
]
# what `data` must not know, though models stand below it
FORBIDDEN = {
    "data": {"models", "decision", "blocks", "mixers", "layers", "state", "ops"},
    "ops": {"files"},
}


def _module(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def _named(node: ast.AST, package: Sequence[str]) -> list[str]:
    """The modules that a node imports, by their full names; also by `importlib.import_module`."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        # the package of the file, one level up for each dot behind the first
        above = package[: len(package) - node.level + 1] if node.level else []
        start = ".".join([*above, *([node.module] if node.module else [])])
        return [f"{start}.{alias.name}" for alias in node.names] if start else []
    if isinstance(node, ast.Call) and node.args:
        name = getattr(node.func, "attr", getattr(node.func, "id", ""))
        if name in ("import_module", "__import__"):
            return [_beginning(node.args[0])]
    return []


def _beginning(node: ast.AST) -> str:
    """The text that an expression begins with, as far as it is written out."""
    if isinstance(node, ast.JoinedStr) and node.values:
        return _beginning(node.values[0])
    return str(node.value) if isinstance(node, ast.Constant) else ""


def _imports(path: Path, root: Path = PACKAGE) -> set[str]:
    """The modules of this package that the file imports, wherever in it and however."""
    package = ["minrnn", *path.relative_to(root).parts[:-1]]
    nodes = ast.walk(ast.parse(path.read_text()))
    names = [name.split(".") for node in nodes for name in _named(node, package)]
    return {parts[1] for parts in names if parts[0] == "minrnn" and len(parts) > 1}


@pytest.mark.parametrize(
    "line",
    [
        "import minrnn.cli",
        "import torch, minrnn.cli.text as t",
        "from minrnn import cli",
        "from minrnn.cli import text",
        "from minrnn.cli.text import train_text",
        "from . import cli",
        "from .cli import text",
        "from .. import cli",
        "from ..cli import text",
        "import importlib; importlib.import_module('minrnn.cli.text')",
        "importlib.import_module(f'minrnn.cli.{name}')",
        "def f():\n    if TYPE_CHECKING:\n        import minrnn.cli",
        "async def f():\n    from minrnn import cli",
    ],
)
def test_every_kind_of_import_is_seen(line: str, tmp_path: Path) -> None:
    path = tmp_path / "serve" / "x.py" if ".. " in line or "..c" in line else tmp_path / "x.py"
    path.parent.mkdir(exist_ok=True)
    path.write_text(line)
    assert _imports(path, tmp_path) == {"cli"}


FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path: Path) -> None:
    height = {name: n for n, storey in enumerate(STOREYS) for name in storey}
    here = _module(path)
    assert here in height, f"{here} has no storey"
    for name in _imports(path):
        assert height[name] <= height[here], f"{here} must not import {name}"
        assert name not in FORBIDDEN.get(here, set()), f"{here} must not know {name}"


def _loaded(code: str, folder: Path | None = None) -> set[str]:
    """The modules that `code` loads in a new process, beside those of the core packages."""
    script = (
        "import torch, numpy, safetensors.torch, sys; before = set(sys.modules)\n"
        f"{code}\nprint(); print(*(set(sys.modules) - before))"
    )
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=folder)
    return set(done.stdout.splitlines()[-1].split())


def _packages(modules: set[str]) -> set[str]:
    return {name.split(".")[0] for name in modules} - set(sys.stdlib_module_names)


def test_import_loads_no_extra() -> None:
    loaded = _loaded("import minrnn")
    assert _packages(loaded) <= {"minrnn", "torch", "numpy", "safetensors"}
    # of torch nothing that its own import leaves for later and that takes its time
    heavy = ("torch._inductor", "torch.distributed.fsdp", "torch.distributed.tensor", "torch.onnx")
    assert not {name for name in loaded if name.startswith(heavy)}
    # of ours what its public names need, and no more
    inner = {name.split(".")[1] for name in loaded if name.startswith("minrnn.")}
    assert not inner & {"cli", "train", "runs", "serve", "hf", "bench", "experiments", "plots"}


# what reading options takes
_OPTIONS = {"minrnn", "tyro", "docstring_parser", "typing_extensions", "typeguard", "shtab"}
COMMANDS = {
    "--help": set(),
    "--version": set(),
    "bench --help": set(),
    "generate --help": _OPTIONS,
    "generate run --length 2": _OPTIONS,
    "train text --help": _OPTIONS,
    "train rl --help": _OPTIONS,
    "train text --widht 5": _OPTIONS,
    "eval --help": _OPTIONS,
    "serve --help": _OPTIONS,
    "data text --help": _OPTIONS,
    "data rl info --help": _OPTIONS,
    "info": _OPTIONS,
}


@pytest.mark.parametrize("words", COMMANDS)
def test_a_command_loads_what_it_needs(words: str, tmp_path: Path) -> None:
    model = minrnn.LanguageModel(minrnn.ModelConfig(vocab_size=3, width=8, num_layers=1))
    minrnn.save(tmp_path / "run", model, minrnn.Characters("a\nb"))
    code = (
        "from minrnn.cli import main\nimport contextlib\n"
        f"with contextlib.suppress(SystemExit): main({words.split()})"
    )
    loaded = _loaded(code, tmp_path)
    assert _packages(loaded) <= COMMANDS[words] | {"minrnn", "torch", "numpy", "safetensors"}
    assert not {name for name in loaded if name.startswith("torch.distributed.fsdp")}


PUBLIC = {name: value for name, value in vars(minrnn).items() if name[0] != "_"}
NAMES = [name for name, value in PUBLIC.items() if not inspect.ismodule(value)]


def test_public_names_are_few() -> None:
    assert 10 <= len(NAMES) <= 25


@pytest.mark.parametrize("name", NAMES)
def test_public_names_are_documented(name: str) -> None:
    text = inspect.getdoc(PUBLIC[name]) or ""
    sentence = text.partition("\n")[0]
    assert sentence.endswith((".", "...", "`."))
    if inspect.isfunction(PUBLIC[name]) or issubclass(PUBLIC[name], torch.nn.Module):
        assert "Raises:" in text
        assert "Args:" in text


def _lengths(text: str) -> dict[str, int]:
    """Lines of each function, its docstring not counted."""
    lengths = {}
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            code = node.body[1:] if ast.get_docstring(node) else node.body
            lengths[node.name] = code[-1].end_lineno - code[0].lineno + 1 if code else 0
    return lengths


def test_files_and_functions_are_small() -> None:
    for path in [*FILES, PACKAGE / "__init__.py"]:
        text = path.read_text()
        assert text.count("\n") <= 400, path
        for name, lines in _lengths(text).items():
            assert lines <= 60, f"{path.name}: {name}"


@pytest.mark.parametrize("kind", ["def", "async def"])
def test_lines_of_every_function_are_counted(kind: str) -> None:
    text = f"class A:\n    {kind} f(self):\n        'text'\n" + 61 * "        x = 1\n"
    assert _lengths(text) == {"f": 61}
    assert _lengths(f"{kind} g():\n    'a docstring only'") == {"g": 0}
