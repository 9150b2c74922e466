"""A model and its optimizer on whatever Accelerate was asked for: device, precision, processes."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch import nn
from torch.distributed.fsdp import fully_shard

from minrnn import distributed
from minrnn.blocks import Block
from minrnn.mixers.none import NoMixer
from minrnn.ranks import Ranks, is_on_cpu
from minrnn.train_config import TrainConfig

# what Accelerate writes on a model that it prepares
_MARKS = ("forward", "_original_forward", "_is_accelerate_prepared")
# their weights scale features, whatever their shape
_NORMS = (
    nn.LayerNorm,
    nn.RMSNorm,
    nn.GroupNorm,
    nn.modules.batchnorm._NormBase,
)


class Launched(NamedTuple):
    """What a training steps."""

    accelerator: Accelerator
    model: nn.Module
    """Wrapped by DistributedDataParallel, or with its parameters sharded, if asked for."""
    optimizer: torch.optim.AdamW
    prepared: Any
    """The optimizer behind Accelerate, which knows of scaled gradients."""


def launch(model: nn.Module, config: TrainConfig, ranks: Ranks, folder: Path) -> Launched:
    """Prepare a model for training.

    Raises:
        ValueError: the processes cannot share a batch or the time of a sequence, the model cannot
            be split over time, or `accelerate launch` asks for another precision than `config`.
    """
    launcher = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if launcher not in ("no", config.precision):
        raise ValueError(
            f"`precision` must be {launcher!r}, as `accelerate launch` has it, got "
            f"{config.precision!r}; launch with --mixed_precision no, or train with "
            f"--precision {launcher}"
        )
    check_batch(config, ranks.num_data)
    accelerator = _accelerator(config, ranks, model, folder)
    if ranks.time_group is not None:
        distributed.split_time(model, ranks.time_group)
    # by name, before sharding makes other parameters of them
    names = exempt(model)
    if _shards_on_cpu(accelerator, ranks):
        # Accelerate (1.15) shards on accelerators only, and copies the model here without a word
        for block in model.modules():
            if isinstance(block, Block):
                fully_shard(block)
        fully_shard(model)
        optimizer = optimizer_of(model, config, names)
        prepared = accelerator.prepare_optimizer(optimizer)
        return Launched(accelerator, model, optimizer, prepared)
    optimizer = optimizer_of(model, config, names)
    wrapped, prepared = accelerator.prepare(model, optimizer)
    return Launched(accelerator, wrapped, optimizer, prepared)


@contextlib.contextmanager
def own_accelerator() -> Iterator[None]:
    """A block with settings of Accelerate of its own; afterwards those of the caller hold again.

    Accelerate has one state for the whole process. A caller's `Accelerator` refers to the state
    that it was made with, which stays as it is.
    """
    own = (AcceleratorState, GradientState)
    kept = [kind._shared_state for kind in own]
    # the processes of the block are those of the caller
    processes = dict(PartialState._shared_state)
    for kind in own:
        kind._shared_state = {}
    try:
        yield
    finally:
        for kind, state in zip(own, kept, strict=True):
            kind._shared_state = state
        PartialState._shared_state.clear()
        PartialState._shared_state.update(processes)


@contextlib.contextmanager
def unprepared(model: nn.Module) -> Iterator[None]:
    """A block before and after which `model` runs as its class says, or as its caller prepared it.

    Accelerate puts autocast around `forward` for good, and takes no notice of a model that it
    prepared before. A model whose time is split would take parts of sequences from then on.
    """
    own = vars(model)
    groups = [(m, m.time_group) for m in model.modules() if "time_group" in vars(m)]
    before = {name: own[name] for name in _MARKS if name in own}
    own.pop("_is_accelerate_prepared", None)
    try:
        yield
    finally:
        for name in _MARKS:
            own.pop(name, None)
        own.update(before)
        for module, group in groups:
            module.time_group = group


def check_batch(config: TrainConfig, num_data: int) -> None:
    """Check that `num_data` processes can share a batch.

    Raises:
        ValueError: they cannot.
    """
    if config.batch_size % (config.accumulation * num_data):
        raise ValueError(
            f"`batch_size` = {config.batch_size} must be a multiple of `accumulation` = "
            f"{config.accumulation} times the {num_data} processes that share a batch"
        )


def _accelerator(config: TrainConfig, ranks: Ranks, model: nn.Module, folder: Path) -> Accelerator:
    # the norm before a mixer that reads nothing has no gradient
    unused = any(isinstance(part, NoMixer) for part in model.modules())
    accelerator = Accelerator(
        cpu=is_on_cpu(),
        mixed_precision=config.precision,
        log_with="tensorboard",
        project_dir=folder,
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=unused)],
    )
    assert accelerator.num_processes == ranks.count
    if config.precision == "fp16" and accelerator.device.type == "cpu":
        # Accelerate (1.15) trains in float32 then, without a word; torch has what it takes
        accelerator.native_amp = True
        accelerator.scaler = torch.amp.GradScaler("cpu")
    return accelerator


def _shards_on_cpu(accelerator: Accelerator, ranks: Ranks) -> bool:
    asked = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    return asked and ranks.count > 1 and accelerator.device.type == "cpu"


def optimizer_of(
    model: nn.Module, config: TrainConfig, names: frozenset[str] | None = None
) -> torch.optim.AdamW:
    """AdamW, which decays matrices and kernels only, but for those in `names`: `exempt` if None."""
    names = exempt(model) if names is None else names
    named = list(model.named_parameters())
    decayed = [p for name, p in named if p.dim() > 1 and name not in names]
    kept = [p for name, p in named if p.dim() <= 1 or name in names]
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": kept, "weight_decay": 0.0},
    ]
    # torch takes no int, 0 or 1, for them
    betas = (float(config.beta1), float(config.beta2))
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=betas, fused=True)


def exempt(model: nn.Module) -> frozenset[str]:
    """The names of the parameters that are exempt from weight decay, whatever their shape.

    Those are: parameters with the attribute `_no_weight_decay = True`, as Mamba's code marks them;
    what a module lists as `no_weight_decay`, names of its parameters or of modules in it, an
    attribute or a method (timm's); and weights of normalisations. The attribute of a parameter is
    lost when it is copied or sharded, what a module lists is not.

    Example:
        >>> from minrnn.mixers import S6
        >>> sorted(exempt(S6(4, state_size=2)))
        ['A_log', 'D']
    """
    found: set[int] = set()
    for module in model.modules():
        listed: Any = getattr(module, "no_weight_decay", ())
        listed = listed() if callable(listed) else listed
        listed = (listed,) if isinstance(listed, str) else tuple(listed)
        for name, parameter in module.named_parameters(remove_duplicate=False):
            inside = any(name == one or name.startswith(f"{one}.") for one in listed)
            # a norm has no parameters but its own
            if inside or isinstance(module, _NORMS) or getattr(parameter, "_no_weight_decay", 0):
                found.add(id(parameter))
    return frozenset(name for name, p in model.named_parameters() if id(p) in found)
