"""Batch: the one type between data and loss."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """What a model reads, what it is to answer, and where the answer counts.

    Raises:
        ValueError: the first two axes, (B, T), differ.
        TypeError: the mask is not bool: as integers it would be read as row numbers.
    """

    inputs: Tensor
    """(B, T) symbols, or (B, T, features)."""
    targets: Tensor
    """(B, T) symbols, or (B, T, features)."""
    mask: Tensor
    """(B, T) bool, True where the target counts."""

    def __post_init__(self) -> None:
        if self.mask.dtype != torch.bool:
            raise TypeError(f"`mask` must be bool, got {self.mask.dtype}")
        for name in ("inputs", "targets"):
            shape = tuple(getattr(self, name).shape)
            if shape[:2] != tuple(self.mask.shape):
                raise ValueError(
                    f"`{name}` must begin with the shape (B, T) = {tuple(self.mask.shape)} of "
                    f"`mask`, got {shape}"
                )

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
