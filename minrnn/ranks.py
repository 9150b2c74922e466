"""The processes of a training: which share of a batch each has, and what they tell each other.

`accelerate launch` and `torchrun` start them; there is one where neither does. Processes that
share the time of a sequence are neighbours, those that share a batch stand `num_time` apart.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from minrnn.data.batch import Batch

_T = TypeVar("_T")


@dataclass(frozen=True)
class Ranks:
    """Where this process stands among the others."""

    data: int = 0
    """Which share of a batch it has, ..."""
    num_data: int = 1
    """... and of how many."""
    time: int = 0
    """Which part of the time of its sequences, ..."""
    num_time: int = 1
    """... and of how many."""
    time_group: "dist.ProcessGroup | None" = None
    """The processes that have the other parts; None if there are none."""

    @property
    def count(self) -> int:
        """How many processes there are."""
        return self.num_data * self.num_time

    @property
    def number(self) -> int:
        """Which of them this is."""
        return self.data * self.num_time + self.time

    @property
    def is_first(self) -> bool:
        """Whether it is this process that writes files and says what happens."""
        return self.number == 0

    def rows(self, batch_size: int) -> slice:
        """The share of a batch of `batch_size` rows that this process has."""
        share = batch_size // self.num_data
        return slice(self.data * share, (self.data + 1) * share)

    def part(self, batch: Batch, chunk: int = 0) -> Batch:
        """The steps of `batch` that this process has.

        With `chunk` the sequences are cut into pieces, and each piece is shared by all processes,
        so that each has `chunk` steps of it: whatever of a state crosses from piece to piece is
        then the same on all.

        Raises:
            ValueError: the steps cannot be shared so.
        """
        if self.num_time == 1:
            return batch
        T = batch.inputs.shape[1]
        own = T // self.num_time
        own = min(chunk, own) if chunk else own
        if not own or T % (own * self.num_time):
            raise ValueError(
                f"sequences must be a multiple of {max(1, own) * self.num_time} steps, "
                f"`time_ranks` = {self.num_time}"
                + (f" times `chunk` = {own}" if chunk else "")
                + f", got {T}"
            )

        def steps(x: Tensor) -> Tensor:
            # (B, T, ...) -> (B, pieces, num_time, own, ...) -> (B, pieces * own, ...)
            return x.unflatten(1, (-1, self.num_time, own))[:, :, self.time].flatten(1, 2)

        return batch.map(steps)

    def all_rows(self, x: Tensor) -> Tensor:
        """The rows (B, ...) that the processes have of `x`, one share after the other."""
        if self.count == 1:
            return x
        told = [torch.empty_like(x) for _ in range(self.count)]
        dist.all_gather(told, x.contiguous())
        return torch.cat(told[:: self.num_time])

    def sum_on(self, device: torch.device, value: float) -> float | Tensor:
        """The sum of `value` over all processes; of several a scalar that is not waited for."""
        if self.count == 1:
            return value
        total = torch.full((), value, dtype=torch.float64, device=device)
        dist.all_reduce(total)
        return total

    def sums(self, *values: float) -> list[float]:
        """The sum of each value over all processes."""
        if self.count == 1:
            return list(values)
        told = torch.tensor(values, dtype=torch.float64, device=_state().device)
        dist.all_reduce(told)
        return told.tolist()


def of(num_time: int = 1) -> Ranks:
    """Where this process stands, if `num_time` of them share the time of a sequence.

    Raises:
        ValueError: the processes cannot be put into groups of `num_time`.
    """
    state, num_data = _state(), count_data(num_time)
    if state.num_processes == 1:
        return Ranks()
    shape = (num_data, num_time)
    assert state.device is not None
    mesh = init_device_mesh(state.device.type, shape, mesh_dim_names=("data", "time"))
    data, time = mesh.get_local_rank("data"), mesh.get_local_rank("time")
    return Ranks(data, shape[0], time, num_time, mesh.get_group("time") if num_time > 1 else None)


def count_data(num_time: int = 1) -> int:
    """How many processes, or groups of `num_time` of them, share a batch.

    Raises:
        ValueError: the processes cannot be put into groups of `num_time`.
    """
    count = _state().num_processes
    if count % num_time:
        raise ValueError(
            f"`time_ranks` = {num_time} must divide the number of processes, got {count}; "
            "torchrun or accelerate launch starts several"
        )
    return count // num_time


def on_first(make: Callable[[], _T]) -> _T:
    """What `make` returns on the first process, told to the others.

    Raises:
        SystemExit: elsewhere, if it failed on the first, which raises the error itself.
    """
    state = _state()
    if state.num_processes == 1:
        return make()
    told: list[Any] = [None]
    if not state.is_main_process:
        dist.broadcast_object_list(told, 0)
        if told[0] is None:
            raise SystemExit(2)
        return told[0][0]
    try:
        told = [(make(),)]
        return told[0][0]
    finally:
        dist.broadcast_object_list(told, 0)


def is_lost(error: RuntimeError) -> bool:
    """Whether `error` says that another process no longer answers."""
    return isinstance(error, dist.DistError) or "gloo" in str(error)


def is_first() -> bool:
    """Whether this process is the first, or the only one."""
    return _state().is_main_process


def is_on_cpu() -> bool:
    """Whether to stay on the CPU: there is no GPU, or `accelerate launch --cpu` was the command."""
    return parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()


def _state() -> PartialState:
    if _restarted_beside_old_keys() and not dist.is_initialized():
        _begin_group()
    # without the word Accelerate takes no notice of other processes on a machine without a GPU
    return PartialState(cpu=is_on_cpu())


def _restarted_beside_old_keys() -> bool:
    """Whether torchrun restarted us with the store of its own, where the keys of before remain."""
    shared = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return shared and int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def _begin_group() -> None:
    """Let the processes find each other under keys of this start.

    torch (2.13) would read the addresses of the processes that are gone, and wait for them.
    """
    store = dist.TCPStore(  # pyright: ignore[reportPrivateImportUsage]
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        int(os.environ["WORLD_SIZE"]),
        is_master=False,
    )
    start = os.environ["TORCHELASTIC_RESTART_COUNT"]
    store = dist.PrefixStore(f"minrnn/{start}", store)  # pyright: ignore[reportPrivateImportUsage]
    dist.init_process_group(
        store=store,
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
    )


def step_seed(seed: int, step: int, number: int = 0) -> int:
    """Of all randomness of a step in process `number`.

    Spread over 63 bits, so that neighbouring seeds share no steps, and processes no dropout.
    """
    return (seed * 0x9E3779B97F4A7C15 + step + 1 + number * 0xD1B54A32D192ED03) % (1 << 63)
