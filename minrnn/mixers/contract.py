"""The contract of a mixer, and the causal convolution that several of them begin with."""

from abc import ABC, abstractmethod

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from minrnn import distributed
from minrnn.state import State


class Mixer(nn.Module, ABC):
    """Maps T >= 1 steps to as many, from a state to a state."""

    # whether processes may share the time of a sequence: see `minrnn.distributed.split_time`
    can_split_time = False
    # parameters, or modules of them, that are exempt from weight decay: see
    # `minrnn.launching.exempt`
    no_weight_decay: tuple[str, ...] = ()

    @abstractmethod
    def init_state(self, batch_size: int) -> State:
        """The state before the first step."""

    @abstractmethod
    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Mix x (B, T, width) behind `state`; None stands for that of `init_state`."""


class DepthwiseConv(nn.Module):
    """A causal convolution of each channel by itself.

        y_t = bias + sum_j w_j * x_{t - conv_width + 1 + j}

    Its state is the last conv_width - 1 inputs, zeros before the first step.
    """

    def __init__(self, width: int, conv_width: int) -> None:
        super().__init__()
        conv = nn.Conv1d(width, width, conv_width, groups=width)
        # (width, 1, conv_width), as in nn.Conv1d
        self.weight, self.bias = conv.weight, conv.bias
        # processes that share the time of a sequence: see `minrnn.distributed.split_time`
        self.time_group: dist.ProcessGroup | None = None

    def init_state(self, batch_size: int) -> Tensor:
        """The inputs before the first step: zeros, (batch_size, conv_width - 1, width)."""
        width, _, conv_width = self.weight.shape
        return self.weight.new_zeros(batch_size, conv_width - 1, width)

    def forward(self, x: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Convolve x (B, T, width) behind the inputs `state` (B, conv_width - 1, width)."""
        past = (self.init_state(x.shape[0]) if state is None else state).to(x.dtype)
        last = None
        if self.time_group is not None:
            past, last = distributed.halo(past, x, self.time_group)
        x = torch.cat([past, x], dim=1)
        # (B, T, width) seen as an image (B, width, 1, T) with the channels innermost: so the
        # convolution needs no transposed copy
        image = x.transpose(1, 2)[:, :, None]
        # squeezed first: its gradient then has the strides of the weight itself, as processes that
        # share gradients want it
        weight = self.weight.squeeze(1)[:, None, None]
        image = F.conv2d(image, weight, self.bias, groups=self.weight.shape[0])
        if last is None:
            # a copy: a view would keep all of x alive for its last steps
            last = x[:, x.shape[1] - past.shape[1] :].clone()
        return image[:, :, 0].transpose(1, 2), last


def state_dtype(weight: Tensor) -> torch.dtype:
    """What a recurrent state is kept in: float32, or float64 beside weights of float64."""
    return torch.float64 if weight.dtype == torch.float64 else torch.float32
