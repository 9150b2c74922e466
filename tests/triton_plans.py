"""Both plans of the GPU's kernels, each for every case that can take it.

With `-p tests.on_triton` on the CPU, interpreted in small blocks; with `--device cuda` on a GPU.
"""

from dataclasses import replace

import pytest
import torch
from cases import CASES, GATES, Case, Inputs, assert_close, expected, make_inputs, operator, run
from torch import bfloat16, float16, float32, float64

from minrnn.bench import gpu_plans, measure
from minrnn.ops.gpu import kernels
from minrnn.ops.gpu.kernels import Device, plan_of

NAN, INF = float("nan"), float("inf")
# where programs count as enough to go through time: always, never
PLANS = {"through time": 0, "chunks of time": 1 << 40}


@pytest.fixture(params=PLANS)
def plan(backend, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """All calls take one plan."""
    monkeypatch.setattr(kernels, "FILLED", PLANS[request.param])
    monkeypatch.setattr(kernels, "CHUNKED", PLANS[request.param])
    return request.param


def _num_chunks(case: Case, device: str) -> int:
    packed, where = case.cu_seqlens is not None, kernels.device_of(torch.device(device))
    return plan_of(case.B, case.T, case.D, case.dtype, packed, where).chunks


def _long(steps: int) -> int:
    """As many chunks as `steps` steps have in chunks of four."""
    return steps * kernels.LEAST // 4


# a row of 101 has 25 chunks
LONG = (
    *(case for case in CASES if case.T >= 32),
    Case(float32, 2, 101, 5, "four groups of chunks"),
    Case(float32, 1, 128, 4, "no chunk is part of one", reverse=True),
    Case(float16, 1, 101, 3, "a reset in most chunks", reset=True, candidate="identity"),
    Case(bfloat16, 2, 101, 3, "the same from the other end", reset=True, reverse=True),
)


@pytest.mark.parametrize("case", LONG, ids=str)
@pytest.mark.parametrize("name", GATES)
def test_each_plan_matches_the_reference(backend, plan: str, name: str, case: Case) -> None:
    case = replace(case, T=_long(case.T))
    assert (_num_chunks(case, backend.device) > 1) == (plan == "chunks of time")
    inputs = make_inputs(name, case)
    assert_close(run(operator(name), inputs), expected(name, inputs))


def test_blocks_as_a_gpu_has_them(plan: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "INTERPRETED", Device(multiprocessors=1, warp=32))
    monkeypatch.setattr(kernels, "LEAST", 32)
    inputs = make_inputs("minlstm", Case(float32, 1, 197, 129, "six chunks, two blocks"))
    assert_close(run(operator("minlstm"), inputs), expected("minlstm", inputs))


# a reset some chunks before the end; what lies before it is broken
@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("name", GATES)
def test_nothing_broken_crosses_a_reset(plan: str, name: str, reverse: bool, value: float) -> None:
    T, at = _long(101), _long(60)
    inputs = make_inputs(name, Case(float32, 1, T, 3, "broken", reset=True, reverse=reverse))
    inputs.options["reset"][:] = torch.arange(T) == at
    h0 = torch.full_like(inputs.h0, value)
    # in the order of processing: before the reset for values, behind it for gradients
    early = slice(at + 1, None) if reverse else slice(None, at)
    late = slice(None, at + 1) if reverse else slice(at, None)
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
    k = torch.full((1, _long(101), 2), 60.0)
    v = torch.zeros_like(k)
    v[0, 3, 0] = NAN
    h, h_T = operator("mingru")(k, v, None)
    # decays of exp(-60): their product is 0 after two steps
    assert h[0, 3:, 0].isnan().all()
    assert h_T[0, 0].isnan()
    assert h[0, :3].isfinite().all()
    assert h[0, :, 1].isfinite().all()


def test_runs_give_the_same_bits(plan: str) -> None:
    inputs = make_inputs("mingru", Case(float32, 2, _long(101), 5, "twice", reset=True))
    first, second = (run(operator("mingru"), inputs) for _ in range(2))
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_plans_are_timed_and_held_to_each_other(backend, monkeypatch) -> None:
    monkeypatch.setattr(measure, "large_triad", lambda device: measure.triad(1000, device))
    shape, device = (1, 8 * kernels.LEAST, 8), torch.device(backend.device)
    for dtype in (float32, bfloat16):
        forward, backward = gpu_plans.tables("mingru", dtype, shape, 0.0, device)
        for table in (forward, backward):
            plans = [row for row in table.rows if row.error is not None]
            assert plans[0].name.endswith("chunks, chosen")
            assert "through time" in [row.name for row in plans]
            assert all(row.value and row.note == "" for row in plans)


# an H100 has 132 multiprocessors, filled by 231 programs in float32; a T4 has 40, filled by 70
@pytest.mark.parametrize(
    ("multiprocessors", "dtype", "shape", "chunks"),
    [
        (132, float32, (29, 4096, 1024), 1),
        (132, float32, (28, 4096, 1024), 10),
        (132, bfloat16, (58, 4096, 1024), 1),
        (132, bfloat16, (57, 4096, 1024), 5),
        (132, float64, (15, 4096, 1024), 1),
        (132, float32, (8, 4096, 512), 66),
        (132, float32, (1, 65536, 256), 512),
        (132, float32, (1, 1 << 20, 8), 2048),
        (132, float32, (1, 255, 256), 7),
        (132, float32, (1, 64, 256), 2),
        (132, float32, (1, 63, 256), 1),
        (132, float32, (1, 0, 256), 1),
        (40, float32, (18, 4096, 512), 1),
        (40, float32, (17, 4096, 512), 10),
    ],
)
def test_plan_is_picked_by_shape(monkeypatch, multiprocessors, dtype, shape, chunks) -> None:
    monkeypatch.setattr(kernels, "LEAST", 32)
    gpu = Device(multiprocessors, warp=32)
    plan = plan_of(*shape, dtype, False, gpu)
    assert plan.chunks == chunks
    assert plan.BLOCK * plan.blocks >= shape[2]
    assert plan.chunk_steps * (chunks - 1) < max(shape[1], 1) <= plan.chunk_steps * chunks
    assert plan.programs == shape[0] * plan.blocks * chunks
    assert plan_of(*shape, dtype, True, gpu).chunks == 1


@pytest.mark.parametrize(
    ("D", "BLOCK"), [(1, 32), (32, 32), (33, 64), (64, 64), (65, 128), (999, 128)]
)
def test_few_channels_take_few_threads(D: int, BLOCK: int) -> None:
    assert plan_of(4, 100, D, float32, False, Device(132, warp=32)).BLOCK == BLOCK


# the host does not read the bounds of a GPU; clamped, they are (0, ..., T) or rise to it
@pytest.mark.parametrize(
    "lies", [(0, 99, 5, 5), (-7, 2, 4, 5), (0, 4, 2, 5), (5, 3, 0, 0), (0, 1, 1 << 40, 5)]
)
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("name", GATES)
def test_no_bound_leads_beyond_the_row(backend, name: str, reverse: bool, lies) -> None:
    inputs = make_inputs(name, Case(float32, 1, 5, 3, "bounds", cu_seqlens=(0, 1, 2, 5)))
    gates, options = list(inputs.gates.values()), tuple(inputs.options.values())[1:-1]
    results = []
    for bounds in (torch.tensor(lies), torch.tensor(lies).clamp(0, 5)):
        layout = (None, bounds.cummax(0).values if results else bounds, reverse)
        # rooms of 40 rows around each result
        rooms = torch.full((len(gates) + 1, 1, 85, 3), 7.0)
        h, *grads = (room[:, 40:45] for room in rooms)
        _, h_T = kernels._forward(name, gates, inputs.h0, options, layout, h)
        saved = gates[:1] if name == "scan" else gates
        back = (inputs.dh, inputs.dh_T, saved, inputs.h0, h, options, layout, grads)
        *_, dh0 = kernels._backward(name, *back)
        assert bool((rooms[:, :, :40] == 7).all() & (rooms[:, :, 45:] == 7).all())
        results.append((rooms, h_T, dh0))
    if lies != (0, 4, 2, 5):
        # where sequences do not overlap, it is what the clamped bounds give
        for found, wanted in zip(*results, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)
