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
    # what a multiprocessor has to have under way is that of four
    assert found.programs >= 7


@each_kernel
def test_a_thread_loads_and_stores_four_elements_at_a_time(case: Case, target: str) -> None:
    found = compiled(case, target)
    assert found.narrow == 0
    assert found.wide >= (4 if case.is_backward else 3)


@each_kernel
def test_bfloat16_is_rounded_to_the_nearest(case: Case, target: str) -> None:
    rounding = [name for name in compiled(case, target).instructions if name.startswith("F2F")]
    assert all("BF16" in name and ".RZ" not in name for name in rounding)
    assert bool(rounding) == (case.dtype == "bfloat16" and case.plan != "totals")


def test_amd_takes_them_too() -> None:
    for plan in gpu_compiled.PLANS:
        found = compiled(Case("mingru", False, plan, "float32"), "gfx942")
        assert (found.spills, found.stack, found.count("scratch_")) == (0, 0, 0)


@pytest.mark.parametrize("plan", gpu_compiled.PLANS)
@pytest.mark.parametrize("is_backward", [False, True])
def test_strides_are_multiplied_in_64_bits(plan: str, is_backward: bool) -> None:
    text = compiled(Case("mingru", is_backward, plan, "float32"), "sm_90").form
    strides = re.findall(r"%(\w+_[BT]): i32", text)
    assert len(strides) >= (8 if plan == "totals" else 14 if is_backward else 8)
    body = [line for line in text.splitlines() if "tt.func" not in line]
    for name in strides:
        uses = [line for line in body if re.search(rf"%{name}\b", line)]
        assert all("arith.extsi" in line for line in uses), (name, uses)


_FAR = """
import torch
from minrnn.ops.gpu import kernels
kernels.INTERPRETED, kernels.LEAST = kernels.Device({multiprocessors}, 2), 4
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
@pytest.mark.long
@pytest.mark.timeout(900)
def test_no_plan_moves_more_bytes_than_aimed_at(counted: dict[Case, Count]) -> None:
    assert len(counted) == 18
    assert gpu_static.misses([], counted) == []
    for case, count in counted.items():
        # totals are beside what has to move
        assert case.plan == "totals" or count.per_element >= gpu_counted.least(case)


def test_what_is_missed_is_said() -> None:
    case = Case("mingru", False, "steps", "float32")
    bad = Compiled(case, "sm_90", 255, 8, 0, 0, {"LDG.E": 1, "LDG.E.128": 1, "LDL.64": 2})
    assert gpu_static.misses([bad], {case: Count(elements=10, loaded=80, stored=47)}) == [
        "mingru forward, steps, float32, sm_90: registers in memory",
        "mingru forward, steps, float32, sm_90: loads of less than four elements",
        "mingru forward, steps, float32: 1.06 times the bytes",
    ]


def test_occupancy_of_worked_examples() -> None:
    # 87 * 32 = 2,784 registers, 2,816 in units of 256: 5 warps in each quarter of 65,536
    assert resident(LIMITS["sm_90"], 87, 4096) == 20
    # 17,920 + 1,024 = 18,944 bytes: 12 of them in 228 KiB, 8 in 164 KiB
    assert resident(LIMITS["sm_90"], 40, 17920) == 12
    assert resident(LIMITS["sm_80"], 40, 17920) == 8
    # neither: as many programs, or warps, as there may be
    assert resident(LIMITS["sm_80"], 16, 0) == 32
    assert resident(Limits(65536, 16, 32, 0, 0), 32, 0) == 16


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
    # of the loop
    assert gpu_compiled.issued(_SASS) == 3


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
    steps, totals, chunks = (Case("mingru", False, plan, "float32") for plan in gpu_compiled.PLANS)
    counted = {
        steps: Count(100, loaded=800, stored=400),
        totals: Count(100, loaded=800, stored=10),
        chunks: Count(100, loaded=830, stored=400),
    }
    given = {"registers": 50, "spills": 0, "stack": 0, "text": "", "instructions": {"LDGSTS": 1}}
    made = [
        Compiled(case, "sm_90", **given, shared=7168, issued=100, programs=28) for case in counted
    ]
    [full, small, long] = gpu_static.predictions(made, counted)
    assert (full.plan, small.plan, long.plan) == ("steps", "chunks", "chunks")
    # 512 programs: 7 KiB under way for each, one for each quarter of a multiprocessor
    assert full.bandwidth == pytest.approx(64 * 4096 * 1024 * 12 / 3.35e12)
    assert full.latency == pytest.approx(64 * 4096 * 1024 * 8 / (512 * 7168) * 600e-9)
    assert full.issue == pytest.approx(4096 * 100 / 1.98e9)
    # 66 chunks of 63 steps for each of 32 blocks
    assert small.programs == 2112
    # 512 chunks of 128 steps for each of two blocks, twice; the last looks at 128 times 4 totals
    assert long.programs == 1024
    assert long.bandwidth == pytest.approx(65536 * 256 * (8.1 + 12.3) / 3.35e12)
    way = 65536 * 256 * (8 + 8.3) / (1024 * 7168) * 600e-9
    assert long.latency == pytest.approx(way + 128 * 300e-9)
    assert long.issue == pytest.approx(2 * 2 * 128 * 100 / 1.98e9)
    # step by step: two warps on all of the GPU
    assert long.other == pytest.approx(65536 * 256 * 8 / (2 * 7168) * 600e-9)


def test_the_bench_prints_and_writes_what_it_found(monkeypatch, capsys, tmp_path) -> None:
    case = Case("mingru", False, "steps", "float32")
    count = Count(100, loaded=800, stored=400)
    both = {case._replace(plan=plan): count for plan in gpu_compiled.PLANS}
    both[case._replace(plan="totals")] = Count(100, loaded=800)
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
