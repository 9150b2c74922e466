"""What a person sees while a run goes: a live bar on a terminal, plain lines elsewhere."""

import contextlib
import math
import sys
import time
from collections.abc import Callable, Iterator
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bar

from minrnn.events import Event

# seconds between two plain lines
_LINE_EVERY = 10.0


@contextlib.contextmanager
def reading(what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on a terminal over how much was read, told (done, total); nothing elsewhere."""
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn(what), TimeRemainingColumn())
    with Bar(*columns, console=Console(), disable=not sys.stdout.isatty()) as bar:
        task = bar.add_task("")
        yield lambda done, total: bar.update(task, completed=done, total=total)


class Progress:
    """Shows the loss, the validation loss, tokens/s and the time left.

    Args:
        steps: of the whole training.
        tokens_per_step: symbols in one batch.
        shown: False says nothing, e.g. in all processes but one.
    """

    def __init__(self, steps: int, tokens_per_step: int, shown: bool = True) -> None:
        self.steps, self.tokens_per_step, self.shown = steps, tokens_per_step, shown
        self.live = shown and sys.stdout.isatty()
        columns = (
            BarColumn(bar_width=12),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(compact=True),
            TextColumn("left"),
        )
        self._bar = Bar(*columns, console=Console(), disable=not self.live)
        self._reading: TaskID | None = None
        self._training: TaskID | None = None
        self._started = self._last_line = time.monotonic()
        self._first_step: int | None = None
        self._loss, self._valid_loss = 0.0, math.nan
        self.num_valid = 0
        """Targets of an evaluation; 0 if nobody knows."""

    def __enter__(self) -> "Progress":
        self._bar.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.__exit__(kind, error, trace)

    def reading(self, done: int, total: int) -> None:
        """Bytes of the text that have been turned into ids."""
        if self._reading is None:
            self._reading = self._bar.add_task("", figures="bytes of text")
        self._bar.update(self._reading, completed=done, total=total)

    def report(self, event: "Event") -> None:
        """One step or evaluation is done."""
        now = time.monotonic()
        if self._first_step is None:
            # the first step seen starts the clock: its own time is not known
            self._first_step, self._started = event.step, now
            self._loss = event.loss
            self._training = self._bar.add_task("", total=self.steps, figures="")
        # about the mean of the last 20 steps
        if event.valid_loss is None and event.num_validated is None:
            self._loss += 0.05 * (event.loss - self._loss)
        if event.valid_loss is not None:
            self._valid_loss = event.valid_loss
        rate = (event.step - self._first_step) / max(now - self._started, 1e-9)
        speed = rate * self.tokens_per_step
        if self._training is not None:
            figures = f"loss {self._loss:.3f}"
            if event.num_validated is not None:
                figures += f" validating {self._validated(event.num_validated)}"
            elif not math.isnan(self._valid_loss):
                figures += f" valid {self._valid_loss:.3f}"
            figures += f" {speed:,.0f} tokens/s"
            self._bar.update(self._training, completed=event.step, figures=figures)
        due = now - self._last_line >= _LINE_EVERY
        if self.shown and not self.live and (due or event.valid_loss is not None):
            self._last_line = now
            left = (self.steps - event.step) / rate if rate else math.nan
            line = f"step={event.step}/{self.steps} loss={self._loss:.4f}"
            if event.valid_loss is not None:
                line += f" valid_loss={event.valid_loss:.4f}"
            if event.num_validated is not None:
                line += f" validated={self._validated(event.num_validated)}"
            print(f"{line} tokens_per_s={speed:.0f} seconds_left={left:.0f}", flush=True)

    def _validated(self, count: int) -> str:
        return f"{count}/{self.num_valid}" if self.num_valid else f"{count}"
