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
# bytes over the least, aimed at
MOST = {"steps": 1.05, "chunks": 1.4}


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
    """by the loads under way at a time, or by what chunks wait for"""
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
        if one.case.plan == "steps" and one.narrow:
            found.append(f"{where}: loads of less than 16 bytes")
    for case, count in counted.items():
        ratio = count.per_element / least(case)
        if ratio > MOST[case.plan]:
            found.append(f"{case.title}, {case.plan}, {case.dtype}: {ratio:.2f} times the bytes")
    return found


def predictions(
    compiled: "Sequence[Compiled]", counted: "Mapping[Case, Count]"
) -> Iterator[Prediction]:
    """For every GPU whose code is there, shape, kernel and dtype, with the plan of a call."""
    from minrnn.bench.gpu_compiled import DTYPES
    from minrnn.ops.gpu.kernels import Device, plan_of

    by_case = {(one.target, one.case): one for one in compiled}
    for on in GPUS:
        for shape in SHAPES:
            for case, count in counted.items():
                chosen = plan_of(*shape, DTYPES[case.dtype], False, Device(on.multiprocessors, 32))
                if case.plan != ("chunks" if chosen.chunks else "steps"):
                    continue
                if (on.target, case) not in by_case:
                    continue
                limits = _limits(on, shape, by_case[on.target, case], count)
                other = case._replace(plan="steps" if chosen.chunks else "chunks")
                most = max(_limits(on, shape, by_case[on.target, other], counted[other])[1:])
                what = (on.name, shape, case.title, case.dtype, case.plan)
                yield Prediction(*what, *limits, other=most)


def _limits(
    on: GPU, shape: tuple[int, int, int], one: "Compiled", count: "Count"
) -> tuple[int, float, float, float]:
    """Programs, and seconds by bandwidth, by latency and by issue."""
    from minrnn.bench.gpu_compiled import DTYPES, PARTS, PLANS
    from minrnn.ops.gpu import chunks, kernels

    B, T, D = shape
    device = kernels.Device(PLANS[one.case.plan], 32)
    plan = kernels.plan_of(B, T, D, DTYPES[one.case.dtype], False, device)
    scale = B * T * D / count.elements
    at_once = min(plan.programs, on.multiprocessors * one.programs)
    if plan.chunks:
        # each look is a trip to the second-level cache, one after the other
        counted_programs = count.elements / (kernels.STEPS * kernels.NARROW)
        looks = count.looks / counted_programs * CACHE_LATENCY
        turn = MEMORY_LATENCY + looks + one.issued / on.clock
        # a state is told and looked at once for each group
        way = plan.chunks / chunks.GROUP.value * 2 * CACHE_LATENCY
        latency = max(ceil(plan.programs / at_once) * turn, way)
        instructions = one.issued
    else:
        # Little's law: what is under way at a time, over the latency, is the bandwidth
        step = count.loaded / count.elements * plan.BLOCK
        under_way = (one.shared if one.count("LDGSTS") else step) * at_once
        latency = count.loaded * scale / under_way * MEMORY_LATENCY
        instructions = one.issued * T
    each = ceil(plan.programs * one.warps / (on.multiprocessors * PARTS))
    bandwidth = count.per_element * B * T * D / on.bandwidth
    return plan.programs, bandwidth, latency, each * instructions / on.clock


def _plain(one: "Compiled") -> dict[str, Any]:
    plain = asdict(one)
    del plain["text"], plain["form"], plain["case"]
    return {**one.case._asdict(), **plain}


def _compiled_cells(rows: "Sequence[Compiled]") -> list[list[str]]:
    head = ["compiled for " + rows[0].target, "plan", "dtype", "registers", "spills", "stack"]
    head += ["shared", "warps", "programs", "occupancy", "16-byte", "narrower", "local", "MUFU"]
    head += ["FFMA/FMUL/FADD", "LDS/STS", "barriers", "issued"]
    found = [head]
    for one in rows:
        sizes = [one.registers, one.spills, one.stack, one.shared, one.warps]
        kinds = [one.wide, one.narrow, one.count("LDL|STL|scratch_"), one.count("MUFU|v_exp|v_rcp")]
        kinds += [one.count("FFMA|FMUL|FADD|v_(pk_)?(fma|mul|add)_f32|v_fmac_f32")]
        kinds += [one.count(r"LDS\b|LDSM|STS|ds_(read|write)"), one.count("BAR|s_barrier")]
        on_chip = [str(one.programs), f"{one.occupancy:.0%}"] if one.programs else ["", ""]
        what = [one.case.title, one.case.plan, one.case.dtype]
        counts = [*map(str, sizes), *on_chip, *map(str, kinds), str(one.issued or "")]
        found.append([*what, *counts])
    return found


def _counted_cells(rows: "Mapping[Case, Count]") -> list[list[str]]:
    from minrnn.bench.gpu_counted import least

    found = [["bytes of an element, counted", "plan", "dtype", "moved", "least", "ratio"]]
    for case, count in rows.items():
        moved, must = count.per_element, least(case)
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
