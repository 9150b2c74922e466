"""Losses over the targets of a Batch that count."""

from torch import Tensor, nn
from torch.nn import functional as F

from minrnn.data.batch import Batch


def next_symbol(model: nn.Module, batch: Batch) -> Tensor:
    """The mean cross-entropy of the next symbol, in nats.

        loss = mean over the mask of -log softmax(logits)[target]

    Args:
        model: (B, T) symbols -> ((B, T, V) logits, state), e.g. a `LanguageModel`.
        batch: at least one target counts.

    Returns:
        A scalar, float32.
    """
    logits, _ = model(batch.inputs)
    # (B, T, V) to (num_targets, V)
    chosen = logits.flatten(0, 1) if batch.mask.all() else logits[batch.mask]
    targets = batch.targets.flatten() if batch.mask.all() else batch.targets[batch.mask]
    return F.cross_entropy(chosen.float(), targets)


def action_error(model: nn.Module, batch: Batch) -> Tensor:
    """The mean squared error of the actions that are told.

        loss = mean over the mask, and over the parts of an action, of (told - target)^2

    Args:
        model: (B, T, features) -> ((B, T, A) actions, state), e.g. a `DecisionModel`.
        batch: at least one target counts.

    Returns:
        A scalar, float32.
    """
    told, _ = model(batch.inputs)
    # (B, T, A) to (num_targets, A)
    return F.mse_loss(told[batch.mask].float(), batch.targets[batch.mask])
