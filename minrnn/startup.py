"""Ctrl-C while the command `minrnn` starts: `minrnn` imports this before torch takes its seconds.

To be imported has an effect, and must: there is no other place before the imports.
"""

import os
import signal
import sys
import threading
from pathlib import Path
from types import FrameType


def raise_interrupts() -> None:
    """Have Ctrl-C raise KeyboardInterrupt again, once the imports are done."""
    if signal.getsignal(signal.SIGINT) is _exit:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _is_command() -> bool:
    """Whether this process was started as `minrnn` or `python -m minrnn`."""
    if sys.argv[:1] == ["-m"]:
        # what Python shows while it looks for the module
        return ("-m", "minrnn") in zip(sys.orig_argv, sys.orig_argv[1:], strict=False)
    scripts = [sys.argv[:1], sys.orig_argv]
    return all(any(Path(word).stem == "minrnn" for word in words) for words in scripts)


def _exit(number: int, frame: FrameType | None) -> None:
    os.write(2, b"\n")
    os._exit(130)


def _exit_on_interrupts() -> None:
    if threading.current_thread() is not threading.main_thread():
        return
    # in other programs, or where it is handled or ignored already, Ctrl-C stays as it is
    if _is_command() and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _exit)


_exit_on_interrupts()
