"""How much memory does a training step of a layer take? Each in a fresh process."""

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from minrnn.bench import layer, peers
from minrnn.bench.compare import Row, Table
from minrnn.bench.measure import Turn, summarize

SHAPES = layer.SHAPES
QUICK_SHAPES = ((8, 256, 64),)
# several processes each: the peak depends a little on how threads meet
REPEATS, QUICK_REPEATS = 3, 1
_SCRIPT = "from minrnn.bench import memory; memory.report_peak({name!r}, {shape!r}, {threads})"
_WARM = (2, 4, 8)


def measured(quick: bool = False) -> Iterator[Table]:
    """Tables of the peak resident memory of a training step, less what was resident before.

    Args:
        quick: one small shape, one process each.
    """
    for family, name in layer.FAMILIES.items():
        chosen = [one for one in peers.LAYERS if one.family == family and not one.loop]
        for shape in QUICK_SHAPES if quick else SHAPES:
            rows = _rows(chosen, shape, QUICK_REPEATS if quick else REPEATS)
            yield Table(f"{name}: peak memory of a training step", shape, "MB", rows)


def _rows(layers: list[peers.Layer], shape: tuple[int, int, int], repeats: int) -> tuple[Row, ...]:
    x, dh = layer.inputs(shape)
    rows: list[Row] = []
    for one in layers:
        checked = layer.checked_layer(one, x, dh)
        if checked.calls is None:
            rows.append(Row(one.name, error=checked.error, note=checked.note))
            continue
        try:
            peaks = summarize([Turn(_peak(one.name, shape)) for _ in range(repeats)])
        except OSError as error:
            rows.append(Row(one.name, error=checked.error, note=f"failed: {error}"))
            continue
        ours = peaks.median if not rows else rows[0].value
        ratio = peaks.median / ours if ours else None
        row = Row(one.name, value=peaks.median, low=peaks.low, high=peaks.high, rounds=repeats)
        rows.append(replace(row, ratio=ratio, error=checked.error))
    return tuple(rows)


def _peak(name: str, shape: tuple[int, int, int]) -> float:
    """Megabytes, from a process of its own."""
    return told(_SCRIPT.format(name=name, shape=shape, threads=torch.get_num_threads()))


def told(script: str) -> Any:
    """What a process of its own prints last, as JSON: a number, or several.

    Raises:
        OSError: that process failed; the last line of what it said.
    """
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    if ended.returncode:
        raise OSError((ended.stderr.strip().splitlines() or ["it said nothing"])[-1])
    return json.loads(ended.stdout.splitlines()[-1])


def report_peak(name: str, shape: tuple[int, int, int], threads: int) -> None:
    """`report_peak_of` the layer of that name."""
    [one] = [one for one in peers.LAYERS if one.name == name]
    report_peak_of(one.build, shape, threads)


def report_peak_of(
    build: Callable[[int], peers.Built], shape: tuple[int, int, int], threads: int
) -> None:
    """Print the megabytes that one training step of a layer takes; run in a fresh process.

    A step is forward, backward with the gradient of the input, and an update by plain SGD. A tiny
    step goes first: what the first use of a library takes once is no part of it.
    """
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    _step(build(_WARM[2]), _WARM)
    built = build(shape[2])
    x, dh = layer.inputs(shape)
    x.requires_grad_()
    before = resident(reset=True)
    _step(built, shape, x, dh)
    print(json.dumps((resident(peak=True) - before) / 1e6))


def _step(
    built: peers.Built,
    shape: tuple[int, int, int],
    x: torch.Tensor | None = None,
    dh: torch.Tensor | None = None,
) -> None:
    if x is None or dh is None:
        x, dh = torch.ones(shape, requires_grad=True), torch.ones(shape)
    optimizer = torch.optim.SGD(built.module.parameters(), lr=1e-3)
    built.run(built.module, x).backward(dh)
    optimizer.step()


def resident(peak: bool = False, reset: bool = False) -> int:
    """Bytes resident now, or the most since the last `reset`; Linux only.

    Raises:
        OSError: the system does not tell.
    """
    if reset:
        # 5 sets the peak back to what is resident now
        Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text()
    [found] = re.findall(rf"Vm{'HWM' if peak else 'RSS'}:\s+(\d+) kB", status)
    return int(found) * 1024
