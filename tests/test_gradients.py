"""Gradients of a long sequence piece by piece are those of the whole."""

import math
import sys

import pytest
import torch
from torch import Tensor

from minrnn import gradients
from minrnn.bench import chunk as long_sequence
from minrnn.bench import memory
from minrnn.data.batch import Batch
from minrnn.losses import next_symbol
from minrnn.models import LanguageModel, ModelConfig
from minrnn.state import State


def _model(mixer: str = "mingru", dropout: float = 0.0) -> LanguageModel:
    torch.manual_seed(0)
    sizes = {"width": 12, "num_layers": 2, "num_heads": 2}
    return LanguageModel(ModelConfig(7, mixer=mixer, dropout=dropout, **sizes)).double()


def _batch(T: int = 50) -> Batch:
    ids = torch.randint(7, (3, T + 1))
    return Batch(ids[:, :-1], ids[:, 1:], torch.rand(3, T) < 0.8)


def _taken(model: LanguageModel, batch: Batch, **options: object) -> list[Tensor]:
    """Loss, last state, gradients."""
    model.zero_grad()
    loss, state = gradients.backward(model, next_symbol, batch, **options)
    assert not loss.requires_grad
    assert not any(x.requires_grad for x in state.flatten().values())
    return [loss, *state.flatten().values(), *(p.grad for p in model.parameters())]


