"""Questions about precision, cost, speed and memory, one file each.

    precision    how far is each algorithm from the reference?
    half_precision   what is lost in bfloat16 and float16, by an operator and by a whole layer?
    cost         what arithmetic does an algorithm take?
    scan         how near are the operators to the bandwidth of the memory, and how far the others?
    length       how does their time grow with the length of the sequence?
    layer        how fast are the layers beside nn.GRU, nn.LSTM and the public minGRUs?
    packed       how fast do they train on a packed batch of unequal lengths?
    step         how long does one step take, where a stream is served?
    stream       how fast does a language model stream, one text and many?
    mixers       how fast are those that the paper compares with?
    train_step   what is left of it when a whole model trains?
    memory       how much memory does a training step of a layer take?
    gpu_static   what can be known of the GPU's kernels without a GPU?

Behind them stand `peers` (who is compared), `truth` (who is right), `measure` (how time is taken)
and `report` (table, JSON, picture). `docs/bench.md` says how to read what they print.
"""

from minrnn.bench.cost import Cost, cost
from minrnn.bench.half_precision import (
    HALF_GATE_MEANS,
    HALF_MEAN,
    HalfRow,
    LayerRow,
    half_precision,
    layer_precision,
    print_half_precision,
    print_layer_precision,
)
from minrnn.bench.precision import (
    GATE_MEANS,
    HEADROOM,
    LENGTHS,
    QUICK_LENGTHS,
    ROUNDING,
    SCANS,
    PrecisionRow,
    precision,
    print_precision,
)

__all__ = [
    "GATE_MEANS",
    "HALF_GATE_MEANS",
    "HALF_MEAN",
    "HEADROOM",
    "LENGTHS",
    "QUICK_LENGTHS",
    "ROUNDING",
    "SCANS",
    "Cost",
    "HalfRow",
    "LayerRow",
    "PrecisionRow",
    "cost",
    "half_precision",
    "layer_precision",
    "precision",
    "print_half_precision",
    "print_layer_precision",
    "print_precision",
]
