"""minrnn bench: what is measured, checked first."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from matplotlib.figure import Figure

from minrnn import bench
from minrnn.bench import (
    chunk,
    decision,
    gpu_static,
    layer,
    length,
    memory,
    mixers,
    packed,
    report,
    scale,
    scan,
    step,
    stream,
    train_step,
)
from minrnn.bench.compare import Table, all_right
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


def measure_plans(quick: bool = False, out: Path | None = None, device: str = "cuda") -> int:
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
    from minrnn.bench import gpu_plans

    tables = gpu_plans.measured(quick, where)
    done = report.publish("gpu-plans", tables, quick, out, report.draw_ratios, where)
    return 0 if all_right(done) else 1


def _bench(
    name: str,
    measured: Callable[..., Iterable[Table]],
    says: str,
    short: str,
    draw: Callable[[str, Sequence[Table]], Figure] = report.draw_ratios,
    on_gpu: bool = True,
) -> Callable[..., int]:
    """The command `minrnn bench name`.

    Args:
        name: of the bench.
        measured: gives its tables; True for the short form.
        says: what it does.
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
    command.__doc__ = f"""{says}

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


BENCHES = {
    "scan": _bench(
        "scan",
        scan.measured,
        "Time the operators beside the machine's memory bandwidth and other scans.",
        "smaller shapes and fewer rounds",
    ),
    "length": _bench(
        "length",
        length.measured,
        "Time the operators over the length of the sequence, from 256 steps to 4 million.",
        "up to 262,144 steps and fewer rounds",
        report.draw_times,
    ),
    "layer": _bench(
        "layer",
        layer.measured,
        "Time the layers beside nn.GRU, nn.LSTM, other minGRUs and loops in Python.",
        "one small shape and fewer rounds",
    ),
    "packed": _bench(
        "packed",
        packed.measured,
        "Time the layers beside nn.GRU and nn.LSTM on a packed batch of unequal lengths.",
        "fewer and shorter sequences",
    ),
    "step": _bench(
        "step",
        step.measured,
        "Time one step of cells and layers, as a stream is served, beside those of torch.",
        "one stream only and fewer rounds",
    ),
    "stream": _bench(
        "stream",
        stream.measured,
        "Time a symbol of a language model, of one stream and of many, beside other models.",
        "a short context and fewer rounds",
        stream.draw,
        on_gpu=False,
    ),
    "mixers": _bench(
        "mixers",
        mixers.measured,
        "Time our Mamba beside mambapy's, our attention beside torch's Transformer layer.",
        "a small shape and fewer rounds",
    ),
    "decision": _bench(
        "decision",
        decision.measured,
        "Time actions and updates of decision models beside a Decision Transformer's.",
        "one episode at a time and fewer rounds",
        on_gpu=False,
    ),
    "train-step": _bench(
        "train-step",
        train_step.measured,
        "Time training steps of a recipe's model with our layer and with another inside.",
        "the model of the recipe demo instead of shakespeare",
    ),
    "memory": _bench(
        "memory",
        memory.measured,
        "Measure the peak memory of a training step of each layer, in a fresh process each.",
        "one small shape, once",
        on_gpu=False,
    ),
    "chunk": _bench(
        "chunk",
        chunk.measured,
        "Measure memory and time of gradients of whole sequences, in chunks and all at once.",
        "two short lengths, once",
        chunk.draw,
        on_gpu=False,
    ),
    "scale": _bench(
        "scale",
        scale.measured,
        "Time training steps of 1, 2 and 4 processes, and calculate those of many GPUs.",
        "a small model and fewer splits, once",
        scale.draw,
        on_gpu=False,
    ),
    "gpu-static": gpu_static.measure,
    "gpu-plans": measure_plans,
}
