"""Batch: the one type between data and loss."""

from dataclasses import dataclass

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

    @property
    def num_targets(self) -> int:
        """How many targets count."""
        return int(self.mask.sum())
