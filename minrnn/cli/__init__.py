"""The command `minrnn`: each command a few lines over the library, its options made by tyro."""

import contextlib
import functools
import io
import itertools
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
import tyro
from tyro.conf import OmitArgPrefixes

from minrnn.cli import bench, reproduce, rl, runs, serve, text
from minrnn.ranks import ProcessLostError
from minrnn.recipes import (
    RECIPES,
    RL_RECIPES,
    RecipeName,
    RlConfig,
    RlRecipeName,
    TextConfig,
    fitted,
)
from minrnn.train import NonFiniteLossError

COMMANDS: dict[str, Callable[..., int]] = {
    "train text": text.train_text,
    "train rl": rl.train_rl,
    "train": runs.resume_run,
    "eval": text.evaluate_text,
    "generate": text.generate_text,
    "serve": serve.serve_run,
    "data text": text.build_corpus,
    "data shakespeare": text.write_plays,
    "data tiny-shakespeare": text.write_tiny_shakespeare,
    "data rl info": rl.show_trajectories,
    "data rl convert": rl.convert_trajectories,
    "data rl collect": rl.collect_trajectories,
    "bench precision": bench.measure_precision,
    **{f"bench {name}": command for name, command in bench.BENCHES.items()},
    "reproduce shakespeare": reproduce.reproduce_shakespeare,
    "reproduce selective-copying": reproduce.reproduce_selective_copying,
    "reproduce efficiency": reproduce.reproduce_efficiency,
    "reproduce d4rl": reproduce.reproduce_d4rl,
    "reproduce report": reproduce.write_report,
    "info": text.show_info,
}


def main(args: Sequence[str] | None = None) -> int:
    """Run a command line; what is refused is said in one line, with exit code 2."""
    args = list(sys.argv[1:] if args is None else args)
    if not args or args[0] in ("-h", "--help"):
        print(_help())
        return 0
    command = next((name for n in (3, 2, 1) if (name := " ".join(args[:n])) in COMMANDS), None)
    if command is None:
        begun = [name for name in COMMANDS if name.split()[0] == args[0]]
        known = ", ".join(begun or COMMANDS)
        return _refuse("minrnn", f"unknown command {' '.join(args[:2])!r} (known: {known})")
    try:
        code = _run(command, args[len(command.split()) :])
        if dist.is_initialized():
            dist.destroy_process_group()
        return code
    except BrokenPipeError:
        # the reader of our output went away, e.g. `| head`; nothing more can be said to it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    except (ValueError, OSError, ModuleNotFoundError, NonFiniteLossError) as error:
        return _refuse(f"minrnn {command}", str(error))
    except ProcessLostError as error:
        _refuse(f"minrnn {command}", str(error))
        return 1
    except (RuntimeError, MemoryError) as error:
        if not isinstance(error, MemoryError) and "allocate memory" not in str(error):
            raise
        return _refuse(f"minrnn {command}", f"not enough memory: {str(error).splitlines()[0]}")


def _help() -> str:
    width = max(map(len, COMMANDS))
    rows = [f"  {name:{width}}  {_summary(command)}" for name, command in COMMANDS.items()]
    return "\n".join(
        ["usage: minrnn COMMAND ...", "", *rows, "", "minrnn COMMAND --help says what each takes."]
    )


def _summary(command: Callable[..., int]) -> str:
    return (command.__doc__ or "").partition("\n")[0]


@dataclass(frozen=True)
class _Text:
    recipe: RecipeName = "shakespeare"
    steps: int | None = None
    learning_rate: float | None = None


@dataclass(frozen=True)
class _Rl:
    recipe: RlRecipeName = "cpu"
    steps: int | None = None
    learning_rate: float | None = None


# commands that take a recipe: what chooses and fits it, the configuration, the recipes
_RECIPES: dict[str, tuple[type, type, Mapping[Any, Any]]] = {
    "train text": (_Text, TextConfig, RECIPES),
    "train rl": (_Rl, RlConfig, RL_RECIPES),
}


def _run(command: str, args: list[str]) -> int:
    options: dict[str, Any] = {"prog": f"minrnn {command}", "config": (OmitArgPrefixes,)}
    function = COMMANDS[command]
    if command not in _RECIPES:
        return _parsed(runs.of_kind(function, args), args, options)()
    # a recipe is the set of defaults that the other options are read against
    chooses, kind, recipes = _RECIPES[command]
    asked = [a for a in args if a not in ("-h", "--help")]
    chosen, _ = _parsed(chooses, asked, options | {"return_unknown_args": True})
    recipe = fitted(recipes[chosen.recipe], chosen.steps, chosen.learning_rate)
    return function(_parsed(kind, args, options | {"default": recipe}))


def _parsed(kind: Callable[..., Any], args: list[str], options: dict[str, Any]) -> Any:
    """What tyro reads from `args`: a dataclass, or a function with its arguments filled in.

    Raises:
        ValueError: tyro refused them; the message says why, in one line.
    """

    @functools.wraps(kind)
    def bound(*values: Any, **named: Any) -> Callable[[], Any]:
        return functools.partial(kind, *values, **named)

    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(kind if isinstance(kind, type) else bound, args=args, **options)
    except SystemExit as stopped:
        if not stopped.code:
            raise
        raise ValueError(_one_line(said.getvalue(), kind, options)) from None


def _one_line(box: str, kind: Callable[..., Any], options: dict[str, Any]) -> str:
    """The message in a box that tyro drew, and the known options if one was unknown."""
    rows = [row.strip(" │╭╰╮╯─|+-") for row in box.splitlines()[1:]]
    ends = ("For full helptext", "Perhaps you meant", "Argument helptext")
    text = " ".join(itertools.takewhile(lambda row: not row.startswith(ends), rows)).strip()
    if "nrecognized" in text:
        shown = io.StringIO()
        with contextlib.redirect_stdout(shown), contextlib.suppress(SystemExit):
            tyro.cli(kind, args=["--help"], **options)
        known = dict.fromkeys(re.findall(r"(?<=[ │])--[a-z][a-z0-9-]*", shown.getvalue()))
        text = f"{text} (known: {', '.join(known)})"
    return re.sub(r"\s+", " ", text)


def _refuse(who: str, why: str) -> int:
    print(f"{who}: {why}", file=sys.stderr)
    return 2
