"""train(): one loop for every task, on Accelerate, whose runs can be killed at any moment.

All random numbers of an update (its windows, its dropout) are a function of (seed, step) alone, and
a save takes effect when one file is renamed. A run that was killed therefore continues from its
last save to the same weights and metrics, bit for bit on the CPU with the same number of threads.
Batch, schedule and metrics are those of one process, however many train, and those of one pass,
however many micro-batches an update accumulates.
"""

import contextlib
import json
import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import torch
from torch import Tensor, nn

from minrnn import checkpoint, generators, gradients, launching, ranks, training_state
from minrnn.data.batch import Batch
from minrnn.data.prefetch import Prefetched
from minrnn.errors import NonFiniteLossError, ProcessLostError
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
        """The `rows` of the training batch of an update: of `batch_size` rows in all.

        It is a function of `seed` = (seed, step, 0) alone: the same row is the same whichever
        others are asked for. It is called on another thread, an update ahead, so it must not draw
        from the global generators of torch or numpy, nor seed them.
        """
        ...

    def goes_on(self, step: int) -> bool:
        """Whether each row of the batch of `step` begins where that of the step before ended."""
        ...

    @property
    def validates_streams(self) -> bool:
        """Whether each row of a validation batch begins where that of the batch before ended."""
        ...

    def validation(self, batch_size: int) -> Iterable[Batch]:
        """The validation part, the same each time."""
        ...

    def loss(self, answers: Tensor, batch: Batch) -> Tensor:
        """The mean loss of a model's outputs, over the targets that count."""
        ...


