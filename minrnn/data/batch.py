"""Batch: the one type between data and loss."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """Inputs of a model, its targets, and which targets count.

    Raises:
        ValueError: the first two axes, (B, T), differ.
        TypeError: the mask is not bool: as integers it would be read as row numbers.
    """

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
        return self.map(lambda x: x[which])

    def to(self, device: torch.device) -> "Batch":
        """The same on `device`, which is not waited for."""
        inputs, targets, mask = (_moved(x, device) for x in (self.inputs, self.targets, self.mask))
        counted = self._counted
        is_needed = mask.device.type != "cpu" and counted.device.type == "cpu"
        return Batch(inputs, targets, mask, counted if is_needed else None)

    def pinned(self) -> "Batch":
        """The same in pinned memory of the CPU, from which `to` has less to do."""
        return self.map(Tensor.pin_memory)

    @property
    def num_targets(self) -> int:
        """How many targets count."""
        counted = self._counted
        # by numpy: no operator of torch runs for it
        on_cpu = counted.device.type == "cpu"
        return int(np.count_nonzero(counted.numpy())) if on_cpu else int(counted.sum())

    @property
    def places(self) -> Tensor | None:
        """(num_targets,): which of the B * T targets count, in their order; None if all do."""
        counted = self._counted
        if self.num_targets == counted.numel():
            return None
        if counted.device.type != "cpu":
            return counted.flatten().nonzero()[:, 0]
        return _moved(torch.from_numpy(np.flatnonzero(counted.numpy())), self.mask.device)

    @property
    def _counted(self) -> Tensor:
        return self.mask if self.cpu_mask is None else self.cpu_mask


def _moved(x: Tensor, device: torch.device) -> Tensor:
    if x.device.type == "cpu" and device.type == "cuda":
        # from other memory a copy waits for all that the device has to do
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)
