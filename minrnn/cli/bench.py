"""minrnn bench: what is measured, checked first."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from minrnn import bench
from minrnn.bench import (
    layer,
    length,
    memory,
    mixers,
    packed,
    report,
    scan,
    step,
    train_step,
)
from minrnn.bench.compare import Table, all_right


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


def measure_mixers(quick: bool = False, out: Path | None = None) -> int:
    """Time our Mamba beside mambapy's, our attention block beside nn.TransformerEncoderLayer.

    Args:
        quick: a small shape and fewer rounds, within a minute.
        out: the folder for bench-mixers.json and bench-mixers.png; None only prints.
    """
    return _bench("mixers", mixers.measured(quick), quick, out)


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


def _bench(
    name: str,
    tables: Iterable[Table],
    quick: bool,
    out: Path | None,
    draw: Callable[[str, Sequence[Table]], Figure] = report.draw_ratios,
) -> int:
    return 0 if all_right(report.publish(name, tables, quick, out, draw)) else 1
