"""What can be known of the GPU's kernels without a GPU: compiled, counted, predicted.

Nothing here is measured. Compilers report on the kernels as a launch compiles them, Triton's
interpreter counts their bytes, and both together bound the time on GPUs of known bandwidth.
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from minrnn.bench import report
from minrnn.files import write_atomically
from minrnn.ops import gpu

if TYPE_CHECKING:
    from minrnn.bench.gpu_compiled import Case, Compiled
    from minrnn.bench.gpu_counted import Count

NAME = "gpu-static"
SHAPES = ((64, 4096, 1024), (8, 4096, 512), (1, 65536, 256))
# seconds, assumed: a load that misses all caches, and one that the second-level cache answers
MEMORY_LATENCY, CACHE_LATENCY = 600e-9, 300e-9
# bytes over the least, aimed at; those of chunks with their totals
MOST = {"steps": 1.05, "chunks": 1.85}


class GPU(NamedTuple):
    """What is predicted for: data sheets, the clock from their float32 operations per second."""

    name: str
    target: str
    multiprocessors: int
    bandwidth: float
    """bytes each second"""
    clock: float
    """cycles each second"""


GPUS = (GPU("H100", "sm_90", 132, 3.35e12, 1.98e9), GPU("T4", "sm_75", 40, 320e9, 1.59e9))


@dataclass(frozen=True)
class Prediction:
    """The least seconds that a call can take, for each of three reasons; all of them predicted."""

    gpu: str
    shape: tuple[int, int, int]
    name: str
    dtype: str
    plan: str
    programs: int
    bandwidth: float
    """the counted bytes over the bandwidth"""
    latency: float
    """by the loads under way at a time, and by the totals that a chunk goes through"""
    issue: float
    """by one instruction each cycle in each part of a multiprocessor"""
    other: float
    """of the plan that was not chosen, the largest of the three"""

    @property
    def seconds(self) -> float:
        """The largest."""
        return max(self.bandwidth, self.latency, self.issue)


def measure(quick: bool = False, out: Path | None = None) -> int:
    """Compile the GPU's kernels, count their bytes and predict their time, without a GPU.

    Args:
        quick: sm_90 and float32 only.
        out: the folder for bench-gpu-static.json; None only prints.
    """
    if not gpu.is_installed():
        raise ModuleNotFoundError("triton is missing: pip install 'minrnn[gpu]'")
    if os.environ.get("TRITON_INTERPRET", "0") != "0":
        raise ValueError("TRITON_INTERPRET is set: an interpreted kernel is not compiled; unset it")
    facts = report.describe(NAME, quick)
    print("\n".join([*report.heading(facts), "", "compiled, counted, predicted: not measured"]))
    compiled, counted = _found(quick)
    predicted = list(predictions(compiled, counted))
    print("\n" + "\n".join(_lines(_prediction_cells(predicted))))
    missed = misses(compiled, counted)
    print("\n" + "\n".join(missed or ["every aim is met"]))
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        content = facts | {
            "compiled": [_plain(one) for one in compiled],
            "counted": [{**case._asdict(), **asdict(count)} for case, count in counted.items()],
            "predicted": [asdict(one) for one in predicted],
            "missed": missed,
        }
        path = out / f"bench-{NAME}.json"
        write_atomically(path, (json.dumps(content, indent=1, allow_nan=False) + "\n").encode())
        print(f"\n{path}")
    return 1 if missed else 0


def _found(quick: bool) -> "tuple[list[Compiled], dict[Case, Count]]":
    # triton is an extra: only a run of this bench may need it
    from minrnn.bench import gpu_compiled, gpu_counted

    dtypes = tuple(gpu_compiled.DTYPES)[: 1 if quick else None]
    targets = ("sm_90",) if quick else tuple(gpu_compiled.TARGETS)
    compiled = []
    for target in targets:
        here = [gpu_compiled.compiled(case, target) for case in gpu_compiled.cases(dtypes)]
        print("\n" + "\n".join(_lines(_compiled_cells(here))), flush=True)
        compiled += here
    counted = gpu_counted.counted(dtypes)
    print("\n" + "\n".join(_lines(_counted_cells(counted))), flush=True)
    return compiled, counted


def misses(compiled: "Sequence[Compiled]", counted: "Mapping[Case, Count]") -> list[str]:
    """The aims that are not met, a line each."""
    from minrnn.bench.gpu_counted import least

    found = []
    for one in compiled:
        where = f"{one.case.title}, {one.case.plan}, {one.case.dtype}, {one.target}"
        if one.spills or one.stack or one.count("LDL|STL|scratch_"):
            found.append(f"{where}: registers in memory")
        if one.narrow:
            found.append(f"{where}: loads of less than four elements")
    for case, moved in _moved(counted).items():
        ratio = moved / least(case)
        if ratio > MOST[case.plan]:
            found.append(f"{case.title}, {case.plan}, {case.dtype}: {ratio:.2f} times the bytes")
    return found


def _kernels_of(case: "Case") -> "tuple[Case, ...]":
    """Those that a plan runs."""
    return (case._replace(plan="totals"), case) if case.plan == "chunks" else (case,)


def _moved(counted: "Mapping[Case, Count]") -> "dict[Case, float]":
    """Bytes of an element for each plan, all of its kernels together."""
    plans = [case for case in counted if case.plan in MOST]
    return {case: sum(counted[one].per_element for one in _kernels_of(case)) for case in plans}


def predictions(
    compiled: "Sequence[Compiled]", counted: "Mapping[Case, Count]"
) -> Iterator[Prediction]:
    """For every GPU whose code is there, shape, kernel and dtype, with the plan of a call."""
    from minrnn.bench.gpu_compiled import DTYPES
    from minrnn.ops.gpu.kernels import Device, plan_of

    by_case = {(one.target, one.case): one for one in compiled}

    def limits(on: GPU, shape: tuple[int, int, int], case: "Case") -> tuple[float, float, float]:
        """Of all kernels of a plan, one after the other."""
        each = [_limits(on, shape, by_case[on.target, k], counted[k]) for k in _kernels_of(case)]
        bandwidth, latency, issue = map(sum, zip(*each, strict=True))
        return bandwidth, latency, issue

    for on in GPUS:
        for shape in SHAPES:
            for case in _moved(counted):
                device = Device(on.multiprocessors, 32)
                chosen = plan_of(*shape, DTYPES[case.dtype], False, device)
                if case.plan != ("steps" if chosen.chunks == 1 else "chunks"):
                    continue
                if (on.target, case) not in by_case:
                    continue
                other = case._replace(plan="chunks" if chosen.chunks == 1 else "steps")
                what = (on.name, shape, case.title, case.dtype, case.plan, chosen.programs)
                most = max(limits(on, shape, other))
                yield Prediction(*what, *limits(on, shape, case), other=most)


def _limits(
    on: GPU, shape: tuple[int, int, int], one: "Compiled", count: "Count"
) -> tuple[float, float, float]:
    """Seconds of a kernel by bandwidth, by latency and by issue."""
    from minrnn.bench.gpu_compiled import DTYPES, PARTS
    from minrnn.ops.gpu import kernels, steps

    B, T, D = shape
    device = kernels.Device(0 if one.case.plan == "steps" else on.multiprocessors, 32)
    plan = kernels.plan_of(B, T, D, DTYPES[one.case.dtype], False, device)
    scale = B * T * D / count.elements
    at_once = min(plan.programs, on.multiprocessors * one.programs)
    # Little's law: what is under way at a time, over the latency, is the bandwidth
    step = count.loaded / count.elements * plan.BLOCK
    under_way = (one.shared if one.count("LDGSTS") else step) * at_once
    latency = count.loaded * scale / under_way * MEMORY_LATENCY
    if one.case.plan == "chunks":
        # the last one goes through the totals of all others first
        latency += plan.chunks / steps.TOGETHER.value * CACHE_LATENCY
    each = ceil(plan.programs / (on.multiprocessors * PARTS))
    issue = each * one.issued * plan.chunk_steps / on.clock
    return count.per_element * B * T * D / on.bandwidth, latency, issue


def _plain(one: "Compiled") -> dict[str, Any]:
    plain = asdict(one)
    del plain["text"], plain["form"], plain["case"]
    return {**one.case._asdict(), **plain}


def _compiled_cells(rows: "Sequence[Compiled]") -> list[list[str]]:
    head = ["compiled for " + rows[0].target, "plan", "dtype", "registers", "spills", "stack"]
    head += ["shared", "programs", "occupancy", "four wide", "narrower", "local", "MUFU"]
    head += ["FFMA/FMUL/FADD", "LDS/STS", "issued"]
    found = [head]
    for one in rows:
        sizes = [one.registers, one.spills, one.stack, one.shared]
        kinds = [one.wide, one.narrow, one.count("LDL|STL|scratch_"), one.count("MUFU|v_exp|v_rcp")]
        kinds += [one.count("FFMA|FMUL|FADD|v_(pk_)?(fma|mul|add)_f32|v_fmac_f32")]
        kinds += [one.count(r"LDS\b|LDSM|STS|ds_(read|write)")]
        on_chip = [str(one.programs), f"{one.occupancy:.0%}"] if one.programs else ["", ""]
        what = [one.case.title, one.case.plan, one.case.dtype]
        counts = [*map(str, sizes), *on_chip, *map(str, kinds), str(one.issued or "")]
        found.append([*what, *counts])
    return found


def _counted_cells(rows: "Mapping[Case, Count]") -> list[list[str]]:
    from minrnn.bench.gpu_counted import least

    found = [["bytes of an element, counted", "plan", "dtype", "moved", "least", "ratio"]]
    for case, moved in _moved(rows).items():
        must = least(case)
        words = [f"{moved:.2f}", f"{must:.0f}", f"{moved / must:.3f}"]
        found.append([case.title, case.plan, case.dtype, *words])
    return found


def _prediction_cells(rows: Sequence[Prediction]) -> list[list[str]]:
    head = ["predicted, not measured", "(B, T, D)", "kernel", "dtype", "plan", "programs"]
    head += ["bandwidth ms", "latency ms", "issue ms", "largest ms", "other plan ms"]
    found = [head]
    for one in rows:
        times = [one.bandwidth, one.latency, one.issue, one.seconds, one.other]
        what = [one.gpu, str(one.shape), one.name, one.dtype, one.plan, f"{one.programs:,}"]
        found.append([*what, *(f"{1e3 * time:.3f}" for time in times)])
    return found


def _lines(rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns of one width each, the first to the left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            word.rjust(width) if n else word.ljust(width)
            for n, (word, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