@pytest.mark.parametrize("mixer", ["mingru", "minlstm", "gru", "mamba", "s4d", "aaren"])
@pytest.mark.parametrize("chunk", [1, 7, 25, 49, 50, 60])
def test_pieces_give_the_gradient_of_the_whole(mixer, chunk) -> None:
    model, batch = _model(mixer), _batch()
    state = model(batch.inputs[:, :4])[1].map(torch.Tensor.detach)
    for before in (None, state):
        whole = _taken(model, batch, state=before)
        pieces = _taken(model, batch, state=before, chunk=chunk)
        for one, other in zip(pieces, whole, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def _long_gradients(dtype: torch.dtype, chunk: int) -> list[Tensor]:
    """Of a language model of 2 layers and width 64 over 2^14 symbols."""
    model, batch = long_sequence.build().to(dtype), long_sequence.batch_of(1 << 14)
    gradients.backward(model, next_symbol, batch, chunk=chunk)
    return [p.grad.double() for p in model.parameters() if p.grad is not None]


def test_a_long_sequence_has_the_gradient_of_the_whole() -> None:
    whole = _long_gradients(torch.float64, 0)
    for one, other in zip(_long_gradients(torch.float64, 4096), whole, strict=True):
        assert (one - other).abs().max() < 1e-13 * other.abs().max()
    # in float32 a sum over 2^14 steps and one over 4 sums of 2^12 round differently; both are
    # equally far from float64, where a pre-activation or two lie on the other side of g's kink
    single, pieces = _long_gradients(torch.float32, 0), _long_gradients(torch.float32, 4096)
    norm = torch.cat([x.flatten() for x in whole]).norm()
    apart = torch.cat([(x - y).flatten() for x, y in zip(single, pieces, strict=True)]).norm()
    assert apart < 1e-6 * norm
    for one, other, right in zip(pieces, single, whole, strict=True):
        rounding = (other - right).abs().max() + 1e-6 * right.abs().max()
        assert (one - right).abs().max() < 1.5 * rounding
        assert (one - other).abs().max() < 1e-5 * right.abs().max()


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_does_not_grow_with_the_sequence() -> None:
    said = "from minrnn.bench import chunk; chunk.report({}, 2048, 1)"
    (short, _), (long_, _) = (memory.told(said.format(T)) for T in (1 << 13, 1 << 16))
    # T / chunk states of 2 layers lie within this
    assert long_ < 1.1 * short
    whole, _ = memory.told("from minrnn.bench import chunk; chunk.report(1 << 13, 0, 1)")
    assert whole > 1.5 * short


def _short() -> Batch:
    """Ten steps of three tokens."""
    batch = _batch(10)
    return Batch(batch.inputs % 3, batch.targets % 3, batch.mask)


class _Noisy(torch.nn.Module):
    """Draws from the generators of the CPU, and keeps what it drew."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(3))
        self.drawn: list[Tensor] = []

    def forward(self, ids: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        self.drawn.append(torch.rand(*ids.shape, 3))
        start = torch.zeros(len(ids), 3) if state is None else state.tensor("h")
        h = start[:, None] + (self.drawn[-1] * self.weight).cumsum(1)
        return h, State({"h": h[:, -1]})


def test_a_chunk_draws_the_same_both_times_and_the_caller_continues() -> None:
    model, batch = _Noisy(), _short()
    torch.manual_seed(3)
    once = [torch.rand(3, T, 3) for T in (4, 4, 2)]
    after = torch.rand(5)
    torch.manual_seed(3)
    loss, _ = gradients.backward(model, next_symbol, batch, chunk=4)
    assert torch.equal(torch.rand(5), after)
    # forward, then from the last chunk to the first
    wanted = [once[0], once[1], once[2], once[1], once[0]]
    assert all(torch.equal(x, y) for x, y in zip(model.drawn, wanted, strict=True))
    torch.manual_seed(3)
    whole = _Noisy()
    states, losses = None, []
    for first in range(0, 10, 4):
        part = batch.map(lambda x, first=first: x[:, first : first + 4])
        y, states = whole(part.inputs, states)
        losses.append(next_symbol(y, part) * part.num_targets)
    (sum(losses) / batch.num_targets).backward()
    torch.testing.assert_close(model.weight.grad, whole.weight.grad)
    torch.testing.assert_close(loss, sum(losses).detach() / batch.num_targets)


def test_steps_of_a_loop_draw_anew() -> None:
    """Neither dropout nor what the caller draws repeats from the second step on."""
    model, batch = _model(dropout=0.5), _batch()
    losses, ids = zip(
        *((_taken(model, batch, chunk=8)[0].item(), torch.rand(()).item()) for _ in range(4)),
        strict=True,
    )
    assert len(set(losses)) == len(set(ids)) == 4
    torch.manual_seed(0)
    first = _taken(model, batch, chunk=8)[0]
    torch.manual_seed(0)
    assert torch.equal(_taken(model, batch, chunk=8)[0], first)


def test_an_error_leaves_the_generators_at_the_caller() -> None:
    """What a chunk that is run again has drawn is not what the caller continues with."""
    model, batch = _Noisy(), _short()
    torch.manual_seed(3)
    _ = [torch.rand(3, T, 3) for T in (4, 4, 2)]
    after = torch.rand(5)

    def failing(outputs: Tensor, batch: Batch) -> Tensor:
        if outputs.shape[1] == 4:
            raise RuntimeError("on purpose")
        return next_symbol(outputs, batch)

    torch.manual_seed(3)
    with pytest.raises(RuntimeError, match="on purpose"):
        gradients.backward(model, failing, batch, chunk=4)
    assert torch.equal(torch.rand(5), after)


def test_dropout_is_the_same_when_a_piece_is_run_again() -> None:
    """The loss of the second run is that of the model whose dropout the first run drew."""
    model, batch = _model(dropout=0.5), _batch()
    eps = 1e-6
    weight = model.embedding.weight
    torch.manual_seed(5)
    _, *_ = _taken(model, batch, chunk=8)
    slope = weight.grad[1, 2].item()
    losses = []
    for shift in (eps, -2 * eps):
        with torch.no_grad():
            weight[1, 2] += shift
        torch.manual_seed(5)
        losses.append(_taken(model, batch, chunk=8)[0].item())
    # a difference quotient holds only if both runs of each piece drew the same
    assert (losses[0] - losses[1]) / (2 * eps) == pytest.approx(slope, rel=1e-4, abs=1e-7)


def test_a_part_without_targets_is_a_loss_of_zero() -> None:
    """Whatever the outputs are: the sum of none of them."""
    model, batch = _model(), _batch()
    batch.mask[:] = False
    for chunk in (0, 8):
        loss, *rest = _taken(model, batch, count=5, chunk=chunk)
        assert loss == 0
        assert all(torch.isfinite(x).all() for x in rest)
        assert not any(p.grad.any() for p in model.parameters())
    infinite = torch.full((3, 50, 7), math.inf, requires_grad=True)
    state = State({"h": torch.zeros(3, 1)})
    loss, _ = gradients.backward(lambda *_: (infinite, state), next_symbol, batch, count=5)
    assert loss == 0
    assert not infinite.grad.any()


def test_pieces_without_targets_still_pass_the_gradient_on() -> None:
    model, batch = _model(), _batch()
    batch.mask[:, :40] = False
    for one, other in zip(_taken(model, batch, chunk=8), _taken(model, batch), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_only_the_first_piece_is_synced() -> None:
    """What is run last is what other processes wait for."""
    seen = []

    class Unsynced:
        def __enter__(self) -> None:
            seen.append(True)

        def __exit__(self, *error: object) -> None:
            pass

    gradients.backward(_model(), next_symbol, _batch(), chunk=10, unsynced=Unsynced)
    assert len(seen) == 4


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="`chunk` must be >= 0, got -1"):
        gradients.backward(_model(), next_symbol, _batch(), chunk=-1)
    for count in (0, -3, math.nan, math.inf):
        with pytest.raises(ValueError, match=rf"`count` must be a finite number > 0, got {count}"):
            gradients.backward(_model(), next_symbol, _batch(), count=count)
    empty = _batch()
    empty.mask[:] = False
    with pytest.raises(ValueError, match="`batch` must hold at least one target"):
        gradients.backward(_model(), next_symbol, empty)


@pytest.mark.parametrize("chunk", [0, 20])
def test_no_gradient_is_taken_of_the_first_state(chunk: int) -> None:
    model, start = _model(), torch.ones((), dtype=torch.float64, requires_grad=True)
    state = model.init_state(3).map(lambda x: x + start)
    gradients.backward(model, next_symbol, _batch(), chunk=chunk, state=state)
    assert start.grad is None
    # a state that a call returned has a graph, which is not differentiated a second time
    _, state = model(_batch().inputs)
    for _ in range(2):
        gradients.backward(model, next_symbol, _batch(), chunk=chunk, state=state)
