"""A model and its optimizer on whatever Accelerate was asked for: device, precision, processes."""

import os
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from torch import nn
from torch.distributed.fsdp import fully_shard

from minrnn import distributed
from minrnn.blocks import Block
from minrnn.mixers.none import NoMixer
from minrnn.ranks import Ranks, is_on_cpu
from minrnn.train_config import TrainConfig


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
        ValueError: the processes cannot share a batch or the time of a sequence, or the model
            cannot be split over time.
    """
    check_batch(config, ranks.num_data)
    accelerator = _accelerator(config, ranks, model, folder)
    if ranks.time_group is not None:
        distributed.split_time(model, ranks.time_group)
    if _shards_on_cpu(accelerator, ranks):
        # Accelerate (1.15) shards on accelerators only, and copies the model here without a word
        for block in model.modules():
            if isinstance(block, Block):
                fully_shard(block)
        fully_shard(model)
        optimizer = optimizer_of(model, config)
        prepared = accelerator.prepare_optimizer(optimizer)
        return Launched(accelerator, model, optimizer, prepared)
    optimizer = optimizer_of(model, config)
    wrapped, prepared = accelerator.prepare(model, optimizer)
    return Launched(accelerator, wrapped, optimizer, prepared)


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


def optimizer_of(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW, which decays matrices and kernels only."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    betas = (config.beta1, config.beta2)
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=betas, fused=True)
