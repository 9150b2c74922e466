"""How near are the operators to the bandwidth of the memory, and how far are the others?"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache, partial

import torch
from torch import Tensor

from minrnn.bench import gpu_peers, measure, peers, truth
from minrnn.bench.compare import (
    HERE,
    ONE_THREAD,
    STREAM,
    Checked,
    Entrant,
    Table,
    check,
    timed_rows,
)
from minrnn.bench.measure import BOTH_BYTES, FORWARD_BYTES, Call

# (B, T, D): wide, long, longer; and so few channels that only time is left to share out. With pages
# that the allocator keeps, so that it is the operator that is measured.
SHAPES = ((16, 256, 768), (2, 4096, 256), (1, 16384, 128), (1, 1 << 22, 1), (1, 1 << 20, 8))
# From 32 MiB on glibc takes fresh pages for an output: ours beside one addition of that size.
FRESH_SHAPES = ((64, 256, 768), (8, 4096, 256), (1, 65536, 128))
QUICK_SHAPES = ((2, 1024, 256), (1, 1 << 14, 8))
# a GPU: many rows, which fill it; few, and one; and few channels. Larger than its cache.
GPU_SHAPES = ((128, 1024, 512), (8, 4096, 512), (1, 65536, 256), (1, 1 << 20, 8))
RECURRENCES = ("scan", "mingru", "minlstm")
ADDITION = "torch.add, new output"
SECONDS, FRESH_SECONDS, QUICK_SECONDS = 0.3, 0.5, 0.05


def measured(quick: bool = False, device: torch.device = measure.CPU) -> Iterator[Table]:
    """Tables of `scan`, `mingru`, `minlstm`: forward, and forward with backward, at each shape.

    Those of `FRESH_SHAPES` come first: once the allocator keeps its pages, it has them for all.

    Args:
        quick: fewer and smaller shapes, fewer rounds.
        device: where; a GPU's allocator keeps its pages, and is told nothing.
    """
    on_cpu = device.type == "cpu"
    returned = measure.tell_allocator(keep=False) if on_cpu else ""
    for shape in FRESH_SHAPES if on_cpu and not quick else ():
        for recurrence in RECURRENCES:
            for table in _tables(recurrence, shape, FRESH_SECONDS, device, others=False):
                yield replace(table, memory=returned)
    kept = measure.tell_allocator(keep=True) if on_cpu else ""
    seconds = QUICK_SECONDS if quick else SECONDS
    for shape in QUICK_SHAPES if quick else SHAPES if on_cpu else GPU_SHAPES:
        for recurrence in RECURRENCES:
            for table in _tables(recurrence, shape, seconds, device, others=True):
                yield replace(table, memory=kept)


def _tables(
    recurrence: str,
    shape: tuple[int, int, int],
    seconds: float,
    device: torch.device,
    others: bool,
) -> Iterator[Table]:
    *gates, dh = truth.inputs(recurrence, shape, device)
    answer = cache(lambda: truth.answer(recurrence, gates, dh))
    checked = {}
    scans = (peers if device.type == "cpu" else gpu_peers).scans_of(recurrence)
    for scan in scans if others else scans[:1]:
        checked[scan.name] = _check(scan, gates, dh, answer)
    answer.cache_clear()
    ours = checked[peers.OURS].calls
    for pass_, each in (("forward", FORWARD_BYTES), ("forward + backward", BOTH_BYTES)):
        forward = pass_ == "forward"

        def pick(calls: peers.Calls, threads: int = 0, forward: bool = forward) -> Call:
            return Call(calls.forward if forward else calls.both, threads)

        calls, num_bytes = yardsticks(gates[0], addition=forward)
        if ours is not None and device.type == "cpu":
            calls[peers.OURS + ONE_THREAD] = pick(ours, 1)
            calls[HERE + ONE_THREAD] = Call(calls[HERE].run, 1)
        moved = {name: each[recurrence] * gates[0].numel() for name in checked}
        moved |= num_bytes | {peers.OURS + ONE_THREAD: moved[peers.OURS]}
        rows = timed_rows(checked, pick, calls, moved, seconds, device)
        yield Table(f"{recurrence} {pass_}", shape, "ms", rows)


def _check(
    scan: peers.Scan, gates: list[Tensor], dh: Tensor, answer: Callable[[], list[Tensor]]
) -> Checked:
    T = dh.shape[1]
    if scan.max_steps < T:
        return Checked(None, None, f"not tried beyond T = {scan.max_steps:,}")
    load64 = None
    if scan.log_space:
        load64 = partial(_load, scan, [x.double() for x in gates], dh.double())
    return check(Entrant(scan.name, partial(_load, scan, gates, dh), answer, load64))


def _load(scan: peers.Scan, gates: list[Tensor], dh: Tensor) -> peers.Calls:
    return scan.bind(scan.load(), gates, dh)


def yardsticks(like: Tensor, addition: bool) -> tuple[dict[str, Call], dict[str, int]]:
    """The triads, and the plainest operation that allocates its output, with their bytes."""
    stream, stream_bytes = measure.large_triad(like.device)
    here, here_bytes = measure.triad(like.numel(), like.device)
    calls = {STREAM: Call(stream), HERE: Call(here)}
    num_bytes = {STREAM: stream_bytes, HERE: here_bytes, HERE + ONE_THREAD: here_bytes}
    if addition:
        x, y = torch.ones_like(like), torch.ones_like(like)
        calls[ADDITION] = Call(lambda: torch.add(x, y))
        num_bytes[ADDITION] = FORWARD_BYTES["add"] * like.numel()
    return calls, num_bytes
