"""Ctrl-C and SIGTERM as a request to stop after the current step, or at once."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from types import FrameType, TracebackType
from typing import Any

from minrnn.data.batch import Batch


class Interrupts:
    """While open, the first SIGINT or SIGTERM only sets `requested`; the second one acts at once.

    Outside the main thread, where Python handles no signals, nothing is changed.
    """

    def __init__(self) -> None:
        self.requested = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Interrupts":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._request)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._give_back()

    def _request(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        self._give_back()

    def _give_back(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}


class StopRequested(Exception):
    """A stop was requested in the middle of an evaluation."""


def polled(
    batches: Iterable[Batch], stop: Callable[[], bool], seen: Callable[[int], None]
) -> Iterator[Batch]:
    """`batches`, until a stop is requested.

    Args:
        batches: the same on every process of a training.
        stop: whether to stop, the same on every process; called before each batch.
        seen: called before each batch but the first with the number of targets before it.

    Raises:
        StopRequested: `stop` returned True.
    """
    count = 0
    for batch in batches:
        if stop():
            raise StopRequested
        if count:
            seen(count)
        yield batch
        count += batch.num_targets


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """Raise KeyboardInterrupt on SIGTERM too, so that what is half written is removed.

    Outside the main thread, where Python handles no signals, nothing is changed.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
