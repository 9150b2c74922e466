"""The device that a command is asked to run on."""

import torch


def device_of(name: str) -> torch.device:
    """The device called `name`; auto stands for the accelerator if there is one.

    Raises:
        ValueError: there is no such device here.
    """
    if name == "auto":
        return torch.accelerator.current_accelerator() or torch.device("cpu")
    try:
        # a device that is named but not there fails here, not in the middle of the work
        torch.zeros(1, device=name).item()
        return torch.device(name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"`device` must be one of this machine's, got {name!r}") from error
