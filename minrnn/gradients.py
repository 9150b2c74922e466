"""Gradients of a loss over a sequence: of all of it at once, or the same chunk by chunk."""

import contextlib
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from minrnn import generators
from minrnn.data.batch import Batch
from minrnn.ops.torch_kernels import widen
from minrnn.state import State

Loss = Callable[[Tensor, Batch], Tensor]


def backward(
    model: Callable[..., tuple[Tensor, State]],
    loss: Loss,
    batch: Batch,
    *,
    chunk: int = 0,
    count: float | Tensor | None = None,
    state: State | None = None,
    scale: Callable[[Tensor], Tensor] = lambda loss: loss,
    unsynced: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
) -> tuple[Tensor, State]:
    """Add the gradient of the mean loss of a batch to that of the parameters.

    With `chunk` the sequence is run twice, and activations are kept for `chunk` steps only: first
    forward, keeping the states between the chunks; then from the last chunk to the first, each is
    run again from the state before it, and differentiated with the gradient dL/dh of the state
    after it. That is the gradient of the whole sequence, not a truncated one, in O(chunk)
    activations and T / chunk states.

    A chunk draws the same random numbers (dropout) both times, on every device, and torch's
    generators continue as if it had been run once. As in `torch.utils.checkpoint`, layers that draw
    from the generators of numpy or Python, or that count their calls, are run twice.

    Args:
        model: maps (B, T) or (B, T, features) and a state to outputs and the next state.
        loss: (outputs, batch) -> the mean over the targets that count.
        batch: T steps.
        chunk: steps of a chunk, at most; 0 for all T at once.
        count: number of targets that the mean is over, > 0; None for those of `batch`, of which
            there must then be one. Another number is for a batch that is a part of a larger one;
            a part without targets then has loss 0 and gradient 0.
        state: before the first step; no gradient is taken of it.
        scale: what the gradient is taken of, made from the loss.
        unsynced: around every chunk but the last one run, e.g. for DistributedDataParallel.

    Returns:
        loss: the mean loss, a scalar, without a graph.
        state: the state after the last step, without a graph.

    Raises:
        ValueError: `chunk` < 0, `count` is a number that is not > 0, or no target counts.

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
    if count is None:
        count = batch.num_targets
        if not count:
            raise ValueError("`batch` must hold at least one target, got none")
    elif not isinstance(count, Tensor) and not 0 < count < math.inf:
        raise ValueError(f"`count` must be a finite number > 0, got {count}")
    # what it was computed from is no part of the loss, in chunks or in one
    state = None if state is None else state.map(Tensor.detach)
    if not 0 < chunk < T:
        outputs, last = model(batch.inputs, state)
        value = _share(loss, outputs, batch, count)
        scale(value).backward()
        return value.detach(), last.map(Tensor.detach)
    chunks = [_cut(batch, first, first + chunk) for first in range(0, T, chunk)]
    return _chunk_by_chunk(model, loss, chunks, count, state, scale, unsynced)


def _chunk_by_chunk(
    model: Callable[..., tuple[Tensor, State]],
    loss: Loss,
    chunks: list[Batch],
    count: float | Tensor,
    state: State | None,
    scale: Callable[[Tensor], Tensor],
    unsynced: Callable[[], contextlib.AbstractContextManager[Any]],
) -> tuple[Tensor, State]:
    """`backward` over the chunks of a sequence, from the last to the first."""
    before = _run_forward(model, chunks, state)
    losses: list[Tensor] = []
    gradient, last = None, None
    for number in reversed(range(len(chunks))):
        chunk, (start, drawn) = chunks[number], before.pop()
        start = _leaf(start)
        with unsynced() if number else contextlib.nullcontext():
            # the last chunk is run once only, and the generators continue from there
            with contextlib.nullcontext() if drawn is None else generators.kept():
                if drawn is not None:
                    generators.set_states(drawn)
                outputs, after = model(chunk.inputs, start)
                value = _share(loss, outputs, chunk, count)
            _backward(scale(value), after, gradient)
        losses.append(value.detach())
        gradient = None if start is None else start.map(_gradient)
        last = after.map(Tensor.detach) if last is None else last
        del outputs, after, value
    assert last is not None
    return torch.stack(losses).sum(), last


def _cut(batch: Batch, first: int, stop: int) -> Batch:
    return batch.map(lambda x: x[:, first:stop])


def _share(loss: Loss, outputs: Tensor, batch: Batch, count: float | Tensor) -> Tensor:
    """What `batch` adds to a mean over `count` targets."""
    own = batch.num_targets
    if not own:
        # the sum of no numbers: a loss that still takes part in what processes exchange
        return widen(outputs[..., :0]).sum()
    value = loss(outputs, batch)
    if isinstance(count, Tensor):
        # of processes: no one waits for the device to learn the number
        return value * (own / count).to(value.dtype)
    return value if own == count else value * (own / count)


@torch.no_grad()
def _run_forward(
    model: Callable[..., tuple[Tensor, State]], chunks: list[Batch], state: State | None
) -> list[tuple[State | None, list[Tensor] | None]]:
    """Before each chunk: the state, and those of the generators (None: it has not drawn yet)."""
    before: list[tuple[State | None, list[Tensor] | None]] = []
    for chunk in chunks[:-1]:
        before.append((state, generators.states()))
        state = model(chunk.inputs, state)[1]
    return [*before, (state, None)]


def _leaf(state: State | None) -> State | None:
    """A state that gradients are taken of."""
    if state is None:
        return None
    return state.map(lambda x: x.detach().requires_grad_(x.is_floating_point()))


def _backward(value: Tensor, after: State, gradient: State | None) -> None:
    """Differentiate `value`, and the state `after` by its `gradient`."""
    roots: list[Tensor] = [value]
    grads: list[Tensor | None] = [None]
    if gradient is not None:
        gradients = gradient.flatten()
        for name, x in after.flatten().items():
            if x.requires_grad:
                roots.append(x)
                grads.append(gradients[name])
    torch.autograd.backward(roots, grads)


def _gradient(x: Tensor) -> Tensor:
    return torch.zeros_like(x) if x.grad is None else x.grad
