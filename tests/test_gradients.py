"""Gradients of a long sequence piece by piece are those of the whole."""

import pytest
import torch
from torch import Tensor

from minrnn import gradients
from minrnn.data.batch import Batch
from minrnn.losses import next_symbol
from minrnn.models import LanguageModel, ModelConfig


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
    torch.manual_seed(5)
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


def test_dropout_is_the_same_when_a_piece_is_run_again() -> None:
    """The loss of the second run is that of the model whose dropout the first run drew."""
    model, batch = _model(dropout=0.5), _batch()
    eps = 1e-6
    weight = model.embedding.weight
    _, *_ = _taken(model, batch, chunk=8)
    slope = weight.grad[1, 2].item()
    losses = []
    for shift in (eps, -2 * eps):
        with torch.no_grad():
            weight[1, 2] += shift
        losses.append(_taken(model, batch, chunk=8)[0].item())
    # a difference quotient holds only if both runs of each piece drew the same
    assert (losses[0] - losses[1]) / (2 * eps) == pytest.approx(slope, rel=1e-4, abs=1e-7)


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
    empty = _batch()
    empty.mask[:] = False
    with pytest.raises(ValueError, match="`batch` must hold at least one target"):
        gradients.backward(_model(), next_symbol, empty)
