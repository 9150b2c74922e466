"""Options of commands: read by tyro, and what it refuses said in one line."""

import contextlib
import difflib
import functools
import io
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import tyro
from tyro.conf import OmitArgPrefixes

from minrnn.recipes import (
    RECIPES,
    RL_RECIPES,
    RecipeName,
    RlConfig,
    RlRecipeName,
    TextConfig,
    fitted,
)

# an option in a help text
_OPTION = re.compile(r"(?<![\w-])--[a-z][a-z0-9-]*")
# wider than any message: tyro wraps at the width of the terminal
_WIDE = "100000"


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


def bound(name: str, function: Callable[..., int], args: list[str]) -> Callable[[], int]:
    """The function of the command `name` with its arguments read from `args`.

    Raises:
        ValueError: they are refused; the message says why, in one line.
        SystemExit: they asked for help, which is printed.
    """
    options: dict[str, Any] = {"prog": f"minrnn {name}", "config": (OmitArgPrefixes,)}
    if name not in _RECIPES:
        return _parsed(_of_run(name, function, args), args, options)
    # a recipe is the set of defaults that the other options are read against
    chooses, kind, recipes = _RECIPES[name]
    asked = [a for a in args if a not in ("-h", "--help")]
    chosen, _ = _parsed(chooses, asked, options | {"return_unknown_args": True})
    recipe = fitted(recipes[chosen.recipe], chosen.steps, chosen.learning_rate)
    config = _parsed(kind, args, options | {"default": recipe})
    return functools.partial(function, config)


def _of_run(name: str, function: Callable[..., int], args: list[str]) -> Callable[..., int]:
    """`function`; of `eval`, the one for the kind of run that `args` name."""
    if name != "eval":
        return function
    from minrnn.cli import runs

    return runs.of_kind(function, args)


def _parsed(kind: Callable[..., Any], args: list[str], options: dict[str, Any]) -> Any:
    """What tyro reads from `args`: a dataclass, or a function with its arguments filled in."""

    @functools.wraps(kind)
    def partial(*values: Any, **named: Any) -> Callable[[], Any]:
        return functools.partial(kind, *values, **named)

    target = kind if isinstance(kind, type) else partial
    read = functools.partial(tyro.cli, target, **options)
    try:
        with _plain():
            return read(args=args, console_outputs=False)
    except SystemExit as stopped:
        if stopped.code:
            raise ValueError(_one_line(read, args)) from None
    # help was asked for; tyro does not know of https://no-color.org
    if os.environ.get("NO_COLOR"):
        print(_said(read, args)[0], end="")
        raise SystemExit(0)
    return read(args=args)


@contextlib.contextmanager
def _plain() -> Iterator[tuple[io.StringIO, io.StringIO]]:
    """Outputs that are caught, and are no terminals: tyro uses no colours and no boxes then."""
    out, error = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
        yield out, error


def _said(read: Callable[..., Any], args: list[str]) -> tuple[str, str]:
    """What tyro prints for `args` to both outputs, without colours."""
    with _plain() as (out, error), contextlib.suppress(SystemExit):
        read(args=args)
    return out.getvalue(), error.getvalue()


def _one_line(read: functools.partial[Any], args: list[str]) -> str:
    """Why `args` are refused; of an unknown option, those like it and all that are known."""
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = _WIDE
    try:
        text = _text_of(_said(read, args)[1])
        known = list(dict.fromkeys(_OPTION.findall(_said(read, ["--help"])[0])))
    finally:
        if before is None:
            del os.environ["COLUMNS"]
        else:
            os.environ["COLUMNS"] = before
    words = [arg.partition("=")[0] for arg in args if arg.startswith("--")]
    # first, as what stands after an unknown option may be misread: tyro takes it for its value
    unknown = [word for word in words if word.replace("_", "-") not in known and word != "--"]
    passes_on = "return_unknown_args" in read.keywords
    if passes_on or not (unknown or "nrecognized" in text):
        return text
    reason = f"Unrecognized options: {', '.join(unknown)}" if unknown else text
    similar = [
        near
        for word in unknown
        for near in difflib.get_close_matches(word.replace("_", "-"), known, n=2, cutoff=0.75)
    ]
    meant = f"; did you mean {' or '.join(similar)}?" if similar else ""
    return f"{reason}{meant} (known: {', '.join(known)})"


def _text_of(message: str) -> str:
    """The reason in a message of tyro's: a title, a rule, the reason, a rule, what to do next."""
    rows = [row.strip() for row in message.splitlines()]
    rules = [number for number, row in enumerate(rows) if row and set(row) == {"-"}]
    first, last = rules[:2] if len(rules) > 1 else (-1, len(rows))
    # marks of rich, and the names of our classes, say nothing to who gave an option
    reason = re.sub(r"\[/?bold\]", "", " ".join(rows[first + 1 : last]))
    reason = re.sub(r"\s+", " ", reason).strip()
    return re.sub(r"^Error parsing [A-Za-z]\S*: ", "", reason)
