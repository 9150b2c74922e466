"""Batch: the one type between data and loss."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """Inputs of a model, its targets, and which targets count."""

    inputs: Tensor
    """(B, T) tokens, or (B, T, features)."""
    targets: Tensor
    """(B, T) tokens, or (B, T, features)."""
    mask: Tensor
    """(B, T) bool, True where the target counts."""
    cpu_mask: Tensor | None = None
    """`mask` on the CPU, kept by `to`: targets are then counted without waiting for the device."""

    def map(self, function: Callable[[Tensor], Tensor]) -> "Batch":
        """The batch with `function` applied to each of its tensors, e.g. a slice."""
        cpu_mask = None if self.cpu_mask is None else function(self.cpu_mask)
        return Batch(function(self.inputs), function(self.targets), function(self.mask), cpu_mask)

    def rows(self, which: slice) -> "Batch":
        """The rows `which`."""
        return self.map(lambda x: x[which])

    def to(self, device: torch.device) -> "Batch":
        """The same on `device`; from pinned memory without waiting for it."""
        inputs, targets, mask = (
            x.to(device, non_blocking=x.is_pinned()) if x.device.type == "cpu" else x.to(device)
            for x in (self.inputs, self.targets, self.mask)
        )
        return Batch(inputs, targets, mask, None if mask.device.type == "cpu" else self._counted)

    def pinned(self) -> "Batch":
        """The same in pinned memory of the CPU, which `to` copies from without waiting."""
        return self.map(Tensor.pin_memory)

    @property
    def num_targets(self) -> int:
        """How many targets count."""
        return int(self._counted.sum())

    @property
    def places(self) -> Tensor | None:
        """(num_targets,): which of the B * T targets count, in their order; None if all do."""
        counted = self._counted
        if bool(counted.all()):
            return None
        places = counted.flatten().nonzero()[:, 0]
        if places.device == self.mask.device:
            return places
        if self.mask.device.type == "cuda":
            places = places.pin_memory()
        return places.to(self.mask.device, non_blocking=places.is_pinned())

    @property
    def _counted(self) -> Tensor:
        return self.mask if self.cpu_mask is None else self.cpu_mask
