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
        model: it and each of its parts are left in the mode (training or not) that they were in.
        loss: (outputs, batch) -> the mean over the targets of the batch that count.
        batches: brought to the device of the model.
        among: the processes that share the batches; all of them must call this.
        streams: each row continues where that of the batch before ended, and so does its state; the
            processes then share the rows of each batch, in place of the batches.

    Returns:
        The mean over all targets, each counting once.

    Raises:
        ValueError: no target counts.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        losses, counts = _losses(model, loss, batches, among, streams)
    finally:
        for module, training in modes:
            module.training = training
    # the device is waited for once, here
    means = torch.stack(losses).tolist() if losses else []
    total = sum((mean * count for mean, count in zip(means, counts, strict=True)), 0.0)
    total, num_targets = among.sums(total, sum(counts))
    if num_targets == 0:
        raise ValueError("`batches` must hold at least one target, got none")
    return total / num_targets


def _losses(
    model: nn.Module,
    loss: Callable[[Tensor, Batch], Tensor],
    batches: Iterable[Batch],
    among: Ranks,
    streams: bool,
) -> tuple[list[Tensor], list[int]]:
    """The mean loss of each batch of this process that has targets, and how many it has."""
    losses: list[Tensor] = []
    counts: list[int] = []
    device = next(model.parameters()).device
    state = None
    for batch, is_own in _rows(batches, among) if streams else _shares(batches, among):
        batch = among.part(batch).to(device)
        outputs, last = model(batch.inputs, state)
        state = last if streams else None
        if is_own and (count := batch.num_targets):
            losses.append(loss(outputs, batch))
            counts.append(count)
    return losses, counts


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
