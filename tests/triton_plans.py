"""Both plans of the GPU's kernels, each for every case that can take it; for `tests.on_triton`."""

import pytest
import torch
import triton.language as tl
from cases import CASES, GATES, Case, Inputs, assert_close, expected, make_inputs, operator, run
from torch import bfloat16, float16, float32, float64

from minrnn.ops.gpu import chunks, kernels
from minrnn.ops.gpu.kernels import Device, plan_of

NAN, INF = float("nan"), float("inf")
# where programs count as enough to go through time: always, never
PLANS = {"through time": 0, "chunks of time": 1 << 40}


@pytest.fixture(params=PLANS)
def plan(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """All calls take one plan."""
    monkeypatch.setattr(kernels, "FILLED", PLANS[request.param])
    return request.param


def _takes_chunks(case: Case) -> bool:
    packed = case.cu_seqlens is not None
    return bool(plan_of(case.B, case.T, case.D, case.dtype, packed, kernels.INTERPRETED).chunks)


# chunks of 8 steps in groups of 4: a row of 101 has more than three groups
LONG = (
    *(case for case in CASES if case.T >= 32 and case.dtype != float64),
    Case(float32, 2, 101, 5, "four groups of chunks"),
    Case(float32, 1, 128, 4, "no chunk is part of one", reverse=True),
    Case(float16, 1, 101, 3, "a reset in most chunks", reset=True, candidate="identity"),
    Case(bfloat16, 2, 101, 3, "the same from the other end", reset=True, reverse=True),
)


@pytest.mark.parametrize("case", LONG, ids=str)
@pytest.mark.parametrize("name", GATES)
def test_each_plan_matches_the_reference(plan: str, name: str, case: Case) -> None:
    assert _takes_chunks(case) == (plan == "chunks of time")
    inputs = make_inputs(name, case)
    assert_close(run(operator(name), inputs), expected(name, inputs))


def test_blocks_as_a_gpu_has_them(plan: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "INTERPRETED", Device(multiprocessors=1, warp=32))
    monkeypatch.setattr(kernels, "NARROW", 32)
    monkeypatch.setattr(kernels, "STEPS", 64)
    monkeypatch.setattr(chunks, "GROUP", tl.constexpr(16))
    inputs = make_inputs("minlstm", Case(float32, 1, 257, 33, "five chunks, two blocks"))
    assert_close(run(operator("minlstm"), inputs), expected("minlstm", inputs))


# a reset some chunks before the end; what lies before it is broken
@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("name", GATES)
def test_nothing_broken_crosses_a_reset(plan: str, name: str, reverse: bool, value: float) -> None:
    inputs = make_inputs(name, Case(float32, 1, 101, 3, "broken", reset=True, reverse=reverse))
    inputs.options["reset"][:] = torch.arange(101) == 60
    h0 = torch.full_like(inputs.h0, value)
    # in the order of processing: before the reset for values, behind it for gradients
    early = slice(61, None) if reverse else slice(None, 60)
    late = slice(None, 61) if reverse else slice(60, None)
    broken = _spoiled(inputs, early, value)._replace(h0=h0)
    h, _ = operator(name)(*broken.gates.values(), h0, **inputs.options)
    wanted, _ = operator(name)(*inputs.gates.values(), inputs.h0, **inputs.options)
    torch.testing.assert_close(h[:, late], wanted[:, late], rtol=1e-6, atol=1e-6)
    broken = _spoiled(inputs, late, value)
    found, clean = run(operator(name), broken), run(operator(name), inputs)
    for gate in GATES[name]:
        torch.testing.assert_close(
            found[f"d{gate}"][:, early], clean[f"d{gate}"][:, early], rtol=1e-6, atol=1e-6
        )


def _spoiled(inputs: Inputs, steps: slice, value: float) -> Inputs:
    gates = {gate: x.clone() for gate, x in inputs.gates.items()}
    dh, dh_T = inputs.dh.clone(), inputs.dh_T.clone()
    for x in (*gates.values(), dh):
        x[:, steps] = value
    return Inputs(gates, inputs.h0, inputs.options, dh, torch.full_like(dh_T, value))


# trap 21
def test_what_is_broken_is_not_hidden_where_decays_underflow(plan: str) -> None:
    k = torch.full((1, 101, 2), 60.0)
    v = torch.zeros(1, 101, 2)
    v[0, 3, 0] = NAN
    h, h_T = operator("mingru")(k, v, None)
    # decays of exp(-60): their product is 0 after two steps
    assert h[0, 3:, 0].isnan().all()
    assert h_T[0, 0].isnan()
    assert h[0, :3].isfinite().all()
    assert h[0, :, 1].isfinite().all()


def test_runs_give_the_same_bits(plan: str) -> None:
    inputs = make_inputs("mingru", Case(float32, 2, 101, 5, "twice", reset=True))
    first, second = (run(operator("mingru"), inputs) for _ in range(2))
    assert all(torch.equal(first[key], second[key]) for key in first)


# with 132 multiprocessors 528 programs of one warp fill an H100, with 40 a T4 is filled by 160
@pytest.mark.parametrize(
    ("multiprocessors", "dtype", "shape", "chunked"),
    [
        (132, float32, (66, 4096, 1024), False),
        (132, float32, (65, 4096, 1024), True),
        (132, float32, (8, 4096, 512), True),
        (132, float32, (1, 65536, 256), True),
        (132, bfloat16, (132, 4096, 1024), False),
        (132, bfloat16, (131, 4096, 1024), True),
        (40, float32, (40, 4096, 512), False),
        (40, float32, (39, 4096, 512), True),
        (132, float32, (1, 255, 256), False),
        (132, float64, (1, 65536, 256), False),
    ],
)
def test_plan_is_picked_by_shape(monkeypatch, multiprocessors, dtype, shape, chunked) -> None:
    monkeypatch.setattr(kernels, "NARROW", 32)
    monkeypatch.setattr(kernels, "STEPS", 64)
    gpu = Device(multiprocessors, warp=32)
    plan = plan_of(*shape, dtype, False, gpu)
    assert bool(plan.chunks) == chunked
    assert plan.BLOCK * plan.blocks >= shape[2]
    if chunked:
        assert plan.programs == shape[0] * plan.blocks * -(-shape[1] // 64)
    assert not plan_of(*shape, dtype, True, gpu).chunks
