"""Gradients of a loss over a sequence: of all of it at once, or exactly so piece by piece."""

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from minrnn.data.batch import Batch
from minrnn.state import State

Loss = Callable[[Tensor, Batch], Tensor]


def backward(
    model: Callable[..., tuple[Tensor, State]],
    loss: Loss,
    batch: Batch,
    *,
    chunk: int = 0,
    count: float | None = None,
    state: State | None = None,
    scale: Callable[[Tensor], Tensor] = lambda loss: loss,
    unsynced: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
) -> tuple[Tensor, State]:
    """Add the gradient of the mean loss of a batch to that of the parameters.

    With `chunk` the sequence is run twice, and its activations are kept for `chunk` steps only.
    First forward, keeping the states between the pieces; then from the last piece to the first,
    each run again from the state before it, and its gradient taken of its share of the loss and of
    the state behind it, for which the next piece has told the gradient dL/dh. That is the gradient
    of the whole sequence, not a truncated one, in O(chunk) activations and T / chunk states.

    Args:
        model: maps (B, T) or (B, T, features) and a state to answers and the next state.
        loss: (answers, batch) -> the mean over the targets that count.
        batch: T steps.
        chunk: steps of a piece, at most; 0 for all T at once.
        count: targets that the mean is over; None for those of `batch`, of which there must then
            be one. Another number is for a batch that is a share of a larger one.
        state: before the first step; no gradient is taken of it.
        scale: what the gradient is taken of, made from the loss.
        unsynced: around every piece but the last one run, e.g. for DistributedDataParallel.

    Returns:
        loss: the mean loss, a scalar, without a graph.
        state: the state behind the last step, without a graph.

    Raises:
        ValueError: `chunk` < 0, or no target counts.

    Example:
        >>> from minrnn.losses import next_symbol
        >>> from minrnn.models import LanguageModel, ModelConfig
        >>> model = LanguageModel(ModelConfig(vocab_size=5, width=8, num_layers=1, dropout=0.0))
        >>> ids = torch.randint(5, (1, 65))
        >>> batch = Batch(ids[:, :-1], ids[:, 1:], torch.ones(1, 64, dtype=torch.bool))
        >>> _ = backward(model, next_symbol, batch)
        >>> whole = model.embedding.weight.grad.clone()
        >>> model.zero_grad()
        >>> _ = backward(model, next_symbol, batch, chunk=16)
        >>> torch.allclose(model.embedding.weight.grad, whole, atol=1e-6)
        True
    """
    if chunk < 0:
        raise ValueError(f"`chunk` must be >= 0, got {chunk}")
    T = batch.inputs.shape[1]
    count = batch.num_targets if count is None else count
    if not count:
        raise ValueError("`batch` must hold at least one target, got none")
    if not 0 < chunk < T:
        answers, last = model(batch.inputs, state)
        value = _share(loss, answers, batch, count)
        scale(value).backward()
        return value.detach(), last.map(Tensor.detach)
    pieces = [_cut(batch, first, first + chunk) for first in range(0, T, chunk)]
    return _piece_by_piece(model, loss, pieces, count, state, scale, unsynced)


def _piece_by_piece(
    model: Callable[..., tuple[Tensor, State]],
    loss: Loss,
    pieces: list[Batch],
    count: float,
    state: State | None,
    scale: Callable[[Tensor], Tensor],
    unsynced: Callable[[], contextlib.AbstractContextManager[Any]],
) -> tuple[Tensor, State]:
    """`backward` over the pieces of a sequence, from the last to the first."""
    # every piece draws the same dropout both times
    seed = torch.initial_seed()
    states = _states_before(model, pieces, state, seed)
    total, behind, last = torch.zeros((), device="cpu"), None, None
    for number in reversed(range(len(pieces))):
        piece, before = pieces[number], _leaf(states.pop())
        _seed(seed, number)
        with unsynced() if number else contextlib.nullcontext():
            answers, after = model(piece.inputs, before)
            value = _share(loss, answers, piece, count)
            _backward(scale(value), after, behind)
        total = total.to(value) + value.detach()
        behind = None if before is None else before.map(_gradient)
        last = after.map(Tensor.detach) if last is None else last
        del answers, after, value
    assert last is not None
    return total, last


def _cut(batch: Batch, first: int, stop: int) -> Batch:
    return Batch(
        batch.inputs[:, first:stop], batch.targets[:, first:stop], batch.mask[:, first:stop]
    )


def _share(loss: Loss, answers: Tensor, batch: Batch, count: float) -> Tensor:
    """What `batch` adds to a mean over `count` targets."""
    own = batch.num_targets
    if not own:
        # the loss of nothing, which still takes part in what processes exchange
        return answers.sum() * 0
    value = loss(answers, batch)
    return value if own == count else value * (own / count)


@torch.no_grad()
def _states_before(
    model: Callable[..., tuple[Tensor, State]], pieces: list[Batch], state: State | None, seed: int
) -> list[State | None]:
    """The state before each piece."""
    states = [state]
    for number, piece in enumerate(pieces[:-1]):
        _seed(seed, number)
        states.append(model(piece.inputs, states[-1])[1])
    return states


def _seed(seed: int, number: int) -> None:
    torch.manual_seed((seed + 0x9E3779B97F4A7C15 * number) % (1 << 63))


def _leaf(state: State | None) -> State | None:
    """A state that gradients are taken of."""
    if state is None:
        return None
    return state.map(lambda x: x.detach().requires_grad_(x.is_floating_point()))


def _backward(value: Tensor, after: State, behind: State | None) -> None:
    """The gradient of `value`, and of the state `after`, whose own is `behind`."""
    roots: list[Tensor] = [value]
    grads: list[Tensor | None] = [None]
    if behind is not None:
        gradients = behind.flatten()
        for name, x in after.flatten().items():
            if x.requires_grad:
                roots.append(x)
                grads.append(gradients[name])
    torch.autograd.backward(roots, grads)


def _gradient(x: Tensor) -> Tensor:
    return torch.zeros_like(x) if x.grad is None else x.grad
