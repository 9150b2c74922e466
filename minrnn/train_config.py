"""How a model is trained: the settings, their ranges, and the schedule of the learning rate."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from minrnn.configs import check_fields


@dataclass(frozen=True)
class TrainConfig:
    """How a model is trained: AdamW, warm-up and cosine, clipped gradients.

    Raises:
        ValueError: a field is out of range.
        TypeError: a field has another type.
    """

    steps: int = 5000
    """Updates of the weights."""
    batch_size: int = 64
    """Sequences in one update."""
    accumulation: int = 1
    """Micro-batches of an update, to save memory: together they are the same batch."""
    chunk: int = 0
    """Steps of a sequence whose activations are kept at a time, for sequences that do not fit:
    gradients are those of the whole all the same. 0 keeps all."""
    time_ranks: int = 1
    """Processes that share the time of each sequence (torchrun, accelerate launch); the others
    share the batch."""
    learning_rate: float = 1e-3
    """After the warm-up."""
    min_learning_rate: float | None = None
    """At the end of the cosine, at most `learning_rate`; None for a tenth of it."""
    warmup_steps: int | None = None
    """Steps in which the learning rate rises from 0, at most `steps`; None for 100, or all of a
    shorter training."""
    weight_decay: float = 0.1
    """AdamW's, on matrices and kernels. Not decayed are vectors (biases, norms), and what the
    authors of a mixer exempt: decays and frequencies of state spaces, long filters, queries."""
    beta1: float = 0.9
    """AdamW's."""
    beta2: float = 0.99
    """AdamW's."""
    clip_norm: float = 1.0
    """Largest norm of the gradient."""
    precision: Literal["no", "bf16", "fp16"] = "no"
    """Mixed precision; "no" is float32. The recurrent state is float32 always, and so are weights
    and optimizer; "fp16" scales the loss and skips the steps whose gradient overflows."""
    eval_every: int = 250
    """Steps between evaluations on the validation part; each is followed by a save."""
    patience: int = 0
    """Evaluations in a row without a better one that end the training; 0 for no such end."""
    keep: Literal["best", "last"] = "best"
    """Which weights a run ends with: those of the lowest validation loss, or the last."""
    log_every: int = 10
    """Steps between lines in metrics.jsonl."""
    seed: int = 0
    """Of the weights, the batches and dropout."""

    def __post_init__(self) -> None:
        check_fields(self)
        inside: dict[str, Callable[[float], bool]] = {
            ">= 1": lambda x: x >= 1,
            "> 0": lambda x: x > 0,
            ">= 0": lambda x: x >= 0,
            "in [0, 1)": lambda x: 0 <= x < 1,
        }
        for names, range_ in (
            ("steps batch_size accumulation time_ranks eval_every log_every", ">= 1"),
            ("learning_rate clip_norm", "> 0"),
            ("chunk min_learning_rate warmup_steps weight_decay patience seed", ">= 0"),
            ("beta1 beta2", "in [0, 1)"),
        ):
            for name in names.split():
                value = getattr(self, name)
                if value is not None and not inside[range_](value):
                    raise ValueError(f"`{name}` must be {range_}, got {value}")
        for name, most in (("min_learning_rate", "learning_rate"), ("warmup_steps", "steps")):
            value, bound = getattr(self, name), getattr(self, most)
            if value is not None and value > bound:
                raise ValueError(f"`{name}` must be at most `{most}` = {bound}, got {value}")
        if self.patience and self.keep == "last":
            raise ValueError("`patience` waits for a best loss, and `keep` is 'last'")
        if self.seed >= 1 << 63:
            raise ValueError(f"`seed` must be below 2^63, got {self.seed}")
        if self.batch_size % self.accumulation:
            raise ValueError(
                f"`batch_size` = {self.batch_size} must be a multiple of "
                f"`accumulation` = {self.accumulation}"
            )

    @classmethod
    def saved(cls, fields: Mapping[str, Any]) -> "TrainConfig":
        """A configuration that was saved, by a version that took higher minima and warm-ups too."""
        fields = dict(fields)
        for name, most in (("min_learning_rate", "learning_rate"), ("warmup_steps", "steps")):
            if fields.get(name) is not None and most in fields:
                fields[name] = min(fields[name], fields[most])
        return cls(**fields)

    def learning_rate_at(self, step: int) -> float:
        """Of the update from `step` to `step` + 1: linear warm-up, then a cosine to the minimum."""
        warmup = min(100, self.steps) if self.warmup_steps is None else self.warmup_steps
        if step < warmup:
            return self.learning_rate * (step + 1) / warmup
        lowest = self.min_learning_rate
        lowest = self.learning_rate / 10 if lowest is None else lowest
        done = (step - warmup) / max(1, self.steps - warmup)
        return lowest + (self.learning_rate - lowest) * 0.5 * (1 + math.cos(math.pi * done))
