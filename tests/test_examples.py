"""The examples run: on series made here, and on the real ones where sktime is installed."""

import argparse
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

SCRIPT = Path(__file__).parents[1] / "examples" / "classify.py"
QUICK = ["--epochs", "1", "--seeds", "2", "--width", "8", "--limit", "12"]
TITLES = ["nn.GRU", "MinGRU", "nn.LSTM", "MinLSTM"]


@pytest.fixture
def classify() -> ModuleType:
    spec = importlib.util.spec_from_file_location("classify", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def made_up(classify: ModuleType, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The example on 40 series of 3 channels, 2 to 11 steps, whose class is their sign."""

    def read(name: str, part: str) -> tuple[list[Tensor], list[str]]:
        labels = ["down"] * 20 + ["up"] * 20
        offsets = {"down": -1.0, "up": 1.0}
        series = [torch.randn(2 + n % 10, 3) + offsets[y] for n, y in enumerate(labels)]
        return series, labels

    monkeypatch.setattr(classify, "read", read)
    return classify


def _rows(printed: str) -> list[list[str]]:
    lines = [line for line in printed.splitlines() if line.startswith("|")]
    assert len({len(line) for line in lines}) == 1
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def _check_table(printed: str) -> None:
    header, rule, *rows = _rows(printed)
    assert header[0] == "layer"
    assert set("".join(rule)) == {"-"}
    assert [row[0] for row in rows] == TITLES
    for _, parameters, accuracy, seconds, ratio in rows:
        mean, spread = map(float, accuracy.split(" ± "))
        assert int(parameters.replace(",", "")) > 0
        assert 0 <= mean <= 100
        assert spread >= 0
        assert float(seconds) >= 0
        assert float(ratio) > 0


def _refused(module: ModuleType, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as ended:
        module.main(list(arguments))
    assert ended.value.code == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1
    return said.err


def test_all_layers_are_compared(made_up, capsys, tmp_path) -> None:
    out = tmp_path / "results.json"
    made_up.main([*QUICK, "--epochs", "2", "--out", str(out)])
    _check_table(capsys.readouterr().out)
    runs = json.loads(out.read_text())["runs"]
    order = ["gru", "mingru", "lstm", "minlstm"]
    assert [(run["layer"], run["seed"]) for run in runs] == [(n, s) for s in (0, 1) for n in order]
    assert all(len(run["accuracy"]) == 2 for run in runs)


@pytest.mark.parametrize("layer", ["gru", "mingru", "lstm", "minlstm"])
def test_each_layer_learns(made_up, layer) -> None:
    options = argparse.Namespace(epochs=10, width=8, batch=8, lr=0.02)
    run = made_up.fit(options, made_up.load("made up", None), layer, seed=0)
    assert run["accuracy"][-1] > 0.9


def test_limit_keeps_every_class(made_up) -> None:
    train, test, classes = made_up.load("made up", 4)
    assert (len(train.series), len(test.series), classes) == (4, 4, 2)
    assert set(train.labels.tolist()) == {0, 1}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--layer", "rnn"], r"argument --layer: invalid choice: 'rnn'"),
        (["--data", "Vowels"], r"argument --data: invalid choice: 'Vowels'"),
        (["--seeds", "0"], "argument --seeds: must be > 0, got 0"),
        (["--limit", "-1"], "argument --limit: must be > 0, got -1"),
        (["--lr", "nan"], "argument --lr: must be > 0, got nan"),
        (["--width", "x"], "argument --width: invalid int value: 'x'"),
        (["--out", "nowhere/results.json"], "argument --out: must be a file in a folder"),
        (["--depth", "3"], "unrecognized arguments: --depth 3"),
    ],
)
def test_wrong_arguments_are_named(classify, capsys, arguments, said) -> None:
    assert said in _refused(classify, capsys, *arguments)


def test_missing_data_name_the_extra(classify, capsys, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "sktime", None)
    assert "pip install 'minrnn[examples]'" in _refused(classify, capsys)


needs_sktime = pytest.mark.skipif(
    importlib.util.find_spec("sktime") is None, reason="needs the extra `examples`"
)


@needs_sktime
@pytest.mark.parametrize(
    ("name", "channels", "classes", "steps"),
    [("JapaneseVowels", 12, 9, 29), ("PLAID", 1, 11, 1344), ("ACSF1", 1, 10, 1460)],
)
def test_real_series_are_read(classify, name, channels, classes, steps) -> None:
    train, test, number = classify.load(name, None)
    series = train.series + test.series
    assert {x.shape[1] for x in series} == {channels}
    assert max(len(x) for x in series) == steps
    assert number == classes == len(set(train.labels.tolist()))
    assert all(torch.isfinite(x).all() for x in series)


@needs_sktime
def test_real_series_are_classified(classify, capsys) -> None:
    classify.main(QUICK)
    said = capsys.readouterr().out
    assert said.startswith("JapaneseVowels: 12 + 12 series, channels: 12")
    _check_table(said)
