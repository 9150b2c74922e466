"""The GPU's kernels without a GPU: what compilers and the interpreter say of them."""

import functools
import json
import os
import re
import subprocess
import sys

import pytest

from minrnn import cli
from minrnn.bench import gpu_compiled, gpu_counted, gpu_static
from minrnn.bench.gpu_compiled import LIMITS, Case, Compiled, Limits, read_sass, resident
from minrnn.bench.gpu_counted import Count
from minrnn.ops import gpu

# a kernel is compiled once for all tests
compiled = functools.cache(gpu_compiled.compiled)
DTYPES = ("float32", "bfloat16")
CASES = [case for case in gpu_compiled.cases(DTYPES) if case.name != "scan"]
# bfloat16 over chunks, which takes longest to compile, for one of them
BOTH = [
    (case, target)
    for case in CASES
    for target in ("sm_80", "sm_90")
    if target == "sm_90" or case.plan == "steps" or case.dtype == "float32"
]
each_kernel = pytest.mark.parametrize(
    ("case", "target"), BOTH, ids=[f"{'-'.join(map(str, c))}-{t}" for c, t in BOTH]
)


@pytest.fixture(scope="module")
def counted() -> dict[Case, Count]:
    # the shorter the elements, the more all else weighs
    return gpu_counted.counted(("bfloat16",))


@each_kernel
def test_registers_are_enough(case: Case, target: str) -> None:
    found = compiled(case, target)
    assert (found.spills, found.stack, found.count("LDL|STL")) == (0, 0, 0)
    assert found.programs >= 2


@each_kernel
def test_loads_and_stores_are_16_bytes_wide(case: Case, target: str) -> None:
    found = compiled(case, target)
    # one scalar goes through shared memory by LDG.E in `chunks`: nothing of a gate
    assert found.narrow <= (0 if case.plan == "steps" else 1)
    assert found.wide >= (4 if case.is_backward else 3)


@each_kernel
def test_bfloat16_is_rounded_to_the_nearest(case: Case, target: str) -> None:
    rounding = [name for name in compiled(case, target).instructions if name.startswith("F2F")]
    assert all("BF16" in name and ".RZ" not in name for name in rounding)
    assert bool(rounding) == (case.dtype == "bfloat16")


@pytest.mark.parametrize(("case", "target"), [both for both in BOTH if both[0].plan == "chunks"])
def test_warps_of_a_program_wait_alone(case: Case, target: str) -> None:
    """A barrier in a waiting loop would hang: one warp may see a word that another does not yet."""
    loops = gpu_compiled.loops(compiled(case, target).text)
    waiting = [loop for loop in loops if any("STRONG.SYS" in name for name in loop)]
    # for a state; for totals, one after the other, and for each
    assert len(waiting) >= 3
    assert not [loop for loop in waiting if any(name.startswith("BAR") for name in loop)]


def test_amd_looks_at_words_again() -> None:
    """Its loads from buffers are taken out of a loop, volatile or not: looks are atomic there."""
    found = compiled(Case("mingru", False, "chunks", "float32"), "gfx942")
    assert found.count("buffer_load_dwordx2|global_load_dwordx2") == 0
    # a first look and the next ones, at totals and at a state
    assert found.count("(buffer|global)_atomic_add_x2") == 4
    assert (found.spills, found.stack, found.count("scratch_")) == (0, 0, 0)


@pytest.mark.parametrize("plan", ["steps", "chunks"])
@pytest.mark.parametrize("is_backward", [False, True])
def test_strides_are_multiplied_in_64_bits(plan: str, is_backward: bool) -> None:
    text = compiled(Case("mingru", is_backward, plan, "float32"), "sm_90").form
    strides = re.findall(r"%(\w+_[BT]): i32", text)
    assert len(strides) >= (14 if is_backward else 8)
    body = [line for line in text.splitlines() if "tt.func" not in line]
    for name in strides:
        uses = [line for line in body if re.search(rf"%{name}\b", line)]
        assert all("arith.extsi" in line for line in uses), (name, uses)


_FAR = """
import torch
from minrnn.ops.gpu import kernels
kernels.INTERPRETED, kernels.NARROW, kernels.STEPS = kernels.Device({multiprocessors}, 2), 4, 8
T, far = 32, (1 << 30) + 16
room = torch.empty(2 * far + T * 4, dtype=torch.bfloat16)
b = room.as_strided((3, T, 4), (far, 4, 1))
b.copy_(torch.arange(3 * T * 4).view(3, T, 4) % 3)
a = torch.ones(3, T, 4, dtype=torch.bfloat16)
h, h_T = kernels.scan(a, b, None, None, None, False)
assert torch.equal(h.float(), b.float().cumsum(1)), h
assert torch.equal(h_T, h[:, -1].float())
"""


@pytest.mark.parametrize("multiprocessors", [0, 1 << 20], ids=["steps", "chunks"])
def test_rows_may_lie_beyond_32_bits(multiprocessors: int) -> None:
    # gigabytes of addresses, of which a few pages are touched
    command = [sys.executable, "-c", _FAR.format(multiprocessors=multiprocessors)]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    ended = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert ended.returncode == 0, ended.stderr


# half a minute of one core, which may not be free
@pytest.mark.timeout(900)
def test_no_plan_moves_more_bytes_than_aimed_at(counted: dict[Case, Count]) -> None:
    assert len(counted) == 12
    assert gpu_static.misses([], counted) == []
    for case, count in counted.items():
        assert count.per_element >= gpu_counted.least(case)
        # seven or eight totals on the average, and a state
        assert (count.looks > 0) == (case.plan == "chunks")


