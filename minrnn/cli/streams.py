"""The standard streams as they may be: closed, cut off, full, or unable to show a character."""

import io
import os
import sys


def open_closed() -> None:
    """Make both outputs usable: one that was closed (`>&-`) takes anything and keeps nothing.

    Characters that an output cannot encode, e.g. of file names that are not UTF-8, are written as
    escapes.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            # open for as long as the process runs
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def complain(text: str) -> None:
    """Print one line to the standard error, whatever is in `text`."""
    line = " ".join(part.strip() for part in text.splitlines())
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)
    try:
        print(shown, file=sys.stderr, flush=True)
        sys.stdout.flush()
    except OSError:
        # nobody reads it, or the disk is full
        sink()


def sink() -> None:
    """Drop what is printed from here on, and what is still buffered.

    The interpreter would complain at its end that it cannot be written.
    """
    sink = os.open(os.devnull, os.O_WRONLY)
    os.dup2(sink, sys.stdout.fileno())
    os.close(sink)
