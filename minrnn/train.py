"""train(): one loop for every task, on Accelerate, whose runs can be killed at any moment.

Every step's randomness (its windows, its dropout) is a function of (seed, step) alone, and a save
is one file that is renamed into place. A run that was killed therefore goes on from its last save
to the same weights and metrics, bit for bit on the CPU with the same number of threads. Batch,
schedule and metrics are those of one process, however many train.
"""

import contextlib
import json
import math
import os
import warnings
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import torch
from accelerate.state import AcceleratorState
from torch import Tensor, nn

from minrnn import checkpoint, gradients, launching, ranks, training_state
from minrnn.data.batch import Batch
from minrnn.evaluation import evaluate
from minrnn.events import Event as Event
from minrnn.events import Result as Result
from minrnn.files import locked, remove_leftovers
from minrnn.interrupts import Interrupts, StopRequested, polled
from minrnn.state import State
from minrnn.train_config import TrainConfig


class Task(Protocol):
    """What is learnt: batches as a function of the seed, and a loss."""

    def batch(self, batch_size: int, seed: tuple[int, ...], rows: slice = slice(None)) -> Batch:
        """The `rows` of a training batch that depends on `seed` = (seed, step, part) alone."""
        ...

    def goes_on(self, step: int) -> bool:
        """Whether the batch of `step` begins where that of the step before ended."""
        ...

    @property
    def validates_streams(self) -> bool:
        """Whether each row of a validation batch goes on where that of the batch before ended."""
        ...

    def validation(self, batch_size: int) -> Iterable[Batch]:
        """The validation part, the same each time."""
        ...

    def loss(self, answers: Tensor, batch: Batch) -> Tensor:
        """The mean loss of what the model answers, over the targets that count."""
        ...