def test_what_is_missed_is_said() -> None:
    case = Case("mingru", False, "steps", "float32")
    bad = Compiled(case, "sm_90", 255, 8, 0, 0, 1, {"LDG.E": 1, "LDG.E.128": 1, "LDL.64": 2})
    assert gpu_static.misses([bad], {case: Count(elements=10, loaded=80, stored=47)}) == [
        "mingru forward, steps, float32, sm_90: registers in memory",
        "mingru forward, steps, float32, sm_90: loads of less than 16 bytes",
        "mingru forward, steps, float32: 1.06 times the bytes",
    ]


def test_occupancy_of_worked_examples() -> None:
    # 187 * 32 = 5,984 registers, 6,144 in units of 256: 2 warps in each quarter of 65,536
    assert resident(LIMITS["sm_90"], 187, 4096, 4) == 2
    # 17,920 + 1,024 = 18,944 bytes: 12 of them in 228 KiB, 8 in 164 KiB
    assert resident(LIMITS["sm_90"], 40, 17920, 1) == 12
    assert resident(LIMITS["sm_80"], 40, 17920, 1) == 8
    # neither: as many programs, or warps, as there may be
    assert resident(LIMITS["sm_80"], 16, 0, 1) == 32
    assert resident(LIMITS["sm_80"], 16, 0, 4) == 16
    assert resident(Limits(65536, 64, 32, 0, 0), 32, 0, 8) == 8


_SASS = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;      /* 0x00000a00ff017b82 */
                                                               /* 0x000fe20000000800 */
        /*0010*/              @!P0 LDG.E.128 R4, desc[UR6][R30.64] ;      /* 0x0000 */
        /*0020*/                   FMUL R36, |R8|, -1.4426950216293334961 ;   /* 0x0000 */
        /*0030*/                   STG.E.128 desc[UR6][R8.64], R4 ;      /* 0x0000 */
        /*0040*/               @P1 BRA 0x20 ;      /* 0x0000 */
        /*0050*/                   EXIT ;      /* 0x0000 */
        /*0060*/                   BRA 0x60;      /* 0x0000 */
        /*0070*/                   NOP;      /* 0x0000 */
"""


def test_instructions_are_read() -> None:
    names = [name for _, name, _ in read_sass(_SASS)]
    assert names == ["LDC", "LDG.E.128", "FMUL", "STG.E.128", "BRA", "EXIT"]
    assert gpu_compiled.issued(_SASS, "steps") == 3
    assert gpu_compiled.issued(_SASS, "chunks") == 6


def test_a_silent_compiler_is_refused() -> None:
    with pytest.raises(ValueError, match="ptxas did not report registers"):
        gpu_compiled.read_report("ptxas info    : 0 bytes gmem")


def test_without_triton_one_line_says_how_to_get_it(monkeypatch, capsys) -> None:
    monkeypatch.setattr(gpu, "is_installed", lambda: False)
    assert cli.main(["bench", "gpu-static"]) == 2
    said = capsys.readouterr().err
    assert said == "minrnn bench gpu-static: triton is missing: pip install 'minrnn[gpu]'\n"


def test_kernels_that_are_interpreted_are_not_compiled(monkeypatch, capsys) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert cli.main(["bench", "gpu-static"]) == 2
    assert "TRITON_INTERPRET is set" in capsys.readouterr().err


def test_predictions_are_bounds_of_three_kinds() -> None:
    steps, chunks = (Case("mingru", False, plan, "float32") for plan in ("steps", "chunks"))
    counted = {
        steps: Count(100, loaded=800, stored=400),
        chunks: Count(64 * 32, loaded=8 * 64 * 32, stored=4 * 64 * 32, looks=8),
    }
    given = {"registers": 50, "spills": 0, "stack": 0, "text": ""}
    made = [
        Compiled(steps, "sm_90", **given, shared=7168, warps=1, instructions={"LDGSTS": 1},
                 issued=100, programs=28),
        Compiled(chunks, "sm_90", **given, shared=4096, warps=4, instructions={},
                 issued=2000, programs=4),
    ]  # fmt: skip
    [_, small, long] = gpu_static.predictions(made, counted)
    assert (small.plan, long.plan) == ("chunks", "chunks")
    assert long.programs == 8 * 1024
    assert long.bandwidth == pytest.approx(65536 * 256 * 12 / 3.35e12)
    # 16 rounds of 528 programs: a load, 8 looks and 2,000 instructions each
    assert long.latency == pytest.approx(16 * (600e-9 + 8 * 300e-9 + 2000 / 1.98e9))
    # 62.06 warps for each scheduler
    assert long.issue == pytest.approx(63 * 2000 / 1.98e9)
    # step by step: two warps on all of the GPU, 7 KiB under way for each
    assert long.other == pytest.approx(65536 * 256 * 8 / (2 * 7168) * 600e-9)


def test_the_bench_prints_and_writes_what_it_found(monkeypatch, capsys, tmp_path) -> None:
    case = Case("mingru", False, "steps", "float32")
    count = Count(100, loaded=800, stored=400)
    both = {case: count, case._replace(plan="chunks"): count}
    found = [compiled(one, "sm_90") for one in both]
    monkeypatch.setattr(gpu_static, "_found", lambda quick: (found, both))
    assert cli.main(["bench", "gpu-static", "--quick", "--out", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "predicted, not measured" in said
    assert "every aim is met" in said
    written = json.loads((tmp_path / "bench-gpu-static.json").read_text())
    assert written["command"] == "minrnn bench gpu-static --quick"
    assert written["compiled"][0]["registers"] == found[0].registers
    assert len(written["predicted"]) == len(gpu_static.SHAPES)
