"""What does an action cost a decision model, and an update, beside a Decision Transformer?"""

from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from minrnn.acting import Actor, StreamActor, WindowActor
from minrnn.bench import peers
from minrnn.bench.compare import Checked, Entrant, Table, check, timed_rows
from minrnn.bench.measure import Call
from minrnn.data.batch import Batch
from minrnn.decision import DecisionModel
from minrnn.losses import action_error
from minrnn.models import MixerName
from minrnn.recipes import RL_RECIPES

# Hopper's, and Decision Transformer's window and batch
OBSERVATIONS, ACTIONS, CONTEXT, BATCH = 11, 3, 20, 64
STREAMS, QUICK_STREAMS = (1, 25), (1,)
SECONDS, QUICK_SECONDS = 4.0, 0.3
_OWN = "held to itself in float64"


def measured(quick: bool = False) -> Iterator[Table]:
    """Tables of one action and of one update, in the model of the recipe.

    Args:
        quick: one episode at a time only, fewer rounds.
    """
    seconds = QUICK_SECONDS if quick else SECONDS
    acting: dict[str, tuple[MixerName, Callable[[DecisionModel], Actor]]] = {
        "minGRU, stream": ("mingru", StreamActor),
        "minGRU, window": ("mingru", lambda model: WindowActor(model, CONTEXT)),
        "minLSTM, stream": ("minlstm", StreamActor),
        "minLSTM, window": ("minlstm", lambda model: WindowActor(model, CONTEXT)),
        "Decision Transformer, window": ("attention", lambda model: WindowActor(model, CONTEXT)),
    }
    for episodes in QUICK_STREAMS if quick else STREAMS:
        checked = {
            name: _checked_action(name, mixer, actor, episodes)
            for name, (mixer, actor) in acting.items()
        }
        rows = timed_rows(checked, lambda calls: Call(calls.forward), {}, {}, seconds)
        shape = (episodes, CONTEXT, ACTIONS)
        yield Table("an action, window of T steps, A actions", shape, "ms", rows)
    shape = (BATCH // 8 if quick else BATCH, CONTEXT, 128)
    updates: dict[str, Callable[[], nn.Module]] = {
        "minGRU": lambda: _model("mingru"),
        "minLSTM": lambda: _model("minlstm"),
        "Decision Transformer, ours": lambda: _model("attention"),
        "transformers DecisionTransformerModel": _Theirs,
    }
    checked = {name: _checked_update(name, build, shape[0]) for name, build in updates.items()}
    rows = timed_rows(checked, lambda calls: Call(calls.both), {}, {}, 5 * seconds)
    yield Table("an update: forward, backward, AdamW", shape, "ms", rows)


class _Theirs(nn.Module):
    """transformers' model of the same size behind our contract."""

    def __init__(self) -> None:
        super().__init__()
        theirs = peers.require("transformers", "transformers")
        shape = _model("attention").config.blocks
        # its own names: inner width 4 times, no dropout but where ours has it
        config = theirs.DecisionTransformerConfig(
            state_dim=OBSERVATIONS,
            act_dim=ACTIONS,
            hidden_size=shape.width,
            max_ep_len=1000,
            n_layer=shape.num_layers,
            n_head=shape.num_heads,
            n_positions=1024,
            resid_pdrop=shape.dropout,
            embd_pdrop=shape.dropout,
            attn_pdrop=shape.dropout,
        )
        self.model = theirs.DecisionTransformerModel(config)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        action, to_go, observation, number = x.split([ACTIONS, 1, OBSERVATIONS, 1], dim=2)
        out = self.model(
            states=observation,
            # it has the action behind each step, which the one before our next step is
            actions=torch.cat([action[:, 1:], torch.zeros_like(action[:, :1])], dim=1),
            returns_to_go=to_go / 1000,
            timesteps=number[:, :, 0].long(),
            attention_mask=x.new_ones(x.shape[:2]),
            return_dict=True,
        )
        return out.action_preds, None


def _model(mixer: MixerName) -> DecisionModel:
    torch.manual_seed(0)
    config = RL_RECIPES["cpu"].model
    blocks = replace(config.blocks, mixer=mixer)
    sizes = {"observation_size": OBSERVATIONS, "action_size": ACTIONS}
    return DecisionModel(replace(config, blocks=blocks, **sizes))


def _steps(batch: int) -> Batch:
    """Made-up steps from the beginning of an episode."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, CONTEXT, ACTIONS + 1 + OBSERVATIONS + 1, generator=generator)
    x[:, :, ACTIONS] = 1000 * x[:, :, ACTIONS].abs()
    x[:, :, -1] = torch.arange(CONTEXT)
    targets = 2 * torch.rand(batch, CONTEXT, ACTIONS, generator=generator) - 1
    return Batch(x, targets, torch.ones(batch, CONTEXT, dtype=torch.bool))


def _checked_action(
    name: str, mixer: MixerName, actor: Callable[[DecisionModel], Actor], episodes: int
) -> Checked:
    model, x = _model(mixer).eval(), _steps(episodes).inputs

    def load() -> peers.Calls:
        acting = actor(model)
        told = [acting.act(step) for step in x.unbind(dim=1)][-1]
        # what is timed is a step in mid-episode; what is checked, the last of a full window
        return peers.Calls(lambda: acting.act(x[:, -1]), lambda: told, lambda _: [told])

    def answer() -> list[Tensor]:
        with torch.no_grad():
            return [deepcopy(model).double()(x.double())[0][:, -1]]

    return check(Entrant(name, load, answer))


def _checked_update(name: str, build: Callable[[], nn.Module], batch_size: int) -> Checked:
    batch, made = _steps(batch_size), []

    def load() -> peers.Calls:
        torch.manual_seed(0)
        model = build()
        checked = deepcopy(model).eval()
        made.append(deepcopy(checked))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        model.train()

        def update() -> Any:
            optimizer.zero_grad(set_to_none=True)
            action_error(model(batch.inputs)[0], batch).backward()
            optimizer.step()

        def read(told: list[Tensor] | None) -> list[Tensor]:
            # an update returns nothing; what it starts from is told instead
            return _answers(checked, batch) if told is None else told

        return peers.Calls(lambda: _answers(checked, batch)[:1], update, read)

    def answer() -> list[Tensor]:
        wide = Batch(batch.inputs.double(), batch.targets.double(), batch.mask)
        return _answers(made[0].double(), wide)

    return check(Entrant(name, load, answer, note=_OWN))


def _answers(model: nn.Module, batch: Batch) -> list[Tensor]:
    """The actions, and the loss's gradients by every parameter that has one.

    The gradients are those with GELU where a model has ReLU. Of six million units one stands so
    near ReLU's kink that float32 and float64 differ about its side, which alone moves a gradient by
    2.5e-4; whatever else may be wrong shows with either.
    """
    told, _ = model(batch.inputs)
    smooth = deepcopy(model)
    for part in list(smooth.modules()):
        for name, child in part.named_children():
            if isinstance(child, nn.ReLU):
                setattr(part, name, nn.GELU())
    loss = (smooth(batch.inputs)[0] - batch.targets).square().mean()
    grads = torch.autograd.grad(loss, list(smooth.parameters()), allow_unused=True)
    return [told.detach(), *(grad for grad in grads if grad is not None)]
