"""What is lost on the average in bfloat16 and float16, by an operator and by a whole layer?

On the CPU, from fixed seeds. `docs/precision.md` keeps what it gave.
"""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, bfloat16, float16, float32

from minrnn.bench import peers
from minrnn.bench.precision import (
    GATE_MEANS,
    LENGTHS,
    QUICK_LENGTHS,
    SUBJECTS,
    draw_noise,
    exact_states,
    make_inputs,
    print_table,
)
from minrnn.layers import MinGRU, MinLSTM

# from all but shut to all but open
HALF_GATE_MEANS = (-7.0, -5.0, -3.0, 0.0, 3.0, 5.0, 7.0)
# Rounding inputs and output makes a mean error of 1.3e-3 to 1.6e-3 in bfloat16, an eighth of that
# in float16; a state kept in bfloat16 would make 2e-2 at -7, where a step adds less than it
# resolves.
HALF_MEAN = {bfloat16: 4e-3, float16: 5e-4}

# features and channels of the layers
_WIDTH = 32
# The worst mean error of our layers, for each of GATE_MEANS: torch 2.13.0 on x86-64, all LENGTHS.
# In half precision it is the projection's: a gate near -7 is rounded to a 32nd or a 256th.
_MEASURED = {
    float32: (6.1e-8, 6.2e-8, 9.1e-7),
    bfloat16: (1.7e-3, 1.8e-3, 7.8e-3),
    float16: (2.1e-4, 2.3e-4, 1.1e-3),
}
_LOG = " in log space"
# room for another order of the sums in a projection; a mean over many steps hardly depends on it
_HEADROOM = 1.5


@dataclass(frozen=True)
class HalfRow:
    """One measurement: the mean of |h - truth| / truth over all steps and channels."""

    algorithm: str
    dtype: torch.dtype
    T: int
    gate_mean: float
    error: float
    """against the truth of the inputs in float32: what one loses in all"""
    arithmetic: float
    """against the truth of the inputs once rounded: what the operator adds"""

    @property
    def tolerance(self) -> float:
        """What the error should stay below."""
        return HALF_MEAN[self.dtype]


def half_precision(
    T: int = 4096,
    gate_means: Sequence[float] = HALF_GATE_MEANS,
    dtypes: Sequence[torch.dtype] = tuple(HALF_MEAN),
) -> list[HalfRow]:
    """Measure the operators in half precision against the reference on the float32 inputs.

    Inputs, gates and truth are those of `precision`; here the float32 inputs are the question, and
    rounding them is part of the error.

    Args:
        T: the number of steps.
        gate_means: the means to measure.
        dtypes: bfloat16, float16.

    Returns:
        A row for `mingru` and `minlstm` at each mean, dtype by dtype. A NaN anywhere is an infinite
        error.

    Example:
        >>> all(row.error < row.tolerance for row in half_precision(T=64))
        True
    """
    noise = draw_noise(T)
    rows = []
    for dtype in dtypes:
        for name in ("mingru", "minlstm"):
            for mean in gate_means:
                exact = make_inputs(name, noise, mean, float32)
                rounded = [x.to(dtype) for x in exact]
                h = SUBJECTS[name].run(*rounded)[0]
                errors = [_errors(h, exact_states(name, inputs))[0] for inputs in (exact, rounded)]
                rows.append(HalfRow(name, dtype, T, mean, *errors))
    return rows


@dataclass(frozen=True)
class LayerRow:
    """One measurement: |y - truth| / truth over all steps and channels."""

    layer: str
    dtype: torch.dtype
    T: int
    gate_bias: float
    error: float
    """the mean"""
    largest: float
    tolerance: float
    """of the mean; infinite where none is set: log space, and biases that are not in GATE_MEANS"""


