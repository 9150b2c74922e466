"""The mean loss over batches, by one process or shared by many."""

import itertools
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn

from minrnn.data.batch import Batch
from minrnn.ranks import Ranks


@torch.no_grad()
def evaluate(
    model: nn.Module,
    loss: Callable[[Tensor, Batch], Tensor],
    batches: Iterable[Batch],
    among: Ranks = Ranks(),
    streams: bool = False,
) -> float:
    """Measure the mean loss over all targets of `batches`, with dropout off.

    Args:
        model: left in the mode (training or not) that it was in.
        loss: (answers, batch) -> the mean over the targets of the batch that count.
        batches: brought to the device of the model.
        among: the processes that share the batches; all of them must call this.
        streams: each row goes on where that of the batch before ended, and so does its state; the
            processes then share the rows of each batch, in place of the batches.

    Returns:
        The mean over all targets, each counting once.

    Raises:
        ValueError: no target counts.
    """
    training = model.training
    model.eval()
    total, num_targets = 0.0, 0
    device = next(model.parameters()).device
    state = None
    for batch, counts in _rows(batches, among) if streams else _shares(batches, among):
        batch = among.part(batch).to(device)
        answers, behind = model(batch.inputs, state)
        state = behind if streams else None
        if counts and (count := batch.num_targets):
            total += loss(answers, batch).item() * count
            num_targets += count
    model.train(training)
    total, num_targets = among.sums(total, num_targets)
    if num_targets == 0:
        raise ValueError("`batches` must hold at least one target, got none")
    return total / num_targets


def _shares(batches: Iterable[Batch], among: Ranks) -> Iterator[tuple[Batch, bool]]:
    """The batches of this process, and whether they count: all must run the model equally often."""
    remaining = iter(batches)
    while group := list(itertools.islice(remaining, among.num_data)):
        counts = among.data < len(group)
        yield group[among.data if counts else 0], counts


def _rows(batches: Iterable[Batch], among: Ranks) -> Iterator[tuple[Batch, bool]]:
    """The rows of each batch that are this process's."""
    for batch in batches:
        yield batch.rows(among.rows(len(batch.inputs))), True
