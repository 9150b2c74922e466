"""Imports point one way, `import minrnn` is light, and every public name is documented."""

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import minrnn

PACKAGE = Path(minrnn.__file__).parent

# storeys from the bottom up: a module imports from its own storey or from those below
STOREYS = [
    {"ops", "files", "configs", "splitmix"},
    {"state", "distributed", "onnx", "sampling"},
    {"layers"},
    {"mixers"},
    {"blocks"},
    {"models"},
    {"decision"},
    {"data", "losses"},
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


def _imports(path: Path) -> set[str]:
    """The modules of this package that the file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "minrnn":
            inner = (node.module or "").split(".")[1:2]
            found |= set(inner) or {alias.name for alias in node.names}
    return found - {"minrnn"}


FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path: Path) -> None:
    height = {name: n for n, storey in enumerate(STOREYS) for name in storey}
    here = _module(path)
    assert here in height, f"{here} has no storey"
    for name in _imports(path):
        assert height[name] <= height[here], f"{here} must not import {name}"
        assert name not in FORBIDDEN.get(here, set()), f"{here} must not know {name}"


def test_import_loads_no_extra_and_little_time() -> None:
    script = (
        "import torch, numpy, safetensors.torch, time, sys; before = set(sys.modules);"
        "start = time.perf_counter(); import minrnn; print(time.perf_counter() - start);"
        "print(*{name.split('.')[0] for name in set(sys.modules) - before})"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    _, modules = done.stdout.splitlines()
    loaded = set(modules.split()) - set(sys.stdlib_module_names)
    assert loaded <= {"minrnn", "torch", "numpy", "safetensors"}, loaded


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


def test_files_and_functions_are_small() -> None:
    for path in FILES:
        text = path.read_text()
        assert text.count("\n") <= 400, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                code = node.body[1:] if ast.get_docstring(node) else node.body
                lines = code[-1].end_lineno - code[0].lineno + 1 if code else 0
                assert lines <= 60, f"{path.name}: {node.name}"
