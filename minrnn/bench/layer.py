"""How fast are the layers beside those of torch, the public minGRUs, and loops in Python?"""

from collections.abc import Iterator
from copy import deepcopy

import torch
from torch import Tensor, nn

from minrnn.bench import measure, peers
from minrnn.bench.compare import Checked, Entrant, Row, Table, check, timed_rows
from minrnn.bench.measure import Call

# (B, T, width), input and hidden size the same
SHAPES = ((8, 512, 128), (64, 512, 64), (1, 4096, 256))
# where the paper compares with a step loop: 175 times at T = 512, 1324 times at 4,096
LOOP_SHAPES = ((64, 512, 64), (64, 4096, 64))
# and larger, as a GPU is for
GPU_SHAPES = (*SHAPES, (64, 1024, 512))
QUICK_SHAPES = ((8, 256, 64),)
QUICK_LOOP_SHAPES = ((8, 256, 64),)
FAMILIES = {"gru": "MinGRU", "lstm": "MinLSTM"}
SECONDS, QUICK_SECONDS = 4.0, 0.4


def measured(quick: bool = False, device: torch.device = measure.CPU) -> Iterator[Table]:
    """Tables of forward with backward, the gradients of the input and of every weight included.

    Args:
        quick: fewer and smaller shapes, fewer rounds.
        device: where.
    """
    seconds = QUICK_SECONDS if quick else SECONDS
    for family, name in FAMILIES.items():
        for shape in QUICK_SHAPES if quick else SHAPES if device.type == "cpu" else GPU_SHAPES:
            title = f"{name} forward + backward"
            yield Table(title, shape, "ms", _rows(family, shape, seconds, device, loops=False))
        for shape in QUICK_LOOP_SHAPES if quick else LOOP_SHAPES:
            title = f"{name} against step loops, forward + backward"
            yield Table(title, shape, "ms", _rows(family, shape, seconds, device, loops=True))


# The slope of g jumps at 0: a candidate that rounding put on the other side, or on 0 itself, would
# have another gradient without anything being wrong. So x and the weights get few enough bits for
# a projection that is exact in float32, and their first features the odd ones that keep it from 0:
# it is an odd multiple of 2^-19 beside multiples of 2^-14.


def inputs(
    shape: tuple[int, int, int], device: torch.device = measure.CPU
) -> tuple[Tensor, Tensor]:
    """x and dh, normal, from a fixed seed; x in sixteenths, 2^-9 more in its first feature."""
    generator = torch.Generator().manual_seed(0)
    x = torch.round(torch.randn(shape, generator=generator) * 16) / 16
    x[..., 0] += 2.0**-9
    return x.to(device), torch.randn(shape, generator=generator).to(device)


def _round_weights(module: nn.Module) -> None:
    """Multiples of 2^-10, odd ones for the first feature."""
    with torch.no_grad():
        for weight in module.parameters():
            weight.copy_(torch.round(weight * 512) / 512)
            if weight.dim() == 2:
                weight[:, 0] += 2.0**-10


def _rows(
    family: str,
    shape: tuple[int, int, int],
    seconds: float,
    device: torch.device,
    loops: bool,
) -> tuple[Row, ...]:
    x, dh = inputs(shape, device)
    checked = {}
    for number, layer in enumerate(one for one in peers.LAYERS if one.family == family):
        # the first is ours, which stands in both kinds of table
        if number == 0 or layer.loop == loops:
            checked[layer.name] = checked_layer(layer, x, dh)
    return timed_rows(checked, lambda calls: Call(calls.both), {}, {}, seconds, device)


def checked_layer(layer: peers.Layer, x: Tensor, dh: Tensor) -> Checked:
    """The layer with weights from a fixed seed, held to its equation in float64."""
    built: list[peers.Built] = []

    def load() -> peers.Calls:
        torch.manual_seed(0)
        built.append(layer.build(x.shape[2]))
        built[0].module.to(x.device)
        _round_weights(built[0].module)
        return peers.bind_layer(built[0], x, dh)

    def load64() -> peers.Calls:
        wide = built[0]._replace(module=deepcopy(built[0].module).double())
        return peers.bind_layer(wide, x.double(), dh.double())

    def answer() -> list[Tensor]:
        module = deepcopy(built[0].module).double()
        leaf = x.double().requires_grad_()
        h = built[0].truth(module, leaf)
        grads = torch.autograd.grad(h, [leaf, *module.parameters()], dh.double())
        return [h.detach(), *grads]

    note = "another function; held to itself in float64" if layer.own_truth else ""
    return check(Entrant(layer.name, load, answer, load64 if layer.log_space else None, note))
