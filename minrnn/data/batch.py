"""Batch: the one type between data and loss."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """What a model reads, what it is to answer, and where the answer counts."""

    inputs: Tensor
    """(B, T) symbols, or (B, T, features)."""
    targets: Tensor
    """(B, T) symbols, or (B, T, features)."""
    mask: Tensor
    """(B, T) bool, True where the target counts."""

    def rows(self, which: slice) -> "Batch":
        """The rows `which`."""
        return Batch(self.inputs[which], self.targets[which], self.mask[which])

    def to(self, device: torch.device) -> "Batch":
        """The same on `device`."""
        return Batch(self.inputs.to(device), self.targets.to(device), self.mask.to(device))

    @property
    def num_targets(self) -> int:
        """How many targets count."""
        return int(self.mask.sum())
