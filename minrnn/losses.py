"""Losses of what a model answered, over the targets of a Batch that count."""

from torch import Tensor
from torch.nn import functional as F

from minrnn.data.batch import Batch
from minrnn.ops.torch_kernels import widen


def next_symbol(logits: Tensor, batch: Batch) -> Tensor:
    """The mean cross-entropy of the next symbol, in nats.

        loss = mean over the mask of -log softmax(logits)[target]

    Args:
        logits: (B, T, V), e.g. of a `LanguageModel`.
        batch: at least one target counts.

    Returns:
        A scalar, float32 (float64 for float64).
    """
    # (B, T, V) to (num_targets, V)
    chosen = logits.flatten(0, 1) if batch.mask.all() else logits[batch.mask]
    targets = batch.targets.flatten() if batch.mask.all() else batch.targets[batch.mask]
    return F.cross_entropy(widen(chosen), targets)


def action_error(actions: Tensor, batch: Batch) -> Tensor:
    """The mean squared error of the actions that are told.

        loss = mean over the mask, and over the parts of an action, of (action - target)^2

    Args:
        actions: (B, T, A), e.g. of a `DecisionModel`.
        batch: at least one target counts.

    Returns:
        A scalar, float32 (float64 for float64).
    """
    # (B, T, A) to (num_targets, A)
    return F.mse_loss(widen(actions[batch.mask]), batch.targets[batch.mask])
