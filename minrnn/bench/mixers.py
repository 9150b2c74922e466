"""How fast are the competitors' mixers? A comparison is only fair if they are well made, too.

Each is held to itself in float64; that it is its equation, tests/test_mixers.py says.
"""

from collections.abc import Callable, Iterator
from copy import deepcopy
from typing import NamedTuple

import torch
from torch import Tensor, nn

from minrnn.bench import measure, peers
from minrnn.bench.compare import Checked, Entrant, Table, check, timed_rows
from minrnn.bench.layer import inputs
from minrnn.bench.measure import Call
from minrnn.blocks import Block
from minrnn.models import ModelConfig, build_mixer

SHAPE, QUICK_SHAPE = (8, 1024, 256), (2, 128, 64)
SECONDS, QUICK_SECONDS = 10.0, 1.0
_OWN = "held to itself in float64"


class Subject(NamedTuple):
    """A layer that maps (B, T, width) to as many."""

    name: str
    build: Callable[[int], nn.Module]
    run: Callable[[nn.Module, Tensor], Tensor]


def _first(module: nn.Module, x: Tensor) -> Tensor:
    return module(x)[0]


def _mamba(width: int) -> nn.Module:
    return build_mixer(ModelConfig(width=width, mixer="mamba"))


def _mambapy(width: int) -> nn.Module:
    theirs = peers.require("mambapy", "mambapy.mamba")
    return theirs.MambaBlock(theirs.MambaConfig(d_model=width, n_layers=1))


def _transformer(width: int) -> nn.Module:
    sizes = (width, max(1, width // 64), 4 * width)
    return nn.TransformerEncoderLayer(*sizes, 0.0, "gelu", batch_first=True, norm_first=True)


def _causal(module: nn.Module, x: Tensor) -> Tensor:
    mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], x.device, x.dtype)
    return module(x, src_mask=mask, is_causal=True)


def _block(width: int) -> nn.Module:
    mixer = build_mixer(ModelConfig(width=width, mixer="attention", num_heads=max(1, width // 64)))
    return Block(mixer, width, conv_width=0, mlp_ratio=4, dropout=0.0)


TABLES = {
    "Mamba mixer": (
        Subject("Mamba", _mamba, _first),
        Subject("mambapy MambaBlock", _mambapy, lambda module, x: module(x)),
    ),
    "Transformer block": (
        Subject("attention block", _block, _first),
        Subject("nn.TransformerEncoderLayer", _transformer, _causal),
    ),
}


def measured(quick: bool = False, device: torch.device = measure.CPU) -> Iterator[Table]:
    """Tables of forward with backward, the gradients of the input and of every weight included.

    Args:
        quick: a small shape, fewer rounds.
        device: where.
    """
    shape = QUICK_SHAPE if quick else SHAPE
    memory = measure.tell_allocator(keep=True) if device.type == "cpu" else ""
    for title, subjects in TABLES.items():
        checked = {one.name: _checked(one, shape, device) for one in subjects}
        seconds = QUICK_SECONDS if quick else SECONDS
        rows = timed_rows(checked, lambda calls: Call(calls.both), {}, {}, seconds, device)
        yield Table(f"{title}, forward + backward", shape, "ms", rows, memory)


def _checked(subject: Subject, shape: tuple[int, int, int], device: torch.device) -> Checked:
    x, dy = inputs(shape, device)
    built: list[nn.Module] = []

    def load() -> peers.Calls:
        torch.manual_seed(0)
        built.append(subject.build(shape[2]).to(device))
        return peers.bind_layer(peers.Built(built[0], subject.run, subject.run), x, dy)

    def answer() -> list[Tensor]:
        wide = deepcopy(built[0]).double()
        leaf = x.double().requires_grad_()
        y = subject.run(wide, leaf)
        grads = torch.autograd.grad(y, [leaf, *wide.parameters()], dy.double())
        return [y.detach(), *grads]

    return check(Entrant(subject.name, load, answer, note=_OWN))
