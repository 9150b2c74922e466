"""Questions about precision, cost, speed and memory, one file each.

    precision    how far is each algorithm from the reference, and what arithmetic does it take?
    scan         how near are the operators to the bandwidth of the memory, and how far the others?
    length       how does their time grow with the length of the sequence?
    layer        how fast are the layers beside nn.GRU, nn.LSTM and the public minGRUs?
    packed       how fast do they train on a packed batch of unequal lengths?
    step         how long does one step take, where a stream is served?
    mixers       how fast are those that the paper compares with?
    train_step   what is left of it when a whole model trains?
    memory       how much memory does a training step of a layer take?
    gpu_static   what can be known of the GPU's kernels without a GPU?

Behind them stand `peers` (who is compared), `truth` (who is right), `measure` (how time is taken)
and `report` (table, JSON, picture). `docs/bench.md` says how to read what they print.
"""

from minrnn.bench.precision import (
    BFLOAT16_BIASES,
    BFLOAT16_MEAN,
    BFLOAT16_ROUNDING,
    GATE_MEANS,
    HEADROOM,
    LENGTHS,
    QUICK_LENGTHS,
    SCANS,
    Bfloat16Row,
    Cost,
    PrecisionRow,
    bfloat16_precision,
    cost,
    precision,
    print_bfloat16_precision,
    print_precision,
)

__all__ = [
    "BFLOAT16_BIASES",
    "BFLOAT16_MEAN",
    "BFLOAT16_ROUNDING",
    "GATE_MEANS",
    "HEADROOM",
    "LENGTHS",
    "QUICK_LENGTHS",
    "SCANS",
    "Bfloat16Row",
    "Cost",
    "PrecisionRow",
    "bfloat16_precision",
    "cost",
    "precision",
    "print_bfloat16_precision",
    "print_precision",
]
