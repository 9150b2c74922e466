"""Which parameters are decayed: matrices, but for those that their authors exempt."""

import copy

import pytest
import torch
import torch.distributed as dist
from test_mixers import MIXERS
from torch import nn
from torch.distributed.fsdp import fully_shard

from minrnn import MinGRU, MinLSTM
from minrnn.launching import exempt, optimizer_of
from minrnn.models import LanguageModel, ModelConfig
from minrnn.train_config import TrainConfig

# the names of exempt parameters that are no vectors
EXEMPT = {
    "mamba": {"inner.A_log"},
    "mamba-s4d": {"inner.log_decay", "inner.frequency", "inner.C"},
    "mamba-hyena": {"inner.hidden.0.weight", "inner.hidden.1.weight", "inner.filter.weight"},
    "h3": {"inner.log_decay", "inner.frequency", "inner.C"},
    "h3-s6": {"inner.A_log"},
    "hyena": {"inner.hidden.0.weight", "inner.hidden.1.weight", "inner.filter.weight"},
    "s4d": {"inner.log_decay", "inner.frequency", "inner.C"},
    "s6": {"inner.A_log"},
    "aaren": {"query"},
}
ALL = ("mingru", "minlstm", "gru", "lstm", "attention", "none", *EXEMPT)


def _model(mixer: str) -> LanguageModel:
    return LanguageModel(ModelConfig(5, width=8, num_layers=2, mixer=mixer, num_heads=2))


def _kept(model: nn.Module) -> set[str]:
    """The names of what is not decayed and no vector."""
    groups = optimizer_of(model, TrainConfig()).param_groups
    kept = {id(p) for group in groups if not group["weight_decay"] for p in group["params"]}
    every = [p for group in groups for p in group["params"]]
    assert len(every) == len(set(map(id, every))) == len(list(model.parameters()))
    assert all(id(p) in kept for p in model.parameters() if p.dim() < 2)
    return {name for name, p in model.named_parameters() if id(p) in kept and p.dim() > 1}


@pytest.mark.parametrize("mixer", ALL)
def test_what_the_authors_of_a_mixer_exempt_is_not_decayed(mixer) -> None:
    wanted = EXEMPT.get(mixer, set())
    model = _model(mixer)
    names = {f"blocks.{n}.mixer.{name}" for n in range(2) for name in wanted}
    assert _kept(model) == names
    # a copy, and what torch.compile and DDP make of it
    assert _kept(copy.deepcopy(model)) == names
    assert _kept(torch.compile(model, backend="eager")) == {f"_orig_mod.{name}" for name in names}
    assert _kept(nn.DataParallel(model)) == {f"module.{name}" for name in names}


def test_every_mixer_says_what_is_exempt() -> None:
    """A name that is listed is one of a parameter, or of a module with some."""
    for build in MIXERS.values():
        mixer = build()
        for module in mixer.modules():
            own = [name for name, _ in module.named_parameters()]
            for one in getattr(module, "no_weight_decay", ()):
                assert any(name == one or name.startswith(f"{one}.") for name in own), one


@pytest.mark.parametrize("layer", [MinGRU, MinLSTM])
def test_a_learnt_first_state_is_not_decayed(layer) -> None:
    stack = layer(4, 6, num_layers=2, bidirectional=True, learn_h0=True)
    assert _kept(nn.Sequential(stack)) == {"0.h_0"}
    assert "h_0" not in exempt(layer(4, 6))


class _Own(nn.Module):
    """A module of a user, with each way to say it."""

    no_weight_decay = ("table",)

    def __init__(self) -> None:
        super().__init__()
        for name in ("matrix", "table", "marked"):
            setattr(self, name, nn.Parameter(torch.randn(3, 4)))
        self.marked._no_weight_decay = True
        self.norm = nn.LayerNorm((3, 4))
        self.inner = nn.Linear(4, 4)


class _Timm(_Own):
    def no_weight_decay(self) -> set[str]:
        return {"table", "inner.weight"}


def test_a_module_of_a_user_can_say_so_too() -> None:
    assert _kept(_Own()) == {"table", "marked", "norm.weight", "norm.bias"}
    assert _kept(_Timm()) == {"table", "marked", "norm.weight", "norm.bias", "inner.weight"}
    one = _Own()
    one.no_weight_decay = "matrix"
    assert _kept(nn.ModuleList([one])) == {
        f"0.{name}" for name in ("matrix", "marked", "norm.weight", "norm.bias")
    }


def test_sharded_and_tied_parameters_stay_exempt() -> None:
    tied = nn.ModuleDict({"a": nn.Linear(4, 4), "b": _Own()})
    tied["b"].table = tied["a"].weight
    assert "a.weight" in _kept(tied)
    model = _model("mamba")
    names, store = exempt(model), dist.HashStore()
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        fully_shard(model.blocks[0])
        fully_shard(model)
        assert exempt(model) == names
    finally:
        dist.destroy_process_group()


def test_frozen_parameters_and_adapters() -> None:
    """Added matrices are decayed as others are; the frozen ones are never stepped."""
    model = _model("hyena")
    mixer = model.blocks[0].mixer
    mixer.out.register_parameter("lora_A", nn.Parameter(torch.randn(2, 8)))
    mixer.requires_grad_(False)
    mixer.out.lora_A.requires_grad_(True)
    assert not any("lora_A" in name for name in _kept(model))


@pytest.mark.parametrize("betas", [(0, 0), (0, 0.9), (0.9, 0)])
def test_integers_will_do_for_betas(betas: tuple[float, float]) -> None:
    model = _model("mingru")
    optimizer = optimizer_of(model, TrainConfig(beta1=betas[0], beta2=betas[1], weight_decay=0))
    model(torch.zeros(1, 2, dtype=torch.long))[0].sum().backward()
    optimizer.step()
    assert all(torch.isfinite(p).all() for p in model.parameters())
