"""Losses of a model's outputs, over the targets of a Batch that count."""

from torch import Tensor
from torch.nn import functional as F

from minrnn.data.batch import Batch
from minrnn.ops.torch_kernels import widen

# the mask alone says what counts: torch's -100 would leave out more than the mask does
_NO_TOKEN = -(1 << 62)


def next_symbol(logits: Tensor, batch: Batch) -> Tensor:
    """The mean cross-entropy of the next symbol, in nats.

        loss = mean over the mask of -log softmax(logits)[target]

    Args:
        logits: (B, T, V), e.g. of a `LanguageModel`.
        batch: at least one target counts.

    Returns:
        A scalar, float32 (float64 for float64).

    Raises:
        ValueError: no target counts, or the shapes do not fit.
        IndexError: on the CPU, a target that counts is not in [0, V), torch's -100 included.
    """
    logits, targets = _counted(logits, batch)
    return F.cross_entropy(widen(logits), targets, ignore_index=_NO_TOKEN)


def action_error(actions: Tensor, batch: Batch) -> Tensor:
    """The mean squared error of the actions that are told.

        loss = mean over the mask, and over the parts of an action, of (action - target)^2

    Args:
        actions: (B, T, A), e.g. of a `DecisionModel`.
        batch: at least one target counts.

    Returns:
        A scalar, float32 (float64 for float64).

    Raises:
        ValueError: no target counts, or the shapes do not fit.
    """
    if actions.shape != batch.targets.shape:
        raise ValueError(
            f"`actions` must have the shape (B, T, A) = {tuple(batch.targets.shape)} of the "
            f"targets, got {tuple(actions.shape)}"
        )
    actions, targets = _counted(actions, batch)
    return F.mse_loss(widen(actions), targets)


def _counted(outputs: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """Outputs (num_targets, ...) and targets that count, of (B, T, ...)."""
    if outputs.dim() != 3 or outputs.shape[:2] != batch.mask.shape:
        raise ValueError(
            f"outputs must have the shape (B, T, ...), (B, T) = {tuple(batch.mask.shape)}, "
            f"got {tuple(outputs.shape)}"
        )
    places = batch.places
    if places is not None and not len(places):
        raise ValueError("`batch` must hold at least one target, got none")
    outputs, targets = outputs.flatten(0, 1), batch.targets.flatten(0, 1)
    return (outputs, targets) if places is None else (outputs[places], targets[places])
