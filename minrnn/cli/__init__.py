"""The command `minrnn`: each command a few lines over the library, its options made by tyro."""

import sys
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist

import minrnn
from minrnn import startup
from minrnn.cli import streams
from minrnn.cli.commands import COMMANDS, Command
from minrnn.errors import NonFiniteLossError, ProcessLostError

_HELP = ("-h", "--help")


def main(args: Sequence[str] | None = None) -> int:
    """Run a command line; what is refused is said in one line, with exit code 2."""
    streams.open_closed()
    args = list(sys.argv[1:] if args is None else args)
    name = next((name for n in (3, 2, 1) if (name := " ".join(args[:n])) in COMMANDS), None)
    who = "minrnn" if name is None else f"minrnn {name}"
    extra = "train" if name is None else COMMANDS[name].extra
    try:
        return _finished(lambda: _without_command(args) if name is None else _run(name, args))
    except BrokenPipeError:
        # the reader of our output went away, e.g. `| head`; nothing more can be said to it
        streams.sink()
        return 141
    except KeyboardInterrupt:
        streams.complain("")
        return 130
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == "minrnn":
            raise
        # without a name it is one of ours, which says what to install
        hint = f": pip install 'minrnn[{extra}]'" if error.name else ""
        return _refuse(who, f"{error}{hint}")
    except (ValueError, OSError, NonFiniteLossError) as error:
        return _refuse(who, str(error))
    except ProcessLostError as error:
        _refuse(who, str(error))
        return 1
    except (RuntimeError, MemoryError) as error:
        if not _is_out_of_memory(error):
            raise
        first = str(error).partition("\n")[0]
        return _refuse(who, f"not enough memory: {first}" if first else "not enough memory")


def _finished(call: Callable[[], int]) -> int:
    """What `call` returns, once all that it has printed is written."""
    try:
        code = call()
    except SystemExit:
        # after the help of a command
        sys.stdout.flush()
        raise
    sys.stdout.flush()
    return code


def _is_out_of_memory(error: Exception) -> bool:
    kinds = (MemoryError, torch.OutOfMemoryError)
    return isinstance(error, kinds) or "allocate memory" in str(error)


def _without_command(args: Sequence[str]) -> int:
    """What a line asks for that names no whole command: help, the version, or something unknown."""
    if not args or args[0] in _HELP:
        print(_help("", COMMANDS))
        return 0
    if args[0] in ("-V", "--version"):
        print(f"minrnn {minrnn.__version__}")
        return 0
    words = " ".join(args[:2])
    if args[-1] in _HELP:
        group = " ".join(args[:-1])
        begun = {name: one for name, one in COMMANDS.items() if name.startswith(f"{group} ")}
        if begun:
            print(_help(f"{group} ", begun))
            return 0
    known = [name for name in COMMANDS if name.split()[0] == args[0]]
    return _refuse("minrnn", f"unknown command {words!r} (known: {', '.join(known or COMMANDS)})")


def _help(group: str, commands: dict[str, Command]) -> str:
    width = max(map(len, commands))
    rows = [f"  {name:{width}}  {command.summary}" for name, command in commands.items()]
    ending = "minrnn COMMAND --help says what each takes."
    return "\n".join([f"usage: minrnn {group}COMMAND ...", "", *rows, "", ending])


def _run(name: str, args: Sequence[str]) -> int:
    # tyro and what the command needs: neither is loaded for the lines above
    from minrnn.cli import options

    function = COMMANDS[name].function()
    startup.raise_interrupts()
    code = options.bound(name, function, list(args[len(name.split()) :]))()
    if dist.is_initialized():
        dist.destroy_process_group()
    return code


def _refuse(who: str, why: str) -> int:
    streams.complain(f"{who}: {why}")
    return 2
