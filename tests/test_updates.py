"""An update is the mean over its targets, each counting once, however it is computed."""

import json
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from ranks import on_ranks
from torch import Tensor, nn

from minrnn import checkpoint, gradients, losses
from minrnn.data import text
from minrnn.data.batch import Batch
from minrnn.data.windows import Windows
from minrnn.evaluation import evaluate
from minrnn.models import LanguageModel, ModelConfig
from minrnn.state import State
from minrnn.tasks import TextTask
from minrnn.train import Event, train
from minrnn.train_config import TrainConfig
from tests.training import write_text

MODEL = ModelConfig(vocab_size=7, width=8, num_layers=1, dropout=0.0)
CONFIG = TrainConfig(
    steps=4, batch_size=16, warmup_steps=0, learning_rate=1e-2, eval_every=4, log_every=1
)


class Uneven:
    """Rows with very different numbers of targets; `empty` rows have none."""

    validates_streams = False

    def __init__(self, empty: int = 5) -> None:
        self.empty, self.threads = empty, set()

    def batch(self, batch_size: int, seed: tuple[int, ...], rows: slice = slice(None)) -> Batch:
        self.threads.add(threading.current_thread())
        random = np.random.default_rng(seed)
        ids = torch.from_numpy(random.integers(7, size=(batch_size, 13)))
        counts = torch.tensor([0] * self.empty + [1, 12, 2, 12, 1, 1, 7, 12, 1, 3, 12, 12][:16])
        counts = counts.repeat(batch_size)[:batch_size]
        mask = torch.arange(12) < counts[:, None]
        return Batch(ids[:, :-1], ids[:, 1:], mask).rows(rows)

    def goes_on(self, step: int) -> bool:
        return False

    def validation(self, batch_size: int) -> Iterator[Batch]:
        whole = self.batch(10, (1 << 40,))
        # batches of unequal size, one of them without a target
        return iter([whole.rows(slice(0, 2)), whole.rows(slice(2, 9)), whole.rows(slice(9, 10))])

    def loss(self, answers: Tensor, batch: Batch) -> Tensor:
        return losses.next_symbol(answers, batch)


def _trained(folder: Path, task: object, config: TrainConfig = CONFIG) -> tuple[Tensor, list]:
    """The weights of a model of float64, and the losses."""
    folder.mkdir(exist_ok=True, parents=True)
    if not (folder / "config.json").is_file():
        checkpoint.write_config(folder, {"model": checkpoint.dataclasses.asdict(MODEL)})
    torch.manual_seed(0)
    model = LanguageModel(MODEL)
    # autocast takes no float64
    model = model.double() if config.precision == "no" else model
    seen: list[Event] = []
    train(model, task, config, folder, seen.append)
    # whole sequences again, whoever shared their time
    assert all(getattr(module, "time_group", None) is None for module in model.modules())
    weights = torch.cat([p.detach().flatten() for p in model.parameters()])
    return weights, [x for event in seen for x in (event.loss, event.valid_loss) if x is not None]


@pytest.mark.parametrize(("accumulation", "chunk"), [(2, 0), (4, 5), (16, 0), (16, 6), (1, 5)])
def test_micro_batches_are_weighed_by_their_targets(tmp_path, accumulation, chunk) -> None:
    weights, curve = _trained(tmp_path / "one", Uneven())
    config = replace(CONFIG, accumulation=accumulation, chunk=chunk)
    found, losses_ = _trained(tmp_path / "parts", Uneven(), config)
    torch.testing.assert_close(found, weights, rtol=1e-9, atol=1e-11)
    assert losses_ == pytest.approx(curve, rel=1e-10)


def test_the_loss_is_the_mean_over_all_targets(tmp_path) -> None:
    """Against one plain expression of the model at its start."""
    torch.manual_seed(0)
    model, batch = LanguageModel(MODEL).double(), Uneven().batch(16, (0, 0, 0))
    logits = model(batch.inputs)[0].log_softmax(-1)
    each = -logits.gather(2, batch.targets[..., None])[..., 0]
    _, curve = _trained(tmp_path, Uneven(), replace(CONFIG, accumulation=16))
    assert curve[0] == pytest.approx(each[batch.mask].mean().item(), rel=1e-12)


@pytest.mark.parametrize("chunk", [0, 5])
@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_an_update_without_targets_is_finite(tmp_path, chunk, precision) -> None:
    class Nothing(Uneven):
        def batch(self, batch_size: int, seed: tuple[int, ...], rows: slice = slice(None)) -> Batch:
            found = super().batch(batch_size, seed, rows)
            return Batch(found.inputs, found.targets, found.mask & (seed[0] != 0))

    config = replace(CONFIG, chunk=chunk, accumulation=4, precision=precision)
    weights, curve = _trained(tmp_path, Nothing(), config)
    assert curve[:4] == [0.0] * 4
    assert torch.isfinite(weights).all()


def _check_ranks(folder: Path) -> None:
    config = replace(CONFIG, accumulation=2)
    weights, curve = _trained(folder / "two", Uneven(), config)
    time, also = _trained(folder / "time", Uneven(), replace(config, time_ranks=2))
    wanted, losses_ = torch.load(folder / "wanted.pt", weights_only=True)
    for found, values in ((weights, curve), (time, also)):
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-11)
        assert values == pytest.approx(losses_, rel=1e-10)


def test_processes_are_weighed_by_their_targets(tmp_path) -> None:
    torch.save(_trained(tmp_path / "one", Uneven()), tmp_path / "wanted.pt")
    for name in ("two", "time"):
        (tmp_path / name).mkdir()
        config = {"model": checkpoint.dataclasses.asdict(MODEL)}
        checkpoint.write_config(tmp_path / name, config)
    on_ranks(2, _check_ranks, tmp_path)


