"""Batches that are made on a thread of their own, while the one before is trained on."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

_T = TypeVar("_T")


class Prefetched(Generic[_T]):
    """`make(step)` for steps that are asked for in their order, each made one step ahead.

    Args:
        make: called on one other thread, for one step at a time.
        stop: the first step that is not made.

    Example:
        >>> squares = Prefetched(lambda step: step**2, stop=3)
        >>> [squares.take(step) for step in range(3)]
        [0, 1, 4]
        >>> squares.close()
    """

    def __init__(self, make: Callable[[int], _T], stop: int) -> None:
        self._make, self._stop = make, stop
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self._ahead: tuple[int, Future[_T]] | None = None

    def take(self, step: int) -> _T:
        """What is made for `step`, or the error that it ended in."""
        if self._ahead is None or self._ahead[0] != step:
            self._ahead = step, self._pool.submit(self._make, step)
        made = self._ahead[1].result()
        self._ahead = None
        if step + 1 < self._stop:
            self._ahead = step + 1, self._pool.submit(self._make, step + 1)
        return made

    def close(self) -> None:
        """End the thread, after the batch that it is making."""
        self._pool.shutdown(cancel_futures=True)
