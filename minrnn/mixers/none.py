"""No mixing over time: what is left is a function of each step alone."""

import torch
from torch import Tensor

from minrnn.mixers.contract import Mixer
from minrnn.state import State


class NoMixer(Mixer):
    """Adds nothing, remembers nothing: a baseline that shows what memory is worth."""

    can_split_time = True

    # on the model's device and of its dtype, as the states are
    none: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("none", torch.empty(0), persistent=False)

    def init_state(self, batch_size: int) -> State:
        """A state of no bytes."""
        return State({"none": self.none.new_zeros(batch_size, 0)})

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Zeros like x (B, T, width)."""
        return torch.zeros_like(x), State({"none": x.new_zeros(x.shape[0], 0)})
