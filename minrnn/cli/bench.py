"""minrnn bench: what is measured, checked first."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from matplotlib.figure import Figure

from minrnn import bench
from minrnn.bench import chunk as of_chunks
from minrnn.bench import decision as of_decisions
from minrnn.bench import gpu_static as of_gpu
from minrnn.bench import layer as of_layers
from minrnn.bench import length as of_lengths
from minrnn.bench import memory as of_memory
from minrnn.bench import mixers as of_mixers
from minrnn.bench import packed as of_packed
from minrnn.bench import report
from minrnn.bench import scale as of_scale
from minrnn.bench import scan as of_scans
from minrnn.bench import step as of_steps
from minrnn.bench import stream as of_streams
from minrnn.bench import train_step as of_training
from minrnn.bench.compare import Table, all_right
from minrnn.cli.commands import COMMANDS
from minrnn.cli.devices import device_of
from minrnn.ops import gpu


def measure_precision(quick: bool = False) -> int:
    """Measure the error of scans, operators and layers against float64, in three dtypes.

    Args:
        quick: stop at T = 4,096.
    """
    rows = bench.precision(quick=quick)
    bench.print_precision(rows)
    print("\nThe mean in half precision, the rounding of the inputs included:\n")
    halves = bench.half_precision()
    bench.print_half_precision(halves)
    print("\nWhole layers, in half precision under autocast:\n")
    layers = bench.layer_precision(quick=quick)
    bench.print_layer_precision(layers)
    right = [row.error <= row.tolerance for row in (*rows, *halves, *layers)]
    return 0 if all(right) else 1


def gpu_plans(quick: bool = False, out: Path | None = None, device: str = "cuda") -> int:
    """Time the GPU's kernels alone, through time and over chunks of it.

    Args:
        quick: one shape and float32 only.
        out: the folder for bench-gpu-plans-cuda.json and .png; None only prints.
        device: a GPU.
    """
    if not gpu.is_installed():
        raise ModuleNotFoundError("triton is missing: pip install 'minrnn[gpu]'")
    where = device_of(device)
    if where.type == "cpu":
        raise ValueError(f"`device` must be a GPU, got {device!r}")
    # triton is an extra
    from minrnn.bench.gpu_plans import measured

    tables = measured(quick, where)
    done = report.publish("gpu-plans", tables, quick, out, report.draw_ratios, where)
    return 0 if all_right(done) else 1


def _bench(
    name: str,
    measured: Callable[..., Iterable[Table]],
    short: str,
    draw: Callable[[str, Sequence[Table]], Figure] = report.draw_ratios,
    on_gpu: bool = True,
) -> Callable[..., int]:
    """The command `minrnn bench name`.

    Args:
        name: of the bench.
        measured: gives its tables; True for the short form.
        short: what the short form leaves out.
        draw: makes the picture.
        on_gpu: whether it can also be taken on a GPU.
    """

    def command(quick: bool = False, out: Path | None = None) -> int:
        return 0 if all_right(report.publish(name, measured(quick), quick, out, draw)) else 1

    def command_on(quick: bool = False, out: Path | None = None, device: str = "cpu") -> int:
        where = device_of(device)
        # cuDNN's recurrences would take 10 bits of each factor, all others take all 24
        torch.backends.cudnn.allow_tf32 = False
        tables = measured(quick, where)
        return 0 if all_right(report.publish(name, tables, quick, out, draw, where)) else 1

    files = f"bench-{name}.json and bench-{name}.png"
    command.__doc__ = f"""{COMMANDS[f"bench {name}"].summary}

    Args:
        quick: {short}, within a minute.
        out: the folder for {files}; None only prints.
    """
    if not on_gpu:
        return command
    command_on.__doc__ = f"""{command.__doc__.rstrip()}
        device: cpu, or cuda, whose files are called {files.replace(".", "-cuda.")}.
    """
    return command_on


scan = _bench(
    "scan",
    of_scans.measured,
    "smaller shapes and fewer rounds",
)
length = _bench(
    "length",
    of_lengths.measured,
    "up to 262,144 steps and fewer rounds",
    report.draw_times,
)
layer = _bench(
    "layer",
    of_layers.measured,
    "one small shape and fewer rounds",
)
packed = _bench(
    "packed",
    of_packed.measured,
    "fewer and shorter sequences",
)
step = _bench(
    "step",
    of_steps.measured,
    "one stream only and fewer rounds",
)
stream = _bench(
    "stream",
    of_streams.measured,
    "a short context and fewer rounds",
    of_streams.draw,
    on_gpu=False,
)
mixers = _bench(
    "mixers",
    of_mixers.measured,
    "a small shape and fewer rounds",
)
decision = _bench(
    "decision",
    of_decisions.measured,
    "one episode at a time and fewer rounds",
    on_gpu=False,
)
train_step = _bench(
    "train-step",
    of_training.measured,
    "the model of the recipe demo instead of shakespeare",
)
memory = _bench(
    "memory",
    of_memory.measured,
    "one small shape, once",
    on_gpu=False,
)
chunk = _bench(
    "chunk",
    of_chunks.measured,
    "two short lengths, once",
    of_chunks.draw,
    on_gpu=False,
)
scale = _bench(
    "scale",
    of_scale.measured,
    "a small model and fewer splits, once",
    of_scale.draw,
    on_gpu=False,
)
gpu_static = of_gpu.measure
