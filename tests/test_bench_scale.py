"""The formulas of many processes against what runs, and the bench that holds both."""

import json
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from minrnn import cli
from minrnn.bench import plan, scale, scale_ranks
from minrnn.bench.plan import Link, Machine, Split
from minrnn.bench.scale_ranks import Told
from minrnn.models import LanguageModel, ModelConfig

CONFIG = ModelConfig(vocab_size=11, width=8, num_layers=2, dropout=0.0)
# powers of ten, to tell them apart
MACHINE = Machine(
    "a machine", 1e12, 1e10, 1e9, Link(1e8, 1e-5), Link(1e7, 1e-4), 4, 4, overlaps=False
)


@pytest.fixture(scope="module")
def model() -> plan.Model:
    return plan.counted("small", CONFIG)


def test_a_model_is_counted(model) -> None:
    built = LanguageModel(CONFIG)
    assert model.parameters == sum(p.numel() for p in built.parameters())
    # conv pointwise, k and v of twice the width, back again, feed-forward of four; the head
    assert model.flops == 6 * (2 * (64 + 4 * 64 + 2 * 64 + 8 * 64) + 88)
    assert (model.layers, model.states, model.halo) == (2, 2 * 16, 2 * 3 * 8)
    kept, weights = {}, {p.untyped_storage().data_ptr() for p in built.parameters()}

    def keep(x: torch.Tensor) -> torch.Tensor:
        if x.is_floating_point() and x.untyped_storage().data_ptr() not in weights:
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes() // 4
        return x

    ids = torch.randint(11, (1, 500))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        F.cross_entropy(built(ids)[0].flatten(0, 1), ids.flatten())
    # what is kept on the way, for each step
    assert sum(kept.values()) / 500 == pytest.approx(model.kept, rel=0.25)
    wide = plan.counted("wide", replace(CONFIG, width=16, vocab_size=22))
    assert wide.moved == pytest.approx(2 * model.moved, rel=0.02)
    assert wide.kept == pytest.approx(2 * model.kept, rel=0.02)


def test_costs_follow_their_formulas(model) -> None:
    def cost(T: int = 4096, batch: int = 8, machine: Machine = MACHINE, **split: int) -> plan.Cost:
        return plan.cost(model, batch, T, Split(**split), machine)

    alone = cost()
    assert alone.backward == pytest.approx(2 * alone.forward)
    assert alone.states == alone.gradients == alone.waits == 0.0
    # one more forward, and C in place of T steps beside the states
    chunked = cost(chunk=256)
    assert chunked.backward == pytest.approx(3 * alone.forward)
    assert chunked.memory < alone.memory / 10
    # data: a share of the work, and of what is kept
    data = cost(data=4)
    assert data.forward == pytest.approx(alone.forward / 4)
    assert data.gradients == pytest.approx(2 * 4 * model.parameters * 0.75 / 1e8 + 4e-5)
    assert data.seconds == data.forward + data.backward + data.gradients + data.update
    # time: what is exchanged does not depend on T
    time = cost(time=4)
    assert time.states == cost(T=1 << 20, time=4).states
    numbers = 3 * 8 * (4 * model.states + 3 * model.halo)
    assert time.states == pytest.approx(4 * numbers / 1e8 + 4 * 2 * 2 * 1e-5)
    assert time.forward > data.forward
    # sharded: less memory, an update of a share
    sharded = cost(data=4, sharded=True)
    assert sharded.update == pytest.approx(data.update / 4)
    assert data.memory - sharded.memory == pytest.approx(12 * model.parameters)
    # a process beyond the node: what four links between nodes carry, which is less than one within
    assert cost(data=8).gradients == pytest.approx(2 * 4 * model.parameters * 7 / 8 / 4e7 + 6e-4)
    # hidden behind the backward pass
    hidden = cost(data=4, machine=MACHINE._replace(overlaps=True))
    assert hidden.waits == pytest.approx(max(0.0, hidden.gradients - hidden.backward), abs=1e-15)


def test_the_best_split_fits_and_is_the_fastest(model) -> None:
    for batch, T, count in ((16, 1024, 16), (2, 1 << 16, 16), (2, 1 << 18, 2)):
        split, found = plan.best(model, batch, T, count, MACHINE)
        assert split.count == count
        assert split.data <= batch
        assert found.memory <= 0.8 * MACHINE.memory
        for other in plan.splits(batch, T, count):
            cost = plan.cost(model, batch, T, other, MACHINE)
            assert cost.seconds >= found.seconds or cost.memory > 0.8 * MACHINE.memory
    # more processes than sequences: some share the time of one
    assert plan.best(model, 2, 1 << 16, 16, MACHINE)[0].time >= 8
    small = MACHINE._replace(memory=2e6)
    # what does not fit goes in chunks, or not at all
    assert plan.best(model, 2, 1 << 18, 2, small)[0].chunk > 0
    with pytest.raises(ValueError, match="small does not fit into 2 x a machine"):
        plan.best(model, 2, 1 << 18, 2, MACHINE._replace(memory=1e4))


@pytest.mark.long
def test_processes_tell_their_time_and_the_same_loss() -> None:
    tiny = replace(CONFIG, width=4, num_layers=1)
    found = {
        split: scale_ranks.told(split, tiny, 2, 64)
        for split in (Split(), Split(time=2, chunk=16), Split(data=2, sharded=True))
    }
    for split, told in found.items():
        assert min(told) >= 0.0
        assert told.seconds > 0.0
        assert told.loss == pytest.approx(found[Split()].loss, rel=1e-5)
        if split.count > 1:
            assert 0 < told.link < 1e12
            assert 0 < told.latency < 1.0


def test_the_bench_writes_what_it_says(tmp_path, monkeypatch, capsys) -> None:
    def told(split: Split, *_: object) -> Told:
        return Told(0.1 / split.count, 5.0, 1e11, 1e10, 1e9, 1e-4)

    monkeypatch.setattr(scale_ranks, "told", told)
    assert cli.main(["bench", "scale", "--quick", "--out", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "calculated, not measured, H100" in said
    tables = json.loads((tmp_path / "bench-scale.json").read_text())["tables"]
    measured, calculated, *gpus = tables
    assert [row["value"] for row in measured["rows"]] == [100.0, 50.0, 50.0]
    # one process sets the rates
    assert calculated["rows"][0]["value"] == pytest.approx(100.0)
    assert len(gpus) == 4
    for table in gpus:
        values = [row["value"] for row in table["rows"]]
        assert values == sorted(values, reverse=True)
    assert (tmp_path / "bench-scale.png").stat().st_size > 10_000
    # another loss is no time
    monkeypatch.setattr(
        scale_ranks,
        "told",
        lambda split, *_: Told(0.1, 5.0 if split == Split() else 5.1, 1e11, 1e10, 1e9, 1e-4),
    )
    [first, *rest] = next(scale.measured(quick=True)).rows
    assert first.value == pytest.approx(100.0)
    assert [(row.value, row.note) for row in rest] == [(None, "wrong")] * 2
