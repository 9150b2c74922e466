"""The paper's tables in small: runs that go on, tables that stay the same, what is refused."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from minrnn import cli
from minrnn.data import shakespeare as shakespeare_text
from minrnn.experiments import efficiency, page, results, selective_copying, shakespeare
from minrnn.experiments.results import TextTable, spread
from minrnn.models import ModelConfig
from minrnn.runs import text as runs
from minrnn.train_config import TrainConfig


@pytest.fixture
def small_copying(monkeypatch: pytest.MonkeyPatch) -> None:
    train = TrainConfig(steps=6, batch_size=4, eval_every=3, warmup_steps=1, log_every=1)
    monkeypatch.setitem(selective_copying.PRESETS, "cpu", selective_copying.Preset(20, train))
    monkeypatch.setattr(selective_copying, "TESTED", 8)
    monkeypatch.setattr(selective_copying, "TESTED_LONG", {30: 4, 50: 2})
    monkeypatch.setattr(selective_copying, "_PIECE", 16)
    entries = {n: selective_copying.ENTRIES[n] for n in ("mingru-1", "h3", "attention")}
    small = {"width": 8, "num_heads": 2, "state_size": 4}
    entries = {n: e._replace(model=replace(e.model, **small)) for n, e in entries.items()}
    monkeypatch.setattr(selective_copying, "ENTRIES", entries)


def _copying(folder: Path, *options: str) -> int:
    where = ["--runs", str(folder / "runs"), "--out", str(folder / "out")]
    return cli.main(["reproduce", "selective-copying", *where, *options])


def test_selective_copying_goes_on_and_is_the_same(small_copying, tmp_path, monkeypatch) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert _copying(whole, "--seeds", "1") == 0
    table = (whole / "out" / "table.md").read_text()
    assert "minGRU, 1 layer" in table
    assert "symbols at 50" in table
    # stopped in every fourth step
    calls = 0

    class Impatient(selective_copying.CopyingTask):
        def batch(self, batch_size, seed, rows=slice(None)):
            nonlocal calls
            if seed[0] < 2:
                calls += 1
                if calls % 4 == 0:
                    raise KeyboardInterrupt
            return super().batch(batch_size, seed, rows)

    monkeypatch.setattr(selective_copying, "CopyingTask", Impatient)
    ends = []
    while not ends or ends[-1] != 0:
        ends.append(_copying(parts, "--seeds", "1"))
        assert len(ends) < 40
    assert 130 in ends
    assert (parts / "out" / "table.md").read_text() == table


def test_runs_of_other_settings_are_refused(small_copying, tmp_path, monkeypatch, capsys) -> None:
    assert _copying(tmp_path, "--seeds", "1", "--model", "h3") == 0
    preset = selective_copying.PRESETS["cpu"]
    monkeypatch.setitem(selective_copying.PRESETS, "cpu", replace(preset, length=21))
    (tmp_path / "runs" / "cpu" / "h3-0" / "accuracy.json").unlink()
    assert _copying(tmp_path, "--seeds", "1", "--model", "h3") == 2
    assert "was trained with other settings" in capsys.readouterr().err
    assert _copying(tmp_path, "--model", "h4") == 2
    assert (
        "`model` must be one of all, mingru-1, h3, attention, got 'h4'" in capsys.readouterr().err
    )


def test_accuracy_counts_symbols_and_sequences(monkeypatch) -> None:
    class Oracle(torch.nn.Module):
        """Knows all data but, in every other row, the last one."""

        def forward(self, ids, state=None):
            seen = ids if state is None else torch.cat([state, ids], dim=1)
            logits = torch.zeros(*ids.shape, 16)
            for row, symbols in enumerate(seen):
                data = [s for s in symbols.tolist() if 0 < s < 15]
                for n, place in enumerate((ids[row] == 15).nonzero().flatten().tolist()):
                    known = n < 15 or row % 2 == 0
                    logits[row, place, data[n] if known else 0] = 1
            return logits, seen

    monkeypatch.setattr(selective_copying, "_PIECE", 7)
    symbols, sequences = selective_copying.accuracy(Oracle(), 30, 8)
    assert sequences == 0.5
    assert symbols == pytest.approx(1 - 0.5 / 16)


@pytest.fixture
def small_shakespeare(monkeypatch: pytest.MonkeyPatch, tmp_path) -> Path:
    """A text that passes for tiny Shakespeare, and models of a few numbers."""
    text = tmp_path / "text"
    text.write_text("to be or not to be, that is the question\n" * 60)
    digest = hashlib.sha256(text.read_bytes()).hexdigest()
    monkeypatch.setattr(shakespeare_text, "TINY_SHAKESPEARE_SHA256", digest)
    recipe = runs.TextConfig(
        context=16,
        model=ModelConfig(width=12, num_layers=1),
        train=TrainConfig(batch_size=4, eval_every=2, warmup_steps=1, log_every=1),
    )
    monkeypatch.setitem(shakespeare.RECIPES, "shakespeare", recipe)
    entries = {}
    for name in ("mingru", "attention", "lstm"):
        entry = shakespeare.ENTRIES[name]
        entries[name] = entry._replace(model=replace(entry.model, width=12, num_layers=1))
    monkeypatch.setattr(shakespeare, "ENTRIES", entries)
    return text


def _shakespeare(text: Path, folder: Path, *options: str) -> int:
    where = ["--data", str(text), "--runs", str(folder / "runs"), "--out", str(folder / "out")]
    return cli.main(["reproduce", "shakespeare", *where, "--steps", "6", *options])


def test_shakespeare_makes_the_table(small_shakespeare, tmp_path) -> None:
    assert _shakespeare(small_shakespeare, tmp_path, "--seeds", "2") == 0
    figures = json.loads((tmp_path / "out" / "figures.json").read_text())
    assert {(run["name"], run["seed"]) for run in figures["runs"]} == {
        (name, seed) for name in ("mingru", "attention", "lstm") for seed in (0, 1)
    }
    assert [step for step, _ in figures["runs"][0]["curve"]] == [2, 4, 6]
    table = (tmp_path / "out" / "table.md").read_text()
    assert "1.548 at 575" in table
    before = (tmp_path / "out" / "table.md").read_bytes()
    assert _shakespeare(small_shakespeare, tmp_path, "--seeds", "2") == 0
    assert (tmp_path / "out" / "table.md").read_bytes() == before


def test_results_outlive_their_run_folders(small_shakespeare, tmp_path, monkeypatch) -> None:
    assert _shakespeare(small_shakespeare, tmp_path, "--model", "mingru") == 0
    first = json.loads((tmp_path / "out" / "figures.json").read_text())["runs"]
    (tmp_path / "runs").rename(tmp_path / "gone")
    monkeypatch.setattr(results.measure, "commit", lambda: "later")
    monkeypatch.setattr(results.measure, "processor", lambda: "another")
    assert _shakespeare(small_shakespeare, tmp_path, "--model", "lstm") == 0
    runs = json.loads((tmp_path / "out" / "figures.json").read_text())["runs"]
    lstm, mingru = runs
    assert [mingru] == first
    assert (lstm["name"], lstm["commit"], lstm["processor"]) == ("lstm", "later", "another")
    table = (tmp_path / "out" / "table.md").read_text()
    assert "minGRU" in table
    assert "nn.LSTM" in table
    # trained anew, the same comes out and keeps its origin
    assert _shakespeare(small_shakespeare, tmp_path, "--model", "mingru") == 0
    assert json.loads((tmp_path / "out" / "figures.json").read_text())["runs"] == runs
    (tmp_path / "out" / "figures.json").write_text('{"runs": 3}')
    with pytest.raises(ValueError, match=r"figures\.json is damaged: KeyError"):
        results.with_earlier(tmp_path / "out", [], ("name",))


def test_another_text_is_refused_with_both_sums(tmp_path, capsys) -> None:
    (tmp_path / "text").write_text("to be")
    assert _shakespeare(tmp_path / "text", tmp_path) == 2
    said = capsys.readouterr().err
    assert shakespeare_text.TINY_SHAKESPEARE_SHA256 in said
    assert f"got {hashlib.sha256(b'to be').hexdigest()}" in said
    assert not (tmp_path / "runs").exists()


def test_efficiency_measures_every_length_once(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(efficiency, "LENGTHS", (8,))
    monkeypatch.setattr(efficiency, "CONTEXTS", (1, 8))
    monkeypatch.setattr(efficiency, "BATCHES", (1,))
    monkeypatch.setattr(efficiency, "_CHECKED", (2, 8, efficiency.WIDTH))
    monkeypatch.setattr(efficiency, "_told", lambda what, name, shape: 1.0)
    where = ["--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "out")]
    command = ["reproduce", "efficiency", *where, "--batch-size", "2", "--seconds", "0"]
    assert cli.main(command) == 0
    figures = json.loads((tmp_path / "out" / "figures.json").read_text())
    assert set(figures["training"]) == {"8"}
    first = figures["training"]["8"]
    assert set(first["figures"]) == {subject.name for subject in efficiency.SUBJECTS}
    monkeypatch.setattr(efficiency, "_training", None)
    monkeypatch.setattr(efficiency, "_streaming", None)
    # a later commit writes the tables again, and the figures keep theirs
    monkeypatch.setattr(results.measure, "commit", lambda: "later")
    assert cli.main(command) == 0
    figures = json.loads((tmp_path / "out" / "figures.json").read_text())
    assert figures["commit"] == "later"
    assert figures["training"]["8"] == first
    assert first["commit"] != "later"


@pytest.mark.parametrize("what", ["peak", "time"])
def test_long_steps_are_measured_in_processes_of_their_own(what, capsys) -> None:
    report = {"peak": efficiency.report_peak, "time": efficiency.report_time}[what]
    report("minGRU", (2, 4096, 64), torch.get_num_threads())
    # megabytes of gates, states and their gradients; seconds
    assert 0 < json.loads(capsys.readouterr().out) < 100


def test_what_does_not_fit_is_left_out(monkeypatch) -> None:
    def told(what: str, name: str, shape: tuple[int, int, int]) -> float:
        if name == "Mamba":
            raise OSError("it said nothing")
        return 2.0

    monkeypatch.setattr(efficiency, "_told", told)
    monkeypatch.setattr(efficiency, "_check", lambda subject: None)
    found = efficiency._training(65536, efficiency.EfficiencyConfig())
    assert set(found) == {"minGRU", "minLSTM", "nn.GRU", "nn.LSTM"}
    assert found["minGRU"] == {"ms": 2000.0, "low": 2000.0, "high": 2000.0, "MB": 2.0}


def test_page_holds_all_results(small_copying, tmp_path, capsys) -> None:
    assert _copying(tmp_path, "--seeds", "1", "--model", "mingru-1") == 0
    (tmp_path / "out").rename(tmp_path / "selective-copying")
    out = tmp_path / "index.html"
    assert cli.main(["reproduce", "report", "--results", str(tmp_path), "--out", str(out)]) == 0
    html = out.read_text()
    assert "minGRU, 1 layer" in html
    assert 'src="data:image/png;base64,' in html
    assert "http" not in html.replace("https://arxiv.org/abs/2410.01201", "")
    assert cli.main(["reproduce", "report", "--results", str(tmp_path / "runs")]) == 2
    assert "holds no results" in capsys.readouterr().err
    (tmp_path / "selective-copying" / "figures.json").write_text("{}")
    with pytest.raises(ValueError, match="is damaged: KeyError"):
        page.write(tmp_path, out)


def test_a_table_is_aligned() -> None:
    table = TextTable("Title", ["model", "x"], [["a", "1.5"], ["long name", "2"]], ["A note."])
    assert table.markdown().splitlines() == [
        "## Title",
        "",
        "| model     | x   |",
        "| --------- | --- |",
        "| a         | 1.5 |",
        "| long name | 2   |",
        "",
        "A note.",
    ]
    assert spread([0.5], 2) == "0.50"