def train(
    model: nn.Module,
    task: Task,
    config: TrainConfig,
    folder: Path,
    report: Callable[[Event], None] = lambda event: None,
) -> Result:
    """Train `model` in the run `folder`, or continue from what was saved there.

    The loss of an update is the mean over all its targets that count, in all micro-batches and
    processes, each counting once; an update without any has loss 0 and gradient 0. Accelerate's
    state, torch's random numbers, warnings and signal handlers are afterwards those of before.

    Args:
        model: initialised; replaced by the saved weights if there are any. In evaluation mode it is
            put into training mode; in training mode, parts that are in evaluation mode stay so.
            Parameters that are exempt from weight decay: see `minrnn.launching.exempt`.
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
        launching.own_accelerator(),
        Interrupts() as interrupts,
        contextlib.ExitStack() as stack,
    ):
        ranks.on_first(lambda: stack.enter_context(locked(folder / ".lock")) is None)
        stack.enter_context(launching.unprepared(model))
        loop = stack.enter_context(contextlib.closing(_Loop(model, task, config, folder)))
        # by now the device is in use, so that its generator is among them
        stack.enter_context(generators.kept())
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
        # names of weights are those of the model inside
        self.raw_model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        self.saved = training_state.Training(self.raw_model, self.optimizer, self.ranks)
        if not self.raw_model.training:
            self.raw_model.train()
        # after the batch before, if the next one continues it; one for each micro-batch
        self.carried: list[State | None] = [None] * config.accumulation
        self.batches = Prefetched(self._micro_batches, config.steps)
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
            raise ProcessLostError(lost) from error

    @property
    def _last(self) -> Path:
        return self.folder / "training_state" / training_state.FILE

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
        notes = checkpoint.read_notes(self._last)
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
        carried = training_state.restore(self._last.parent, self.saved)
        self.carried = [carried.get(number) for number in range(self.config.accumulation)]
        weights = self.folder / checkpoint.WEIGHTS
        if self.best_step and not weights.is_file() and self.step != self.best_step:
            raise ValueError(f"{weights} is missing: the best weights, of step {self.best_step}")
        # the process was killed before it wrote them; seen by one, since they may appear meanwhile
        unwritten = self.step == self.best_step
        if ranks.on_first(lambda: unwritten and not self._has_weights_of(self.step)):
            training_state.save_weights(self.folder, self.raw_model, self.step)
        return metrics_size

    def _has_weights_of(self, step: int) -> bool:
        weights = self.folder / checkpoint.WEIGHTS
        return weights.is_file() and checkpoint.read_tensors(weights)[1].get("step") == step

    def update(self) -> Event:
        """One step: forward, backward, clip, AdamW."""
        config, step = self.config, self.step
        batches = self.batches.take(step)
        # all randomness of the step, dropout included
        torch.manual_seed(ranks.step_seed(config.seed, step, self.ranks.number))
        learning_rate = config.learning_rate_at(step)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        # the mean over all processes of their shares is the mean over the targets of all
        total = self.ranks.sum_on(
            self.accelerator.device, sum(batch.num_targets for batch in batches)
        )
        count = total.clamp(min=1) if isinstance(total, Tensor) else max(total, 1)
        losses = [
            self._add_gradient(number, batch, count / self.ranks.count)
            for number, batch in enumerate(batches)
        ]
        loss = self.ranks.sums(torch.stack(losses).sum().item())[0] / self.ranks.count
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

    def _micro_batches(self, step: int) -> list[Batch]:
        """This process's share of each micro-batch of a step: together the rows of one batch."""
        config, among = self.config, self.ranks
        size = config.batch_size // config.accumulation
        own = among.rows(size)
        found = []
        for first in range(0, config.batch_size, size):
            rows = slice(first + own.start, first + own.stop)
            batch = self.task.batch(config.batch_size, (config.seed, step, 0), rows)
            batch = among.part(batch, config.chunk)
            found.append(batch.pinned() if self.accelerator.device.type == "cuda" else batch)
        return found

    def _add_gradient(self, number: int, batch: Batch, count: float | Tensor) -> Tensor:
        """Run a micro-batch forward and backward; its share of a mean over `count` targets."""
        config, accelerator = self.config, self.accelerator
        state = self.carried[number] if self.task.goes_on(self.step) else None
        scaler = accelerator.scaler

        def unsynced() -> contextlib.AbstractContextManager[Any]:
            return accelerator.no_sync(self.model)

        last = number + 1 == config.accumulation
        with contextlib.nullcontext() if last else unsynced():
            loss, self.carried[number] = gradients.backward(
                self.model,
                self.task.loss,
                batch.to(accelerator.device),
                chunk=config.chunk,
                count=count,
                state=state,
                scale=(lambda loss: loss) if scaler is None else scaler.scale,
                unsynced=unsynced,
            )
        if not self.task.goes_on(self.step + 1):
            self.carried[number] = None
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
        """Everything that `restore` needs; then the weights, if they are the best."""
        folder = self._last.parent
        training_state.save(folder, self.saved, self.carried, self._notes, self.step)
        if self.step == self.best_step:
            training_state.save_weights(self.folder, self.raw_model, self.step)

    def _notes(self) -> dict[str, Any]:
        """What a save has beside tensors, once the metrics that belong to it are on the disk."""
        assert self.metrics is not None
        with self._writing_metrics():
            os.fsync(self.metrics.fileno())
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
        return notes

    def close(self) -> None:
        """End the thread that makes batches, close the logs."""
        self.batches.close()
        if self.metrics is not None:
            self.metrics.close()
        for tracker in self.accelerator.trackers:
            # `end_training` would also end the group of processes
            tracker.finish()

    def _clip(self) -> float:
        """Clip the gradient; the norm it had."""
        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), self.config.clip_norm)
        assert norm is not None
        return float(training_state.whole(norm) if isinstance(norm, Tensor) else norm)

    def _log(self, values: dict[str, Any]) -> None:
        line = json.dumps({"step": self.step} | values)
        if self.metrics is not None:
            with self._writing_metrics():
                self.metrics.write(line.encode() + b"\n")
                # for those who watch
                self.metrics.flush()
        self.accelerator.log(values, step=self.step)

    @contextlib.contextmanager
    def _writing_metrics(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise checkpoint.SaveError(f"cannot write {self.metrics_path}: {error}") from error

    def _require_finite(self, what: str, value: float) -> None:
        if not math.isfinite(value):
            raise self._not_finite(what, value, self.step + 1)

    def _not_finite(self, what: str, value: float, step: int) -> NonFiniteLossError:
        return NonFiniteLossError(f"{what} became {value} in step {step}; {self._kept()}")

    def _kept(self) -> str:
        if not self._last.is_file():
            return f"there was no save yet in {self.folder}"
        step = checkpoint.read_notes(self._last)["step"]
        return f"the save of step {step} is kept in {self.folder}"