class _Recorded(TextTask):
    """Keeps the training windows, of which a small vocabulary is made."""

    def __init__(self, windows: Windows, valid_limit: int) -> None:
        super().__init__(windows, valid_limit)
        self.read: list[Tensor] = []

    def batch(self, batch_size: int, seed: tuple[int, ...], rows: slice = slice(None)) -> Batch:
        found = super().batch(batch_size, seed, rows)
        self.read.append(found.inputs)
        return Batch(found.inputs % 7, found.targets % 7, found.mask)

    def validation(self, batch_size: int) -> Iterator[Batch]:
        found = super().validation(batch_size)
        return (Batch(one.inputs % 7, one.targets % 7, one.mask) for one in found)


@pytest.mark.parametrize("order", ["random", "shuffled", "consecutive"])
def test_micro_batches_read_the_same_windows(tmp_path, order) -> None:
    corpus = text.build(write_text(tmp_path / "text.txt"), tmp_path / "corpus", "bytes", 0.1)
    curves, read = [], []
    for accumulation in (1, 4):
        task = _Recorded(Windows(corpus, 12, order, 8), 50)
        config = replace(CONFIG, batch_size=8, accumulation=accumulation, steps=3, eval_every=9)
        curves.append(_trained(tmp_path / str(accumulation), task, config)[1])
        read.append(torch.cat(task.read))
    assert torch.equal(read[0], read[1])
    assert curves[1] == pytest.approx(curves[0], rel=1e-10)


def test_batches_are_made_on_another_thread_and_no_further_than_the_end(tmp_path) -> None:
    task, made = Uneven(), []
    make = task.batch
    task.batch = lambda size, seed, *rows: made.append(seed) or make(size, seed, *rows)
    _trained(tmp_path, task, replace(CONFIG, steps=3, eval_every=9, accumulation=2))
    assert made[:-1] == [(0, step, 0) for step in range(3) for _ in range(2)]
    # validation is read on this one, and the other has ended
    assert threading.main_thread() in task.threads
    (other,) = task.threads - {threading.main_thread()}
    assert not other.is_alive()


def test_an_error_of_a_task_is_raised_where_it_is_trained(tmp_path) -> None:
    task = Uneven()
    make = task.batch

    def broken(size: int, seed: tuple[int, ...], rows: slice = slice(None)) -> Batch:
        if seed[1] == 2:
            raise LookupError("no such batch")
        return make(size, seed, rows)

    task.batch, before = broken, threading.active_count()
    with pytest.raises(LookupError, match="no such batch"):
        _trained(tmp_path, task)
    assert threading.active_count() == before
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]


@pytest.mark.parametrize("chunk", [0, 5])
@pytest.mark.parametrize("empty", [0, 5, 16])
def test_a_micro_batch_does_not_wait_for_the_device(chunk, empty) -> None:
    """On a device without content: whatever would be read from it is an error."""
    device = torch.device("meta")
    model = LanguageModel(MODEL).to(device)
    batch = Uneven(empty).batch(16, (0, 0, 0)).to(device)
    count = torch.full((), 50.0, dtype=torch.float64, device=device)
    for total in (50, count):
        loss, _ = gradients.backward(model, losses.next_symbol, batch, chunk=chunk, count=total)
        assert loss.device == device
    actions = torch.empty(16, 12, 3, device=device, requires_grad=True)
    wide = Batch(batch.inputs, torch.empty(16, 12, 3, device=device), batch.mask, batch.cpu_mask)
    if wide.num_targets:
        losses.action_error(actions, wide).backward()
    with pytest.raises(RuntimeError, match="meta"):
        # of a mask that has never been on the CPU nothing is known
        _ = Batch(batch.inputs, batch.targets, batch.mask).num_targets


def test_parts_of_a_batch_keep_what_was_counted() -> None:
    batch = Uneven().batch(16, (0, 0, 0))
    there = batch.to(torch.device("meta"))
    for one, other in ((batch, there), (batch.rows(slice(3, 9)), there.rows(slice(3, 9)))):
        assert one.num_targets == other.num_targets == int(one.mask.sum())
    full = Batch(batch.inputs, batch.targets, torch.ones_like(batch.mask))
    assert full.places is None
    assert torch.equal(batch.places, batch.mask.flatten().nonzero()[:, 0])


class _Plain(nn.Module):
    """A model with a part that is kept in evaluation mode, and one that fails if asked to."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.frozen = nn.Embedding(7, 7), nn.Dropout(0.5)
        self.fails = False

    def forward(self, ids: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        assert not self.fails
        x = self.embedding(ids)
        assert self.frozen(x).equal(x)
        return x, State({"h": x[:, -1]})


def test_evaluation_restores_the_mode_of_each_part() -> None:
    model = _Plain()
    model.frozen.eval()
    batches = list(Uneven().validation(4))
    evaluate(model, losses.next_symbol, batches)
    assert (model.training, model.embedding.training, model.frozen.training) == (True, True, False)
    model.fails = True
    with pytest.raises(AssertionError):
        evaluate(model, losses.next_symbol, batches)
    assert (model.training, model.embedding.training, model.frozen.training) == (True, True, False)
    model.eval()
    model.frozen.train()
    with pytest.raises(AssertionError):
        evaluate(model, losses.next_symbol, batches)
    assert (model.training, model.frozen.training) == (False, True)


def test_training_leaves_frozen_parts_in_evaluation_mode(tmp_path) -> None:
    model = _Plain()
    model.frozen.eval()
    checkpoint.write_config(tmp_path, {})
    train(model, Uneven(), CONFIG, tmp_path)
    assert (model.training, model.frozen.training) == (True, False)
