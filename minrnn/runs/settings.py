"""Settings that cannot work, found before anything is written."""

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import nn

from minrnn import distributed, launching, ranks
from minrnn.data.batch import Batch
from minrnn.ranks import Ranks
from minrnn.train_config import TrainConfig

_C = TypeVar("_C")


def check_model(
    kind: Callable[[_C], nn.Module], config: _C, train: TrainConfig, context: int
) -> None:
    """Check that the model can be built, and that the processes can share its training.

    Args:
        kind: the class of the model.
        config: of the model.
        train: how it is trained.
        context: steps of a window.

    Raises:
        ValueError: it cannot be; the message names the setting.
    """
    # without memory for the weights
    with torch.device("meta"):
        model = kind(config)
    num_data, num_time = ranks.count_data(train.time_ranks), train.time_ranks
    launching.check_batch(train, num_data)
    if num_time > 1:
        distributed.check_time_split(model)
        window = torch.empty(1, context, device="meta")
        shared = Ranks(num_data=num_data, num_time=num_time)
        shared.part(Batch(window, window, window), train.chunk)