def layer_precision(
    quick: bool = False,
    *,
    lengths: Sequence[int] | None = None,
    gate_biases: Sequence[float] = GATE_MEANS,
    dtypes: Sequence[torch.dtype] = (float32, bfloat16, float16),
) -> list[LayerRow]:
    """Measure whole layers under autocast against themselves in float64.

        error = mean |y_t - truth_t| / truth_t

    A `MinGRU` and a `MinLSTM` of 32 channels on 32 normal features, weights as the layers draw them
    from a fixed seed, float32; `gate_bias` is added to the bias of the gate that lets the input in
    (k, or i). Beside each stands the paper's log-space form of it, with the same weights under the
    same autocast. float32 is without autocast.

    Args:
        quick: measure up to T = 4,096 only.
        lengths: the T to measure; shorter ones are the beginning of the longest. None stands for
            `LENGTHS`.
        gate_biases: the biases to measure; a tolerance is known for those of `GATE_MEANS`.
        dtypes: float32, bfloat16, float16.

    Returns:
        A row for each layer, dtype, bias and T, in this order. A NaN anywhere is an infinite error.

    Example:
        >>> rows = layer_precision(lengths=[64], gate_biases=[0.0], dtypes=[bfloat16])
        >>> [row.layer for row in rows if row.error > 0.01]
        ['MinGRU in log space', 'MinLSTM in log space']
    """
    if lengths is None:
        lengths = QUICK_LENGTHS if quick else LENGTHS
    generator = torch.Generator().manual_seed(0)
    # (1, T, width); time is drawn first, so that a longer draw begins with the shorter one
    x = torch.randn(max(lengths), 1, _WIDTH, generator=generator).transpose(0, 1)
    rows = []
    for kind in (MinGRU, MinLSTM):
        layers = {bias: _layer(kind, bias) for bias in gate_biases}
        truths = {bias: _evaluate(copy.deepcopy(one).double(), x) for bias, one in layers.items()}
        subjects = {kind.__name__: _evaluate, kind.__name__ + _LOG: _log_space}
        for name, run in subjects.items():
            for dtype in dtypes:
                for bias, layer in layers.items():
                    for T in lengths:
                        with torch.autocast("cpu", dtype=dtype, enabled=dtype != float32):
                            y = run(layer, x[:, :T])
                        mean, largest = _errors(y, truths[bias][:, :T])
                        limit = _tolerance(name, dtype, bias)
                        rows.append(LayerRow(name, dtype, T, bias, mean, largest, limit))
    return rows


def print_half_precision(rows: Sequence[HalfRow]) -> None:
    """Print a Markdown table like that of `print_precision`.

    Args:
        rows: what `half_precision` returned.

    Example:
        >>> print_half_precision([HalfRow("mingru", bfloat16, 256, -7.0, 1.5e-3, 1.4e-3)])
        | algorithm | dtype    |   T | gate mean | mean error | arithmetic | tolerance |
        | --------- | -------- | --- | --------- | ---------- | ---------- | --------- |
        | mingru    | bfloat16 | 256 |        -7 |   1.50e-03 |   1.40e-03 |  4.00e-03 |
    """
    head = ["algorithm", "dtype", "T", "gate mean", "mean error", "arithmetic", "tolerance"]
    cells = [
        [
            row.algorithm,
            str(row.dtype).removeprefix("torch."),
            str(row.T),
            f"{row.gate_mean:g}",
            *(f"{x:.2e}" for x in (row.error, row.arithmetic, row.tolerance)),
        ]
        for row in rows
    ]
    print_table(head, cells)


def print_layer_precision(rows: Sequence[LayerRow]) -> None:
    """Print a Markdown table like that of `print_precision`.

    Args:
        rows: what `layer_precision` returned.

    Example:
        >>> print_layer_precision([LayerRow("MinGRU", bfloat16, 256, 0.0, 2e-3, 7e-3, math.inf)])
        | layer  | dtype    |   T | gate bias | mean error |  largest | tolerance |
        | ------ | -------- | --- | --------- | ---------- | -------- | --------- |
        | MinGRU | bfloat16 | 256 |         0 |   2.00e-03 | 7.00e-03 |      none |
    """
    head = ["layer", "dtype", "T", "gate bias", "mean error", "largest", "tolerance"]
    cells = [
        [
            row.layer,
            str(row.dtype).removeprefix("torch."),
            str(row.T),
            f"{row.gate_bias:g}",
            f"{row.error:.2e}",
            f"{row.largest:.2e}",
            "none" if math.isinf(row.tolerance) else f"{row.tolerance:.2e}",
        ]
        for row in rows
    ]
    print_table(head, cells)


def _layer(kind: type[MinGRU] | type[MinLSTM], gate_bias: float) -> MinGRU | MinLSTM:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layer = kind(_WIDTH, _WIDTH, batch_first=True)
    assert layer.bias_ih_l0 is not None
    # rows k, v or f, i, v
    first = 0 if kind is MinGRU else _WIDTH
    with torch.no_grad():
        layer.bias_ih_l0[first : first + _WIDTH] += gate_bias
    return layer


@torch.no_grad()
def _evaluate(layer: MinGRU | MinLSTM, x: Tensor) -> Tensor:
    weight: Tensor = layer.weight_ih_l0
    return layer(x.double() if weight.dtype == torch.float64 else x)[0]


@torch.no_grad()
def _log_space(layer: MinGRU | MinLSTM, x: Tensor) -> Tensor:
    return peers.log_space_cell(*peers.our_gates(layer, x)[1])


def _errors(h: Tensor, truth: Tensor) -> tuple[float, float]:
    """The mean and the largest."""
    errors = (h.double() - truth).abs() / truth
    found = (errors.mean().item(), errors.max().item())
    return (math.inf, math.inf) if math.isnan(found[0]) else found


def _tolerance(layer: str, dtype: torch.dtype, gate_bias: float) -> float:
    if layer.endswith(_LOG) or gate_bias not in GATE_MEANS:
        return math.inf
    return _HEADROOM * _MEASURED[dtype][GATE_MEANS.index(gate_bias)]
