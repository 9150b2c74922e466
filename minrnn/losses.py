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