class NonFiniteLossError(ArithmeticError):
    """The loss or the gradient became infinite or NaN; the last save is untouched."""


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
        ProcessLostError: another process of the training ended.
        SaveError: a save failed; the one before is whole.
        ValueError: the saved state is damaged or not this model's, or another process trains in
            `folder`.
    """
    with (
        warnings.catch_warnings(),
        Interrupts() as interrupts,
        contextlib.ExitStack() as stack,
    ):
        ranks.on_first(lambda: stack.enter_context(locked(folder / ".lock")) is None)
        loop = stack.enter_context(contextlib.closing(_Loop(model, task, config, folder)))
        loop.run(report, interrupts)
        return Result(loop.step, loop.best_loss, loop.best_step, not loop.over)


class _Loop:
    """The state of a training and what can be done to it; `train` gives the order."""

    def __init__(self, model: nn.Module, task: Task, config: TrainConfig, folder: Path) -> None:
        self.task, self.config, self.folder = task, config, folder
        self.step, self.best_loss, self.best_step = 0, math.inf, 0
        self.ranks = ranks.of(config.time_ranks)
        launched = launching.launch(model, config, self.ranks, folder)
        self.accelerator, self.model, self.optimizer, self.prepared = launched
        self.raw_model = self.accelerator.unwrap_model(self.model)
        self.model.train()
        # behind the batch before, if the next goes on there; one for each part of a batch
        self.carried: list[State | None] = [None] * config.accumulation
        # of the last step, if a stop cut the evaluation after it
        self.unmeasured: Event | None = None
        self.metrics_path = folder / "metrics.jsonl"
        self.metrics: BinaryIO | None = None

    def run(self, report: Callable[[Event], None], interrupts: Interrupts) -> None:
        """To the end, or until a process is asked to stop."""
        self.restore()
        # kernels of a convolution: the stride of an axis of one entry, which means nothing
        warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
        try:
            stop = False
            while not (self.over or stop):
                event = self.unmeasured or self.update()
                report(event)
                # one that was asked stops all, after the same step
                stop = self.ranks.sums(interrupts.requested)[0] > 0
                if self.step % self.config.eval_every == 0 or self.step == self.config.steps:
                    self.unmeasured = event
                    stop = self.validate(event, report, interrupts)
                    self.save()
                elif stop:
                    self.save()
        except RuntimeError as error:
            if self.ranks.count == 1 or not ranks.is_lost(error):
                raise
            lost = f"another process ended after step {self.step}; {self._kept()}"
            raise ranks.ProcessLostError(lost) from error

    @property
    def _last(self) -> Path:
        return self.folder / "training_state" / "last.safetensors"

    @property
    def over(self) -> bool:
        """The last step is done, or too many evaluations brought nothing better."""
        config = self.config
        waited = self.step - self.best_step
        out = config.patience and self.best_step and waited >= config.patience * config.eval_every
        return self.unmeasured is None and (self.step >= config.steps or bool(out))

    def restore(self) -> None:
        """Take up the last save, drop what was written after it, open the logs."""
        ranks.on_first(self._tidy)
        metrics_size = 0
        if self._last.is_file():
            metrics_size = self._restore_last()
        elif (self.folder / checkpoint.WEIGHTS).exists():
            # weights are written after the state that they belong to
            raise ValueError(f"{self.folder} has weights, but {self._last} is missing")
        ranks.on_first(lambda: self._open_metrics(metrics_size))
        self.accelerator.init_trackers(
            "tensorboard", init_kwargs={"tensorboard": {"purge_step": self.step + 1}}
        )

    def _tidy(self) -> None:
        self._last.parent.mkdir(exist_ok=True)
        for folder in (self.folder, self._last.parent):
            remove_leftovers(folder)

    def _open_metrics(self, size: int) -> None:
        self.metrics = self.metrics_path.open("ab")
        found = self.metrics_path.stat().st_size
        if found < size:
            raise ValueError(
                f"{self.metrics_path} is damaged: it must have at least {size} bytes, got {found}"
            )
        self.metrics.truncate(size)

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
        if "unmeasured" in notes:
            self.unmeasured = Event(self.step, *notes["unmeasured"])
        carried = training_state.put(
            tensors, self.raw_model, self.optimizer, self.ranks, self._last
        )
        self.carried = [carried.get(number) for number in range(self.config.accumulation)]
        weights = self.folder / checkpoint.WEIGHTS
        if self.best_step and not weights.is_file() and self.step != self.best_step:
            raise ValueError(f"{weights} is missing: the best weights, of step {self.best_step}")
        # the process was killed before it wrote them; seen by one, since they may appear meanwhile
        unwritten = self.step == self.best_step
        if ranks.on_first(lambda: unwritten and not self._has_weights_of(self.step)):
            self._save_weights(training_state.weights(self.raw_model))
        return metrics_size

    def _has_weights_of(self, step: int) -> bool:
        weights = self.folder / checkpoint.WEIGHTS
        return weights.is_file() and checkpoint.read_tensors(weights)[1].get("step") == step

    def _save_weights(self, weights: dict[str, Tensor]) -> None:
        ranks.on_first(lambda: checkpoint.save_weights(self.folder, weights, self.step))

    def update(self) -> Event:
        """One step: forward, backward, clip, AdamW."""
        config, step = self.config, self.step
        # all randomness of the step, dropout included
        torch.manual_seed(ranks.step_seed(config.seed, step, self.ranks.number))
        learning_rate = config.learning_rate_at(step)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        losses = [self._add_gradient(part) for part in range(config.accumulation)]
        # each has its share of the mean
        loss = self.ranks.sums(torch.stack(losses).mean().item())[0] / self.ranks.count
        self._require_finite("the loss", loss)
        norm = self._clip()
        # in fp16 the scaler skips steps whose gradient overflowed, and halves its scale; a gradient
        # that is too large without it will stay so
        scaler = self.accelerator.scaler
        if scaler is None or scaler.get_scale() <= 1:
            self._require_finite("the gradient's norm", norm)
        self.prepared.step()
        self.prepared.zero_grad()
        self.step += 1
        if self.step % config.log_every == 0:
            values = {"loss": loss, "learning_rate": learning_rate}
            if math.isfinite(norm):
                values["grad_norm"] = norm
            if scaler is not None:
                values["loss_scale"] = scaler.get_scale()
            self._log(values)
        return Event(self.step, loss, learning_rate)

    def _add_gradient(self, part: int) -> Tensor:
        """Run one part of the batch forward and backward; its loss."""
        config, accelerator, among = self.config, self.accelerator, self.ranks
        size = config.batch_size // config.accumulation
        seed = (config.seed, self.step, part)
        batch = among.part(self.task.batch(size, seed, among.rows(size)), config.chunk)
        batch = batch.to(accelerator.device)
        # the mean over all processes of their shares is the mean over the targets of all
        count = among.sums(batch.num_targets)[0] / among.count
        state = self.carried[part] if self.task.goes_on(self.step) else None
        scaler = accelerator.scaler

        def scale(loss: Tensor) -> Tensor:
            loss = loss / config.accumulation
            return loss if scaler is None else scaler.scale(loss)

        def unsynced() -> contextlib.AbstractContextManager[Any]:
            return accelerator.no_sync(self.model)

        last = part + 1 == config.accumulation
        with contextlib.nullcontext() if last else unsynced():
            loss, self.carried[part] = gradients.backward(
                self.model,
                self.task.loss,
                batch,
                chunk=config.chunk,
                count=count,
                state=state,
                scale=scale,
                unsynced=unsynced,
            )
        if not self.task.goes_on(self.step + 1):
            self.carried[part] = None
        return loss

    def validate(
        self, event: Event, report: Callable[[Event], None], interrupts: Interrupts
    ) -> bool:
        """Measure the validation loss after the step of `event`; whether a stop cut it."""
        task = self.task
        batches = polled(
            task.validation(self.config.batch_size),
            lambda: self.ranks.sums(interrupts.requested)[0] > 0,
            lambda count: report(replace(event, num_validated=count)),
        )
        try:
            valid_loss = evaluate(
                self.model, task.loss, batches, self.ranks, task.validates_streams
            )
        except StopRequested:
            self.model.train()
            return True
        if not math.isfinite(valid_loss):
            raise self._not_finite("the validation loss", valid_loss, self.step)
        self._log({"valid_loss": valid_loss})
        if valid_loss < self.best_loss or self.config.keep == "last":
            self.best_loss, self.best_step = valid_loss, self.step
        self.unmeasured = None
        report(replace(event, valid_loss=valid_loss))
        return False

    def save(self) -> None:
        """Everything that `restore` needs, in one file; then the weights, if they are the best."""
        tensors = training_state.take(self.raw_model, self.optimizer, self.carried, self.ranks)
        ranks.on_first(lambda: self._write(tensors))
        if self.step == self.best_step:
            self._save_weights(training_state.under("model.", tensors))

    def _write(self, tensors: dict[str, Tensor]) -> None:
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
        if self.unmeasured is not None:
            notes["unmeasured"] = [self.unmeasured.loss, self.unmeasured.learning_rate]
        if self.accelerator.scaler is not None:
            notes["scaler"] = self.accelerator.scaler.state_dict()
        checkpoint.write_tensors(self._last, tensors, notes)

    def close(self) -> None:
        """Close the logs."""
        if self.metrics is not None:
            self.metrics.close()
        for tracker in self.accelerator.trackers:
            # `end_training` would also end the group of processes
            tracker.finish()
        # Accelerate keeps its settings for the process; the next training may want others
        AcceleratorState._reset_state(reset_partial_state=True)

    def _clip(self) -> float:
        """Clip the gradient; the norm it had."""
        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), self.config.clip_norm)
        assert norm is not None
        return float(training_state.whole(torch.as_tensor(norm)))

    def _log(self, values: dict[str, Any]) -> None:
        line = json.dumps({"step": self.step} | values)
        if self.metrics is not None:
            self.metrics.write(line.encode() + b"\n")
        self.accelerator.log(values, step=self.step)

    def _require_finite(self, what: str, value: float) -> None:
        if not math.isfinite(value):
            raise self._not_finite(what, value, self.step + 1)

    def _not_finite(self, what: str, value: float, step: int) -> NonFiniteLossError:
        return NonFiniteLossError(f"{what} became {value} in step {step}; {self._kept()}")

    def _kept(self) -> str:
        if not self._last.is_file():
            return f"there was no save yet in {self.folder}"
        step = checkpoint.read_tensors(self._last)[1]["step"]
        return f"the save of step {step} is kept in {self.folder}"
