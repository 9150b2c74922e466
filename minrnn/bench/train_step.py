"""What is left of the layer's speed when a whole model trains?"""

import os
import warnings
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from minrnn import losses
from minrnn.bench import measure, peers, truth
from minrnn.bench.compare import Row, Table, shares
from minrnn.bench.measure import Call, Timing
from minrnn.blocks import Block
from minrnn.data.batch import Batch
from minrnn.models import LanguageModel
from minrnn.recipes import RECIPES, RecipeName, TextConfig
from minrnn.state import State

# tiny Shakespeare has so many characters
VOCABULARY = 65
SECONDS, QUICK_SECONDS = 45.0, 4.0
# Of loss and gradients. The slope of g jumps at 0, and among many candidates rounding puts one on
# the other side, which changes a gradient in one place; `minrnn bench layer` holds layers to more.
TOLERANCE = 1e-2
MATRIX_PRODUCTS = {
    "aten::mm",
    "aten::addmm",
    "aten::bmm",
    "aten::baddbmm",
    "aten::linear",
    "aten::mkldnn_linear",
    "aten::_mkl_linear",
}
_PEERS = {
    "mingru": ("minGRU-pytorch minGRU", "minGRU_pytorch.minGRU", "minGRU"),
    "minlstm": ("minGRU-pytorch minLSTM", "minGRU_pytorch.minLSTM", "minLSTM"),
}


