"""train(): one loop for every task, on Accelerate, whose runs can be killed at any moment.

Every step's randomness (its windows, its dropout) is a function of (seed, step) alone, and a save
is one file that is renamed into place. A run that was killed therefore goes on from its last save
to the same weights and metrics, bit for bit on the CPU with the same number of threads.
"""

import contextlib
import json
import math
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn

from minrnn import checkpoint
from minrnn.data.batch import Batch
from minrnn.files import locked, remove_leftovers
from minrnn.interrupts import Interrupts
from minrnn.train_config import TrainConfig


class Task(Protocol):
    """What is learnt: batches as a function of the seed, and a loss."""

    def batch(self, batch_size: int, seed: tuple[int, ...]) -> Batch:
        """A training batch that depends on `seed` alone."""
        ...

    def validation(self, batch_size: int) -> Iterable[Batch]:
        """The validation part, the same each time."""
        ...

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The mean loss over the targets that count."""
        ...


@dataclass(frozen=True)
class Event:
    """What is reported after each step (`valid_loss` None) and after each evaluation."""

    step: int
    loss: float
    learning_rate: float
    valid_loss: float | None = None


@dataclass(frozen=True)
class Result:
    """How a training ended."""

    step: int
    best_loss: float
    best_step: int
    interrupted: bool


class NonFiniteLossError(ArithmeticError):
    """The loss or the gradient became infinite or NaN; the last save is untouched."""


@torch.no_grad()
def evaluate(
    model: nn.Module, loss: Callable[[nn.Module, Batch], Tensor], batches: Iterable[Batch]
) -> float:
    """Measure the mean loss over all targets of `batches`, with dropout off.

    Args:
        model: left in the mode (training or not) that it was in.
        loss: (model, batch) -> the mean over the targets of the batch that count.
        batches: brought to the device of the model.

    Returns:
        The mean over all targets, each counting once.

    Raises:
        ValueError: no target counts.
    """
    training = model.training
    model.eval()
    total, num_targets = 0.0, 0
    device = next(model.parameters()).device
    for batch in batches:
        total += loss(model, _to(batch, device)).item() * batch.num_targets
        num_targets += batch.num_targets
    model.train(training)
    if num_targets == 0:
        raise ValueError("`batches` must hold at least one target, got none")
    return total / num_targets


def train(
    model: nn.Module,
    task: Task,
    config: TrainConfig,
    folder: Path,
    report: Callable[[Event], None] = lambda event: None,
) -> Result:
    """Train `model` in the run `folder`, or go on with what was saved there.

    Args:
        model: initialised; replaced by the saved weights if there are any.
        task: batches and loss.
        config: the same for every part of a run.
        folder: a run folder; see `minrnn.checkpoint` for what is written to it.
        report: called after each step and each evaluation.

    Returns:
        How it ended: at the last step, out of patience, or because SIGINT or SIGTERM asked for it.

    Raises:
        NonFiniteLossError: the loss or gradient is not finite.
        SaveError: a save failed; the one before is whole.
        ValueError: the saved state is damaged or not this model's, or another process trains in
            `folder`.
    """
    with (
        locked(folder / ".lock"),
        Interrupts() as interrupts,
        contextlib.closing(_Loop(model, task, config, folder)) as loop,
    ):
        loop.restore()
        while not loop.over:
            event = loop.update()
            report(event)
            if loop.step % config.eval_every == 0 or loop.step == config.steps:
                report(loop.validate(event))
                loop.save()
            elif interrupts.requested:
                loop.save()
            if interrupts.requested:
                break
    return Result(loop.step, loop.best_loss, loop.best_step, not loop.over)


class _Loop:
    """The state of a training and what can be done to it; `train` gives the order."""

    def __init__(self, model: nn.Module, task: Task, config: TrainConfig, folder: Path) -> None:
        self.task, self.config, self.folder = task, config, folder
        self.step, self.best_loss, self.best_step = 0, math.inf, 0
        self.accelerator = _accelerator(config, folder)
        self.raw_model = model
        self.optimizer = _optimizer(model, config)
        self.model, self.prepared = self.accelerator.prepare(model, self.optimizer)
        self.model.train()
        self.metrics_path = folder / "metrics.jsonl"
        self.metrics: BinaryIO | None = None
        self.tracking = False

    @property
    def _last(self) -> Path:
        return self.folder / "training_state" / "last.safetensors"

    @property
    def over(self) -> bool:
        """The last step is done, or too many evaluations brought nothing better."""
        config = self.config
        waited = self.step - self.best_step
        out = config.patience and self.best_step and waited >= config.patience * config.eval_every
        return self.step >= config.steps or bool(out)

    def restore(self) -> None:
        """Take up the last save, drop what was written after it, open the logs."""
        self._last.parent.mkdir(exist_ok=True)
        for folder in (self.folder, self._last.parent):
            remove_leftovers(folder)
        metrics_size = 0
        if self._last.is_file():
            metrics_size = self._restore_last()
        elif (self.folder / checkpoint.WEIGHTS).exists():
            # weights are written after the state that they belong to
            raise ValueError(f"{self.folder} has weights, but {self._last} is missing")
        self.metrics = self.metrics_path.open("ab")
        found = self.metrics_path.stat().st_size
        if found < metrics_size:
            raise ValueError(
                f"{self.metrics_path} is damaged: it must have at least {metrics_size} bytes, "
                f"got {found}"
            )
        self.metrics.truncate(metrics_size)
        self.accelerator.init_trackers(
            "tensorboard", init_kwargs={"tensorboard": {"purge_step": self.step + 1}}
        )
        self.tracking = True

    def _restore_last(self) -> int:
        """Take up the last save; how long the metrics were then."""
        tensors, notes = checkpoint.read_tensors(self._last)
        try:
            self.step, self.best_step = notes["step"], notes["best_step"]
            best_loss, metrics_size = notes["best_loss"], notes["metrics_size"]
            if self.accelerator.scaler is not None:
                self.accelerator.scaler.load_state_dict(notes["scaler"])
        except KeyError as error:
            raise ValueError(f"{self._last} is no training state: it has no {error}") from error
        self.best_loss = math.inf if best_loss is None else best_loss
        self._put(tensors)
        weights = self.folder / checkpoint.WEIGHTS
        if self.best_step and not weights.is_file() and self.step != self.best_step:
            raise ValueError(f"{weights} is missing: the best weights, of step {self.best_step}")
        if self.step == self.best_step and not self._has_weights_of(self.step):
            # the process was killed before it wrote them
            checkpoint.save_weights(self.folder, self.raw_model, self.step)
        return metrics_size

    def _has_weights_of(self, step: int) -> bool:
        weights = self.folder / checkpoint.WEIGHTS
        return weights.is_file() and checkpoint.read_tensors(weights)[1].get("step") == step

    def update(self) -> Event:
        """One step: forward, backward, clip, AdamW."""
        config, step = self.config, self.step
        # all randomness of the step, dropout included
        torch.manual_seed(_step_seed(config.seed, step))
        learning_rate = config.learning_rate_at(step)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        losses, norm = [], torch.zeros(())
        for part in range(config.accumulation):
            seed = (config.seed, step, part)
            batch = self.task.batch(config.batch_size // config.accumulation, seed)
            with self.accelerator.accumulate(self.model):
                loss = self.task.loss(self.model, _to(batch, self.accelerator.device))
                self.accelerator.backward(loss)
                if self.accelerator.sync_gradients:
                    norm = self._clip()
                losses.append(loss.detach())
                self._require_finite(losses[-1], norm)
                self.prepared.step()
                self.prepared.zero_grad()
        self.step += 1
        event = Event(self.step, torch.stack(losses).mean().item(), learning_rate)
        if self.step % config.log_every == 0:
            values = {"loss": event.loss, "learning_rate": learning_rate}
            if math.isfinite(norm):
                values["grad_norm"] = float(norm)
            if self.accelerator.scaler is not None:
                values["loss_scale"] = self.accelerator.scaler.get_scale()
            self._log(values)
        return event

    def validate(self, event: Event) -> Event:
        """Measure the validation loss."""
        valid_loss = evaluate(
            self.model, self.task.loss, self.task.validation(self.config.batch_size)
        )
        if not math.isfinite(valid_loss):
            raise self._not_finite("the validation loss", valid_loss, self.step)
        self._log({"valid_loss": valid_loss})
        if valid_loss < self.best_loss or self.config.keep == "last":
            self.best_loss, self.best_step = valid_loss, self.step
        return Event(event.step, event.loss, event.learning_rate, valid_loss)

    def save(self) -> None:
        """Everything that `restore` needs, in one file; then the weights, if they are the best."""
        assert self.metrics is not None
        try:
            self.metrics.flush()
            os.fsync(self.metrics.fileno())
        except OSError as error:
            raise checkpoint.SaveError(f"cannot write {self.metrics_path}: {error}") from error
        notes = {
            "step": self.step,
            "best_loss": self.best_loss if math.isfinite(self.best_loss) else None,
            "best_step": self.best_step,
            "metrics_size": self.metrics_path.stat().st_size,
        }
        if self.accelerator.scaler is not None:
            notes["scaler"] = self.accelerator.scaler.state_dict()
        checkpoint.write_tensors(self._last, self._take(), notes)
        if self.step == self.best_step:
            checkpoint.save_weights(self.folder, self.raw_model, self.step)

    def close(self) -> None:
        """Close the logs."""
        if self.metrics is not None:
            self.metrics.close()
        if self.tracking:
            self.accelerator.end_training()
        # Accelerate keeps its settings for the process; the next training may want others
        AcceleratorState._reset_state(reset_partial_state=True)

    def _clip(self) -> Tensor:
        """Clip the gradient; the norm it had."""
        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), self.config.clip_norm)
        assert norm is not None
        return torch.as_tensor(norm)

    def _take(self) -> dict[str, Tensor]:
        tensors = {f"model.{name}": x for name, x in self.raw_model.state_dict().items()}
        for name, parameter in self.raw_model.named_parameters():
            for moment, x in self.optimizer.state[parameter].items():
                tensors[f"optimizer.{name}.{moment}"] = x
        return tensors

    def _put(self, tensors: dict[str, Tensor]) -> None:
        model = ((n, x) for n, x in tensors.items() if n.startswith("model."))
        weights = {n.removeprefix("model."): x for n, x in model}
        checkpoint.load_weights(self.raw_model, weights, self._last)
        for name, parameter in self.raw_model.named_parameters():
            prefix = f"optimizer.{name}."
            found = ((n, x) for n, x in tensors.items() if n.startswith(prefix))
            moments = {n.removeprefix(prefix): x for n, x in found}
            device = parameter.device
            self.optimizer.state[parameter] = {
                moment: x if moment == "step" else x.to(device) for moment, x in moments.items()
            }

    def _log(self, values: dict[str, Any]) -> None:
        line = json.dumps({"step": self.step} | values)
        assert self.metrics is not None
        self.metrics.write(line.encode() + b"\n")
        self.accelerator.log(values, step=self.step)

    def _require_finite(self, loss: Tensor, norm: Tensor) -> None:
        if not torch.isfinite(loss):
            raise self._not_finite("the loss", loss.item(), self.step + 1)
        # in fp16 the scaler skips steps whose gradient overflowed, and halves its scale; a gradient
        # that is too large without it will stay so
        scaler = self.accelerator.scaler
        if not torch.isfinite(norm) and (scaler is None or scaler.get_scale() <= 1):
            raise self._not_finite("the gradient's norm", float(norm), self.step + 1)

    def _not_finite(self, what: str, value: float, step: int) -> NonFiniteLossError:
        kept = "there was no save yet"
        if self._last.is_file():
            kept = f"the save of step {checkpoint.read_tensors(self._last)[1]['step']} is kept"
        return NonFiniteLossError(f"{what} became {value} in step {step}; {kept} in {self.folder}")


def _accelerator(config: TrainConfig, folder: Path) -> Accelerator:
    accelerator = Accelerator(
        mixed_precision=config.precision,
        gradient_accumulation_steps=config.accumulation,
        log_with="tensorboard",
        project_dir=folder,
    )
    if accelerator.num_processes > 1:
        raise ValueError(f"one process trains a run for now, got {accelerator.num_processes}")
    if config.precision == "fp16" and accelerator.device.type == "cpu":
        # Accelerate (1.15) trains in float32 then, without a word; torch has what it takes
        accelerator.native_amp = True
        accelerator.scaler = torch.amp.GradScaler("cpu")
    return accelerator


def _optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    betas = (config.beta1, config.beta2)
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=betas, fused=True)


def _step_seed(seed: int, step: int) -> int:
    # spread over 63 bits, so that neighbouring seeds share no steps
    return (seed * 0x9E3779B97F4A7C15 + step + 1) % (1 << 63)


def _to(batch: Batch, device: torch.device) -> Batch:
    return Batch(batch.inputs.to(device), batch.targets.to(device), batch.mask.to(device))
