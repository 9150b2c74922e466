"""The processes of `minrnn bench scale`: a training step, and the rates that make its time."""

import json
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

from minrnn import gradients, launching, ranks
from minrnn.bench.plan import Split
from minrnn.data.batch import Batch
from minrnn.losses import next_symbol
from minrnn.models import LanguageModel, ModelConfig
from minrnn.train_config import TrainConfig

_WARM, _STEPS = 2, 6
_RATE_SECONDS = 0.5


class Told(NamedTuple):
    """What one start of processes found."""

    seconds: float
    """of a step, the median"""
    loss: float
    """of the last step"""
    flops: float
    """of a matrix product in each process, all at once"""
    bandwidth: float
    """bytes each second of an addition in each process, all at once"""
    link: float
    """bytes each second from process to process, adding up as many numbers as parameters"""
    latency: float
    """seconds of a message with next to nothing in it"""


def told(split: Split, model: ModelConfig, batch: int, T: int) -> Told:
    """Start the processes of a split and time their training steps."""
    with tempfile.TemporaryDirectory() as folder:
        spawn(_run, (split, model, batch, T, folder), nprocs=split.count)
        return Told(*json.loads(Path(folder, "told").read_text()))


def _run(rank: int, split: Split, model: ModelConfig, batch: int, T: int, folder: str) -> None:
    torch.set_num_threads(1)
    if split.count > 1:
        _join(rank, split, Path(folder))
    try:
        seconds, loss = _steps(split, model, batch, T, Path(folder))
        rates = _rates(split.count, model, batch * T // split.count)
        if rank == 0:
            Path(folder, "told").write_text(json.dumps([seconds, loss, *rates]))
    finally:
        if split.count > 1:
            dist.destroy_process_group()


def _join(rank: int, split: Split, folder: Path) -> None:
    """Let the processes find each other, told what torchrun and accelerate launch would tell."""
    said: dict[str, object] = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": split.count}
    said |= {"LOCAL_WORLD_SIZE": split.count, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": 1}
    said |= {"ACCELERATE_USE_FSDP": str(split.sharded).lower(), "FSDP_VERSION": 2}
    os.environ.update({name: str(x) for name, x in said.items()})
    path = str(folder / "store")
    store = dist.FileStore(path, split.count)  # pyright: ignore[reportPrivateImportUsage]
    most = timedelta(seconds=120)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=split.count, timeout=most)


def _steps(
    split: Split, model: ModelConfig, batch: int, T: int, folder: Path
) -> tuple[float, float]:
    """Seconds of a training step, and the loss of the last."""
    torch.manual_seed(0)
    config = TrainConfig(batch_size=batch, time_ranks=split.time, chunk=split.chunk)
    among = ranks.of(split.time)
    launched = launching.launch(LanguageModel(model), config, among, folder)
    ids = torch.randint(model.vocab_size, (batch, T + 1))[among.rows(batch)]
    mask = torch.ones(len(ids), T, dtype=torch.bool)
    share = among.part(Batch(ids[:, :-1], ids[:, 1:], mask))
    seconds, loss = [], 0.0
    for _ in range(_WARM + _STEPS):
        _together(split.count)
        start = time.perf_counter()
        count = among.sums(share.num_targets)[0] / among.count
        value, _ = gradients.backward(
            launched.model, next_symbol, share, chunk=split.chunk, count=count
        )
        launched.prepared.step()
        launched.prepared.zero_grad()
        loss = among.sums(value.item())[0] / among.count
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[_WARM:]), loss


def _rates(count: int, model: ModelConfig, steps: int) -> tuple[float, float, float, float]:
    """Flops, bytes of memory and of the link, and seconds of a message, as `Told` has them."""
    width, wide = model.width, 4 * model.width
    x, weight, dy = (torch.randn(*n) for n in ((steps, width), (width, wide), (steps, wide)))

    # forward, and backward for both factors
    products = _seconds(count, lambda: (x @ weight, dy @ weight.T, x.T @ dy))
    flops = 6.0 * steps * width * wide / products
    y, z = torch.randn(steps, wide), torch.randn(steps, wide)
    # an output of its own, as the operations of a model have
    bandwidth = 3.0 * y.numel() * y.element_size() / _seconds(count, lambda: y + z)
    if count == 1:
        return flops, bandwidth, 1.0, 0.0
    size = sum(p.numel() for p in LanguageModel(model).parameters())
    sums, little = torch.zeros(size), torch.zeros(8)
    told = [torch.zeros(8) for _ in range(count)]
    num_bytes = 2 * (count - 1) / count * sums.numel() * sums.element_size()
    link = num_bytes / _seconds(count, lambda: dist.all_reduce(sums))
    latency = _seconds(count, lambda: dist.all_gather(told, little)) / (count - 1)
    return flops, bandwidth, link, latency


def _seconds(count: int, call: Callable[[], object]) -> float:
    """Of one `call`, made many times by all processes at once.

    Together they last much longer than the system lets one process run before another: where there
    are more processes than cores, that counts.
    """
    call()
    _together(count)
    start = time.perf_counter()
    call()
    once = torch.tensor([time.perf_counter() - start])
    if count > 1:
        # as many everywhere: some of them wait for each other
        dist.all_reduce(once, dist.ReduceOp.MAX)
    rounds = max(3, math.ceil(_RATE_SECONDS / once.item()))
    start = time.perf_counter()
    for _ in range(rounds):
        call()
    return (time.perf_counter() - start) / rounds


def _together(count: int) -> None:
    if count > 1:
        dist.barrier()
