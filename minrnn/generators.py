"""torch's global random number generators: that of the CPU and those of every accelerator."""

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def states() -> list[Tensor]:
    """The state of each generator; `set_states` takes it back."""
    kind, devices = _accelerators()
    found = [torch.get_rng_state()]
    if devices:
        found += [torch.get_device_module(kind).get_rng_state(device) for device in devices]
    return found


def set_states(saved: Sequence[Tensor]) -> None:
    """Continue each generator from a state that `states` returned."""
    kind, devices = _accelerators()
    torch.set_rng_state(saved[0])
    for device, state in zip(devices, saved[1:], strict=False):
        torch.get_device_module(kind).set_rng_state(state, device)


def kept() -> contextlib.AbstractContextManager[Any]:
    """A block after which every generator continues as if the block had drawn nothing.

    Example:
        >>> with kept():
        ...     _ = torch.manual_seed(0)
        ...     inside = torch.rand(1)
        >>> torch.equal(torch.rand(1), inside)
        False
    """
    kind, devices = _accelerators()
    return torch.random.fork_rng(devices=devices, device_type=kind)


def _accelerators() -> tuple[str, list[int]]:
    """Their type, and the numbers of those that may have drawn something."""
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is None:
        return "cuda", []
    module = torch.get_device_module(accelerator)
    # to ask for a generator would start a device that nobody has used yet
    started = getattr(module, "is_initialized", lambda: True)()
    return accelerator.type, list(range(torch.accelerator.device_count())) if started else []
