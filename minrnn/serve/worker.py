"""An engine in a thread of its own, asked from other threads."""

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence

from minrnn.serve.engine import Engine
from minrnn.serve.requests import Listener, Request

_log = logging.getLogger(__name__)


class Worker:
    """Runs the steps of an engine as long as it has texts to draw.

    Args:
        engine: used by nobody else from now on.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.num_errors = 0
        self._calls: deque[Callable[[], None]] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether requests are being served."""
        return self._thread.is_alive() and not self._closed

    def submit(self, request: Request, listeners: Sequence[Listener]) -> None:
        """Have a request served; its listeners hear of it in the engine's thread.

        Raises:
            ValueError, TypeError: the request does not fit; see `Engine.check`.
        """
        # here: in the engine's thread its error would end all texts
        self.engine.check(request, listeners)
        self._call(lambda: self.engine.submit(request, listeners))

    def cancel(self, listener: Listener) -> None:
        """End the text of a listener, if it has not ended."""
        self._call(lambda: self.engine.cancel(listener))

    def close_texts(self) -> None:
        """End all texts where they stand."""
        self._call(self.engine.close)

    def close(self) -> None:
        """End all texts where they stand, and the thread behind them."""
        if self._closed:
            return
        self.close_texts()
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _call(self, call: Callable[[], None]) -> None:
        with self._changed:
            if self._closed:
                raise RuntimeError("the engine is closed")
            self._calls.append(call)
            self._changed.notify()

    def _run(self) -> None:
        while True:
            with self._changed:
                while not (self._calls or self._closed or self.engine.busy):
                    self._changed.wait()
                calls, self._calls = self._calls, deque()
                closed = self._closed
            for call in calls:
                self._try(call)
            if closed:
                return
            if self.engine.busy:
                self._try(self.engine.step)

    def _try(self, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception:
            # e.g. out of memory: these texts end, the server goes on
            _log.exception("the engine failed; the texts that were open are ended")
            self.num_errors += 1
            self.engine.close("error")
