"""Each extra is complete: what it is for runs with its packages alone."""

import ast
import re
import signal
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import httpx
import pytest
from packaging.utils import canonicalize_name

import minrnn
from minrnn.bench import peers
from minrnn.cli.commands import COMMANDS
from minrnn.data.tokenizers import BPE
from tests import extras

ROOT = Path(minrnn.__file__).parents[1]
TEXT = ["--data", "text.txt", "--context", "16", "--width", "8", "--num-layers", "1"]
TEXT += ["--steps", "2", "--batch-size", "2", "--eval-every", "2"]
RL = ["--env", "Pendulum-v1", "--context", "5", "--width", "8", "--num-layers", "1"]
RL += ["--steps", "2", "--batch-size", "2", "--eval-every", "2", "--target", "0"]
# the command lines, or Python, of each extra
USES: dict[str, list[list[str]] | str] = {
    "train": [
        ["train", "text", *TEXT, "--out", "run", "--tokenizer", "bpe:260"],
        ["eval", "run"],
        ["generate", "run", "--length", "2"],
        ["info", "run"],
        ["data", "text", "corpus", "--data", "text.txt"],
    ],
    "rl": [
        ["data", "rl", "collect", "Pendulum-v1", "set.hdf5", "--episodes", "2"],
        ["data", "rl", "info", "set.hdf5"],
        ["train", "rl", "--data", "set.hdf5", "--out", "rl", *RL],
        ["eval", "rl", "--episodes", "1"],
    ],
    "demo": [["data", "shakespeare", "plays.txt"]],
    "sb3": "import stable_baselines3, minrnn.collecting",
    "redis": "import minrnn.serve.server, redis",
    "hf": "from minrnn.hf import MinRNNForCausalLM, MinRNNTokenizer",
    "peft": "import peft; from minrnn.hf import MinRNNForCausalLM",
    "datasets": "import datasets, minrnn.cli.text",
    "onnx": "import minrnn.onnx, onnx, onnxruntime, onnxscript; minrnn.onnx.translations()",
    "gpu": "from minrnn.ops import gpu; assert gpu.is_installed(); import triton",
}
if sys.version_info < (3, 11):
    # transformers and datasets have left it behind
    USES = {name: use for name, use in USES.items() if name not in ("hf", "peft", "datasets")}
_RUN = "from minrnn.cli import main\nfor args in {}:\n    assert main(args) == 0, args"


def _python(extra: str | None, code: str) -> list[str]:
    hidden = ",".join(sorted(extras.hidden_by(extra)))
    return [sys.executable, "-m", "tests.extras", hidden, code]


def _run(extra: str | None, code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    start = f"import os; os.chdir({str(folder)!r})\n"
    command = _python(extra, start + code)
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=250)


@pytest.mark.long
@pytest.mark.parametrize("extra", USES)
def test_an_extra_is_complete(extra: str, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("To be, or not to be, that is the question.\n" * 30)
    use = USES[extra]
    done = _run(extra, use if isinstance(use, str) else _RUN.format(use), tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.long
def test_serve_is_complete(tmp_path: Path) -> None:
    model = minrnn.LanguageModel(minrnn.ModelConfig(vocab_size=257, width=8, num_layers=1))
    minrnn.save(tmp_path / "run", model, BPE(["a b"]))
    args = ["serve", str(tmp_path / "run"), "--port", "0"]
    command = _python("serve", f"import sys; from minrnn.cli import main; sys.exit(main({args}))")
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as server:
        try:
            address = re.findall(r"http://\S+(?=,)", server.stdout.readline())[0]
            asked = {"model": "run", "prompt": "abc", "max_tokens": 2}
            response = httpx.post(f"{address}/v1/completions", json=asked, timeout=60)
            assert response.json()["usage"]["completion_tokens"] == 2
        finally:
            server.send_signal(signal.SIGTERM)
        assert server.wait(60) == 0


@pytest.mark.long
def test_the_bare_package_says_what_to_install(tmp_path: Path) -> None:
    code = "from minrnn.cli import main\nfor args in {}: print(main(args), flush=True)"
    asked = [["--version"], ["--help"], ["bench", "--help"]]
    done = _run(None, code.format(asked), tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"minrnn {minrnn.__version__}\n0\nusage: minrnn COMMAND")
    refused = ["generate x", "info", "serve x", "train rl", "bench gpu-static", "train --help"]
    done = _run(None, code.format([words.split() for words in refused]), tmp_path)
    assert done.stdout.split() == ["2"] * len(refused)
    lines = done.stderr.splitlines()
    assert [re.findall(r"install 'minrnn\[([\w,]+)\]'$", line) for line in lines] == [
        ["train"],
        ["train"],
        ["serve"],
        ["rl"],
        ["train,gpu"],
        ["train"],
    ]


def test_every_package_belongs_to_an_extra() -> None:
    known = set().union(*(extras.packages_of(extra) for extra in extras.EXTRAS if extra != "dev"))
    packages = metadata.packages_distributions()
    for path in sorted((ROOT / "minrnn").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module or ""]
            for name in {name.partition(".")[0] for name in names} & packages.keys():
                assert known & {canonicalize_name(x) for x in packages[name]}, (path.name, name)


def test_commands_name_extras_that_there_are() -> None:
    for command in COMMANDS.values():
        assert set(command.extra.split(",")) <= extras.EXTRAS.keys()


def test_versions_of_peers_are_pinned_alike() -> None:
    project, constraints = (ROOT / n for n in ("pyproject.toml", "constraints.txt"))
    [extra] = re.findall(r"^bench = \[(.*?)\n\]", project.read_text(), flags=re.M | re.S)
    for name, version in peers.REQUIREMENTS.items():
        if version:
            # some have left Python 3.10 behind, and stand there twice
            assert re.search(rf'"{name}=={version}["; ]', extra)
            assert re.search(rf"^{name.lower()}=={version}[;\n]", constraints.read_text(), re.M)
