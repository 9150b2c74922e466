"""What a training reports while it runs, and at its end."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Event:
    """What is reported after each update, in an evaluation, and after it."""

    step: int
    loss: float
    learning_rate: float
    valid_loss: float | None = None
    """Of the evaluation that has just ended."""
    num_validated: int | None = None
    """Targets that the evaluation that is running has read so far."""


@dataclass(frozen=True)
class Result:
    """How a training ended."""

    step: int
    best_loss: float
    best_step: int
    interrupted: bool
