"""How many bytes do the GPU's kernels move? Counted in Triton's interpreter, load by load."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from minrnn.bench.gpu_compiled import DTYPES, Case, launch_of
from minrnn.bench.measure import BOTH_BYTES, FORWARD_BYTES
from minrnn.ops.gpu import kernels
from minrnn.ops.gpu.kernels import Device, Launch

# (rows, steps, blocks of channels): two programs whose steps are enough that h0 and h_T, which
# count once for a row, are about a hundredth; and sixteen chunks of as many
STEPS_SHAPE, CHUNKS_SHAPE = (1, 128, 2), (1, 2048, 1)
_WARP = Device(1, 32)
_SCRIPT = "from minrnn.bench import gpu_counted; gpu_counted.report({dtypes!r})"


@dataclass
class Count:
    """Bytes that a kernel asked the memory for, masked elements left out."""

    elements: int
    """B * T * D"""
    loaded: int = 0
    stored: int = 0

    @property
    def per_element(self) -> float:
        """Bytes of both."""
        return (self.loaded + self.stored) / self.elements


def least(case: Case) -> float:
    """Bytes of an element that have to move: what `bench scan` charges, in the case's dtype."""
    forward, both = FORWARD_BYTES[case.name], BOTH_BYTES[case.name]
    return (both - forward if case.is_backward else forward) * DTYPES[case.dtype].itemsize / 4


def counted(dtypes: Sequence[str]) -> dict[Case, Count]:
    """The bytes of every kernel, by a process of its own, in which Triton interprets.

    Raises:
        OSError: that process failed; the last line of what it said.
    """
    command = [sys.executable, "-c", _SCRIPT.format(dtypes=tuple(dtypes))]
    # read when triton is first imported
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    ended = subprocess.run(command, capture_output=True, text=True, env=environment)
    if ended.returncode:
        raise OSError((ended.stderr.strip().splitlines() or ["it said nothing"])[-1])
    found = json.loads(ended.stdout.splitlines()[-1])
    return {Case(*case): Count(**count) for case, count in found}


def report(dtypes: Sequence[str]) -> None:
    """Run every kernel and print its counts; in a process that interprets."""
    from minrnn.bench.gpu_compiled import cases

    print(json.dumps([(case, asdict(_count(case))) for case in cases(tuple(dtypes))]))


def _count(case: Case) -> Count:
    B, T, blocks = STEPS_SHAPE if case.plan == "steps" else CHUNKS_SHAPE
    launch = launch_of(case, (B, T, blocks * _WARP.warp * kernels.EACH), "cpu", _WARP)
    assert launch.plan.programs > 1
    count = Count(B * T * blocks * launch.plan.BLOCK)
    _watch(launch, count)
    return count


def _watch(launch: Launch, count: Count) -> None:
    """Run a launch, and count."""
    from triton.runtime.interpreter import InterpreterBuilder

    builder: Any = InterpreterBuilder
    load, store = builder.create_masked_load, builder.create_masked_store

    def watched_load(self: Any, ptrs: Any, mask: Any, *rest: Any) -> Any:
        words = load(self, ptrs, mask, *rest)
        count.loaded += int(mask.data.sum()) * words.data.itemsize
        return words

    def watched_store(self: Any, ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
        count.stored += int(mask.data.sum()) * value.data.itemsize
        return store(self, ptrs, value, mask, *rest)

    builder.create_masked_load, builder.create_masked_store = watched_load, watched_store
    try:
        launch.run()
    finally:
        builder.create_masked_load, builder.create_masked_store = load, store
