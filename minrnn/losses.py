"""Losses of a model's outputs, over the targets of a Batch that count."""

from torch import Tensor
from torch.nn import functional as F

from minrnn.data.batch import Batch
from minrnn.ops.torch_kernels import widen

# below every id
_NO_TARGET = -(1 << 62)


def next_symbol(logits: Tensor, batch: Batch) -> Tensor:
    """The mean cross-entropy of the next symbol, in nats.

        loss = mean over the mask of -log softmax(logits)[target]

    Args:
        logits: (B, T, V), e.g. of a `LanguageModel`.
        batch: at least one target counts.

    Returns:
        A scalar, float32 (float64 for float64).

    Raises:
        ValueError: no target counts, `logits` does not begin with (B, T), or a target that counts
            is not in [0, V); for the latter torch itself ends the process on a GPU. The mask alone
            says what does not count: no target, such as -100, is ignored.
    """
    logits, targets = _counted("logits", logits, batch)
    _check_targets(targets, logits.shape[-1])
    # the default of torch ignores -100, which `Batch.num_targets` would count
    return F.cross_entropy(widen(logits), targets, ignore_index=_NO_TARGET)


def action_error(actions: Tensor, batch: Batch) -> Tensor:
    """The mean squared error of the actions that are told.

        loss = mean over the mask, and over the parts of an action, of (action - target)^2

    Args:
        actions: (B, T, A), e.g. of a `DecisionModel`.
        batch: at least one target counts.

    Returns:
        A scalar, float32 (float64 for float64).

    Raises:
        ValueError: no target counts, or the actions and the targets of `batch` differ in shape.
    """
    if actions.shape != batch.targets.shape:
        raise ValueError(
            f"`actions` must have the shape of the targets, {tuple(batch.targets.shape)}, got "
            f"{tuple(actions.shape)}"
        )
    actions, targets = _counted("actions", actions, batch)
    return F.mse_loss(widen(actions), targets)


def _check_targets(targets: Tensor, size: int) -> None:
    # what is on a GPU would have to be waited for
    if targets.device.type == "cpu" and targets.numel():
        lowest, highest = (int(x) for x in targets.aminmax())
        if lowest < 0 or highest >= size:
            bad = lowest if lowest < 0 else highest
            raise ValueError(
                f"targets that count must be in [0, V) = [0, {size}), got {bad}; `mask` says which "
                "do not count"
            )


def _counted(name: str, outputs: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """Outputs (num_targets, ...) and targets that count, of (B, T, ...)."""
    if outputs.dim() != 3 or outputs.shape[:2] != batch.mask.shape:
        raise ValueError(
            f"`{name}` must begin with the shape (B, T) = {tuple(batch.mask.shape)} of the batch, "
            f"got {tuple(outputs.shape)}"
        )
    places = batch.places
    if places is not None and not len(places):
        raise ValueError("`batch` must hold at least one target, got none")
    outputs, targets = outputs.flatten(0, 1), batch.targets.flatten(0, 1)
    return (outputs, targets) if places is None else (outputs[places], targets[places])
