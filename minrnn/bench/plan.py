"""Time and memory of a training step over many processes, as formulas; docs/scale.md derives them.

Everything here is calculated. The rates of a `Machine` are measured or taken from data sheets, what
a `Model` takes is counted while its operations run.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from minrnn.models import LanguageModel, ModelConfig

# numbers of float32 for each parameter: itself, its gradient, the two moments of AdamW
_HELD = 4
# ... and for each that an update reads and writes: four read, all but the gradient written
_UPDATED = 7
# float32: parameters, gradients and states, whatever the activations are kept in
_WIDE = 4
# for each channel of a state: a part is run from zeros as well, forward and backward, and the
# product of its decays taken
_TWICE = 12
_COUNTED_STEPS = 4096


class Link(NamedTuple):
    """What lies between two processes."""

    bandwidth: float
    """bytes each second, in one direction"""
    latency: float
    """seconds of a message"""

    def seconds(self, num_bytes: float, messages: float) -> float:
        """Of `messages` one after the other that carry `num_bytes` together."""
        return num_bytes / self.bandwidth + messages * self.latency


class Machine(NamedTuple):
    """What one process has, while the others are at work too."""

    name: str
    flops: float
    """of matrix products, each second, as attained"""
    bandwidth: float
    """bytes of memory, read and written, each second"""
    memory: float
    """bytes"""
    near: Link
    """between processes of one node"""
    far: Link
    """between nodes"""
    node: int
    """processes of a node"""
    number: int
    """bytes of a number in activations and matrix products"""
    overlaps: bool
    """whether gradients travel while others are computed"""

    def link(self, count: int) -> Link:
        """What a process among `count` neighbours has for an exchange that all take part in.

        Between nodes each of their processes carries a part of what all of the node exchange.
        """
        if count <= self.node:
            return self.near
        between = self.node * self.far.bandwidth
        return Link(min(self.near.bandwidth, between), self.far.latency)


class Model(NamedTuple):
    """What one step of a sequence takes, forward and backward."""

    name: str
    parameters: int
    flops: float
    """of matrix products"""
    moved: float
    """numbers that all other operations read and write"""
    kept: float
    """numbers that wait for the backward pass"""
    layers: int
    states: int
    """channels of recurrent state, over all layers"""
    halo: int
    """numbers that the convolutions look back at, over all layers"""


@dataclass(frozen=True)
class Split:
    """How processes share the work, and how much of a sequence is kept at a time."""

    data: int = 1
    """shares of the batch"""
    time: int = 1
    """parts of the time of each sequence"""
    sharded: bool = False
    """parameters, gradients and moments, over all processes (FSDP2)"""
    chunk: int = 0
    """steps of a sequence that a process keeps the activations of; 0 for all that it has"""
    accumulation: int = 1
    """parts that a process computes its share of the batch in"""

    @property
    def count(self) -> int:
        """Processes."""
        return self.data * self.time


class Cost(NamedTuple):
    """Of one training step in one process."""

    forward: float
    backward: float
    states: float
    """exchange of states and halos"""
    gradients: float
    """exchange of gradients, and of parameters if they are sharded"""
    update: float
    waits: float
    """of the exchanges, what nothing else is computed beside"""
    seconds: float
    memory: float
    """bytes"""


def cost(model: Model, batch: int, T: int, split: Split, machine: Machine) -> Cost:
    """A training step of `batch` sequences of T steps, shared as `split` says."""
    steps = batch * T / split.count
    one = model.flops / 3 / machine.flops + model.moved * machine.number / 3 / machine.bandwidth
    passes = 4 if split.chunk else 3
    forward, backward = steps * one, steps * one * (passes - 1)
    if split.time > 1:
        again = _TWICE / 2 * model.states * _WIDE * steps / machine.bandwidth
        forward, backward = forward + again, backward + again
    states = _states(model, batch / split.data, T, split, machine)
    gradients = _gradients(model, T, split, machine)
    share = split.count if split.sharded else 1
    update = _UPDATED * _WIDE * model.parameters / share / machine.bandwidth
    hidden = min(gradients, backward) if machine.overlaps else 0.0
    waits = states + gradients - hidden
    seconds = forward + backward + update + waits
    memory = _memory(model, batch / split.data, T / split.time, split, machine)
    return Cost(forward, backward, states, gradients, update, waits, seconds, memory)


def _states(model: Model, rows: float, T: int, split: Split, machine: Machine) -> float:
    """Seconds for what the parts of a sequence tell each other: in each layer two rounds forward
    (a decay and an end of each channel; the halo) and two backward."""
    if split.time == 1:
        return 0.0
    forward = 2 if split.chunk else 1
    pieces = T / split.time / split.chunk if split.chunk else 1.0
    numbers = forward * (2 * model.states + model.halo) + 2 * model.states + 2 * model.halo
    num_bytes = (split.time - 1) * rows * _WIDE * numbers * pieces
    rounds = 2 * (forward + 1) * model.layers * pieces * split.accumulation
    return machine.link(split.time).seconds(num_bytes, rounds * _rounds(split.time))


def _gradients(model: Model, T: int, split: Split, machine: Machine) -> float:
    """Seconds for adding up the gradients; and for gathering the parameters, if sharded."""
    count = split.count
    if count == 1:
        return 0.0
    others, link = (count - 1) / count, machine.link(count)
    if not split.sharded:
        # all sums are made, each in one place, and told to all
        return link.seconds(2 * _WIDE * model.parameters * others, 2 * _rounds(count))
    # layer by layer: parameters before each pass of each piece, and the sums of gradients
    pieces = T / split.time / split.chunk if split.chunk else 1.0
    gathered = (3 if split.chunk else 2) * pieces * split.accumulation
    num_bytes = (gathered * machine.number + _WIDE) * model.parameters * others
    return link.seconds(num_bytes, (gathered + 1) * model.layers * _rounds(count))


def _rounds(count: int) -> int:
    """Messages one behind the other in a tree of `count` processes."""
    return math.ceil(math.log2(count))


def _memory(model: Model, rows: float, T: float, split: Split, machine: Machine) -> float:
    share = split.count if split.sharded else 1
    held = _HELD * _WIDE * model.parameters / share
    steps = split.chunk or T
    rows /= split.accumulation
    kept = model.kept * machine.number * rows * steps
    states = T / split.chunk * (model.states + model.halo) * _WIDE * rows if split.chunk else 0.0
    return held + kept + states


def splits(batch: int, T: int, count: int) -> Iterator[Split]:
    """All ways in which `count` processes can share the work; all numbers are powers of two."""
    powers = [1 << n for n in range(count.bit_length())]
    for time in powers:
        data, own = count // time, T // time
        if data > batch or own < 256:
            continue
        rows = batch // data
        chunks = [0, *(1 << n for n in range(8, 17) if 1 << n < own)]
        for accumulation in (1 << n for n in range(rows.bit_length())):
            for chunk in chunks:
                for sharded in (False, True) if count > 1 else (False,):
                    yield Split(data, time, sharded, chunk, accumulation)


def best(model: Model, batch: int, T: int, count: int, machine: Machine) -> tuple[Split, Cost]:
    """The fastest split of which a process fits into its memory.

    Raises:
        ValueError: there is none.
    """
    costs = [(one, cost(model, batch, T, one, machine)) for one in splits(batch, T, count)]
    # a fifth is for what is not counted
    fits = [(one, found) for one, found in costs if found.memory <= 0.8 * machine.memory]
    if not fits:
        raise ValueError(f"{model.name} does not fit into {count} x {machine.name}")
    return min(fits, key=lambda pair: pair[1].seconds)


def counted(name: str, config: ModelConfig) -> Model:
    """What a language model takes, counted on a short sequence; nothing is computed."""
    with torch.device("meta"):
        model = LanguageModel(config)
        ids = torch.zeros(1, _COUNTED_STEPS, dtype=torch.int64)
    weights = {p.untyped_storage()._cdata for p in model.parameters()}
    kept: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if x.is_floating_point() and storage._cdata not in weights:
            kept[storage._cdata] = storage.nbytes() // x.element_size()
        return x

    with _Moved() as moved:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            answers, state = model(ids)
            loss = F.cross_entropy(answers.flatten(0, 1), ids.flatten())
        waiting = sum(kept.values())
        loss.backward()
    sizes = {"h": 0, "conv": 0}
    for part, x in state.flatten().items():
        sizes[part.rpartition(".")[2]] += x.numel()
    matrices = sum(p.numel() for p in model.parameters() if p.dim() == 2)
    return Model(
        name,
        sum(p.numel() for p in model.parameters()),
        # each weight is multiplied with and added once forward, twice backward; rows of the
        # embedding are looked up
        6.0 * (matrices - model.embedding.weight.numel()),
        moved.numbers / _COUNTED_STEPS,
        waiting / _COUNTED_STEPS,
        config.num_layers,
        sizes["h"],
        sizes["conv"],
    )


class _Moved(TorchDispatchMode):
    """Counts the numbers that operations read and write, matrix products left out."""

    _PRODUCTS = ("mm", "addmm", "bmm", "linear")

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        found = func(*args, **(kwargs or {}))
        name = func._schema.name.partition("::")[2]
        results = [x for x in tree_leaves(found) if isinstance(x, Tensor)]
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        aliases = any(
            r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns
        )
        if name not in self._PRODUCTS and not aliases:
            self.numbers += sum(x.numel() for x in (*given, *results) if x.is_floating_point())
        return found
