"""Run a function in several processes that talk over gloo."""

import os
import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def on_ranks(count: int, function: Callable[..., None], *args: Any) -> None:
    """Call `function(*args)` in `count` processes of one group; an error in one is raised here."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_run, (count, folder, function, args), nprocs=count)


def _run(
    rank: int, count: int, folder: str, function: Callable[..., None], args: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    # what torchrun says
    said = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    os.environ.update({name: str(x) for name, x in said.items()})
    os.environ.update({"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"})
    store = dist.FileStore(str(Path(folder, "store")), count)
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=count, timeout=timedelta(seconds=120)
    )
    try:
        function(*args)
    finally:
        dist.destroy_process_group()
