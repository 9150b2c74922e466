"""The benches of packed batches and single steps, without the clock: who is right, who is not."""

import sys

import pytest
import torch
from torch import Tensor, nn

from minrnn import MinGRU, MinGRUCell, MinLSTM, cli
from minrnn.bench import decision, measure, mixers, packed, step


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "QUICK_SIZES", (5, 2, 9, 4))
    monkeypatch.setattr(packed, "CHECKED", 5)
    monkeypatch.setattr(packed, "QUICK_SECONDS", 0.0)
    monkeypatch.setattr(step, "QUICK_SHAPES", ((3, 1, 4),))
    monkeypatch.setattr(step, "QUICK_SECONDS", 0.0)
    monkeypatch.setattr(measure, "MAX_ROUNDS", 3)
    # it would outlast the test
    monkeypatch.setattr(measure, "tell_allocator", lambda keep: measure.KEPT)


def test_packed_batches_are_right_and_timed(quick, capsys) -> None:
    assert cli.main(["bench", "packed", "--quick"]) == 0
    said = capsys.readouterr().out
    for name in ("MinGRU", "nn.GRU", "MinLSTM", "nn.LSTM"):
        [line] = [line for line in said.splitlines() if line.split()[:1] == [name] and "e-" in line]
        assert line.endswith("steps/s")
    assert "5, 9, 4)" in said or "(5, " in said


def test_the_answer_to_a_packed_batch_is_that_of_each_sequence_alone() -> None:
    series = [torch.randn(T, 4) for T in (5, 2, 7)]
    for kind in (MinGRU, nn.LSTM):
        layer = packed._build(kind, 4)
        y, dx, *grads = packed._answer(layer, series)
        layer = layer.double()
        together = torch.cat([layer(x.double())[0] for x in series])
        torch.testing.assert_close(y, together.detach())
        assert dx.shape == (14, 4)
        assert [grad.shape for grad in grads] == [weight.shape for weight in layer.parameters()]


class _OneDirection(MinGRU):
    """Wrong: its reverse direction runs forward."""

    def _recur(self, gates: Tensor, h0: Tensor | None, **layout: object) -> tuple[Tensor, Tensor]:
        return super()._recur(gates, h0, **layout | {"reverse": False})


def test_a_wrong_packed_layer_has_no_time(quick, monkeypatch) -> None:
    monkeypatch.setattr(packed, "PAIRS", ((_OneDirection, nn.GRU),))
    [table] = packed.measured(quick=True)
    ours, theirs = table.rows
    assert ours.value is None
    assert ours.note.startswith("wrong")
    assert theirs.value is not None
    assert theirs.ratio is None


def test_steps_of_cells_and_layers_are_right_and_timed(quick, capsys) -> None:
    assert cli.main(["bench", "step", "--quick"]) == 0
    said = capsys.readouterr().out
    for name in ("MinGRUCell", "nn.GRUCell", "MinLSTM, T = 1", "nn.LSTM, T = 1"):
        assert any(line.strip().startswith(name + " ") for line in said.splitlines()), name
    assert "wrong" not in said


class _LazyCell(MinGRUCell):
    """Wrong: it forgets its state."""

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        return super().forward(input)


def test_a_wrong_step_has_no_time(quick, monkeypatch) -> None:
    monkeypatch.setattr(step, "CELLS", ((_LazyCell, nn.GRUCell, MinLSTM),))
    [table] = step.measured(quick=True)
    wrong, right, layer = table.rows
    assert wrong.note.startswith("wrong")
    assert right.value is not None
    assert layer.value is not None


def test_decisions_are_right_and_timed(quick, monkeypatch, capsys) -> None:
    monkeypatch.setattr(decision, "BATCH", 8)
    monkeypatch.setattr(decision, "QUICK_SECONDS", 0.0)
    assert cli.main(["bench", "decision", "--quick"]) == 0
    said = capsys.readouterr().out
    for name in ("minGRU, stream", "Decision Transformer, window", "minLSTM"):
        row = next(line for line in said.splitlines() if name in line)
        assert "wrong" not in row
    if sys.version_info >= (3, 11):
        assert "missing" not in said


def test_mixers_are_right_and_timed(quick, monkeypatch, capsys) -> None:
    monkeypatch.setattr(mixers, "QUICK_SHAPE", (2, 9, 64))
    monkeypatch.setattr(mixers, "QUICK_SECONDS", 0.0)
    assert cli.main(["bench", "mixers", "--quick"]) == 0
    said = capsys.readouterr().out
    for name in ("Mamba ", "attention block", "nn.TransformerEncoderLayer"):
        assert any(line.strip().startswith(name) for line in said.splitlines()), name
    assert "wrong" not in said


@pytest.mark.long
def test_bench_stream_checks_and_times_a_symbol(capsys, tmp_path) -> None:
    assert cli.main(["bench", "stream", "--quick", "--out", str(tmp_path)]) == 0
    assert (tmp_path / "bench-stream.png").read_bytes().startswith(b"\x89PNG")
    said = capsys.readouterr().out
    for name in ("packed, float32", "packed, int8", "modules", "GPT-2", "minGRU-pytorch minLM"):
        [line] = [one for one in said.split("a symbol of each")[0].splitlines() if name in one]
        assert "symbols/s" in line, line
    # the state of the paper's model, behind any text
    assert said.count("23,040 bytes of state") == 2