class _PeerMixer(nn.Module):
    """The layer of minGRU-pytorch behind our contract; its state is not handed on."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        y = self.layer(x)
        return y, State({"h": y[:, -1]})


class _TruthMixer(nn.Module):
    """One of our layers by its equation and the tree scan: no kernel of ours, for float64."""

    def __init__(self, rnn: nn.Module) -> None:
        super().__init__()
        self.rnn: Any = rnn

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        h = truth.recurrence64(*peers.our_gates(self.rnn, x))
        return F.linear(h, self.rnn.weight_hr_l0), State({"h": h[:, -1]})


def measured(quick: bool = False, device: torch.device = measure.CPU) -> Iterator[Table]:
    """Tables of a training step with either layer inside the same model, for both cells.

    With the allocator as it is, which decides much of the time, and keeping its pages. A step is
    forward, backward, clipping and AdamW, on a batch of random symbols.

    Args:
        quick: the small model of the recipe `demo`, with minGRU only.
        device: where; a GPU's allocator is told nothing, and there is one table for each cell.
    """
    name: RecipeName = "demo" if quick else "shakespeare"
    for keep in (False, True) if device.type == "cpu" else (False,):
        # what is kept once stays: pages as they come go first
        memory = measure.tell_allocator(keep) if keep else measure.AS_IT_IS
        for mixer in ("mingru",) if quick else ("mingru", "minlstm"):
            recipe = RECIPES[name]
            recipe = replace(recipe, model=replace(recipe.model, mixer=mixer, vocab_size=0))
            table = _table(name, recipe, QUICK_SECONDS if quick else SECONDS, device)
            yield replace(table, memory=memory)


def _table(name: str, recipe: TextConfig, seconds: float, device: torch.device) -> Table:
    batch = _batch(recipe, device)
    mixer = recipe.model.mixer
    who, module, attribute = _PEERS[mixer]
    ours = _model(recipe).to(device)
    models: dict[str, LanguageModel] = {peers.OURS: ours}
    errors: dict[str, float] = {}
    notes: dict[str, str] = {}
    try:
        models[who] = _with_peer(ours, getattr(peers.require("minGRU-pytorch", module), attribute))
    except peers.MissingPeerError as missing:
        notes[who] = str(missing)
    for which, model in list(models.items()):
        errors[which] = _error(model, ours, batch)
        if not errors[which] <= TOLERANCE:
            notes[which] = "wrong: loss or gradients differ from float64"
            del models[which]
    steps = {which: _step(model, recipe, batch) for which, model in models.items()}
    turns = {which: Call(step) for which, step in steps.items()}
    timings = measure.interleave(turns, seconds, measure.clock_of(device))
    timed = shares(timings, {})
    rows = []
    for which in (peers.OURS, who):
        note = notes.get(which) or _note(timings[which], batch.targets.numel(), steps[which])
        row = replace(timed.get(which, Row(which)), error=errors.get(which), note=note)
        rows.append(row if peers.OURS in timed else replace(row, ratio=None))
    shape = (*batch.inputs.shape, recipe.model.width)
    return Table(f"{name} recipe with {mixer}: training step", shape, "ms", tuple(rows))


def _note(timing: Timing, num_tokens: int, step: Callable[[], Any]) -> str:
    return (
        f"{num_tokens / timing.median:,.0f} tokens/s, "
        f"{matrix_share(step):.0%} of it in matrix products"
    )


def _batch(recipe: TextConfig, device: torch.device) -> Batch:
    generator = torch.Generator().manual_seed(0)
    size = (recipe.train.batch_size, recipe.context + 1)
    ids = torch.randint(VOCABULARY, size, generator=generator).to(device)
    return Batch(ids[:, :-1], ids[:, 1:], torch.ones_like(ids[:, 1:], dtype=torch.bool))


def _model(recipe: TextConfig) -> LanguageModel:
    """The model of the recipe; biases of the recurrent layers 0, since the other has none."""
    torch.manual_seed(0)
    model = LanguageModel(replace(recipe.model, vocab_size=VOCABULARY))
    for block in model.blocks:
        nn.init.zeros_(_rnn(block).bias_ih_l0)
    return model


def _rnn(block: nn.Module) -> Any:
    """The recurrent layer of a block."""
    mixer: Any = block.mixer
    return mixer.rnn


def _with_peer(model: LanguageModel, layer: Callable[..., Any]) -> LanguageModel:
    """The same model with another layer of the same weights in each block."""
    model = deepcopy(model)
    for block in model.blocks:
        assert isinstance(block, Block)
        rnn = _rnn(block)
        other = layer(rnn.input_size, rnn.hidden_size / rnn.input_size, proj_out=True)
        other.to(rnn.weight_ih_l0.device)
        *gates, v = rnn.weight_ih_l0.detach().chunk(rnn.num_gates)
        # it has the candidate above the gates
        fused = other.to_hidden_and_gate if len(gates) == 1 else other.to_hidden_and_f_i_gate
        assert rnn.weight_hr_l0 is not None
        with torch.no_grad():
            fused.weight.copy_(torch.cat([v, *gates]))
            other.to_out.weight.copy_(rnn.weight_hr_l0)
        block.mixer = _PeerMixer(other)  # pyright: ignore[reportAttributeAccessIssue]
    return model


def _error(model: LanguageModel, ours: LanguageModel, batch: Batch) -> float:
    """Of loss and gradients on two sequences without dropout, against `ours` in float64.

    The gradients are those of the parameters that both models have: all but the layers' own.
    """
    few = Batch(batch.inputs[:2], batch.targets[:2], batch.mask[:2])
    shared = [name for name, _ in ours.named_parameters() if ".rnn." not in name]

    def answer(model: LanguageModel) -> list[Tensor]:
        model = deepcopy(model).eval()
        loss = losses.next_symbol(model(few.inputs)[0], few)
        weights = dict(model.named_parameters())
        grads = torch.autograd.grad(loss, [weights[name] for name in shared])
        return [loss.detach(), *grads]

    wide = deepcopy(ours).double()
    for block in wide.blocks:
        assert isinstance(block, Block)
        block.mixer = _TruthMixer(_rnn(block))  # pyright: ignore[reportAttributeAccessIssue]
    return truth.error(answer(model), answer(wide))


def _step(model: LanguageModel, recipe: TextConfig, batch: Batch) -> Callable[[], None]:
    config = recipe.train
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        weight_decay=config.weight_decay,
        fused=True,
    )
    model.train()

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        losses.next_symbol(model(batch.inputs)[0], batch).backward()
        nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
        optimizer.step()

    return step


def matrix_share(step: Callable[[], Any]) -> float:
    """The share of the processor's time in `step` that torch spends in products of matrices."""
    # else the profiler announces on stderr that it starts and stops
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    with warnings.catch_warnings():
        # torch 2.11 on a GPU: that events are of one cycle, which is all there is
        warnings.simplefilter("ignore", UserWarning)
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            step()
    events = profiler.key_averages()
    total = sum(event.self_cpu_time_total for event in events)
    products = sum(e.self_cpu_time_total for e in events if e.key in MATRIX_PRODUCTS)
    return products / total if total else 0.0
