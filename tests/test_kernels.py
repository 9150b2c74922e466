"""What the compiled kernels compute: the same bits however the work is cut, and narrow rows."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import torch
from cases import GATES, Case, in_pieces, make_inputs, operator, run
from torch import Tensor, bfloat16, float16, float32, float64

from minrnn import ops
from minrnn.ops import reference, scans

# 50,000 to 120,000 numbers, worth four threads at 16,384 for each; where there are one to five
# sequences, threads share their tiles of 8,192
SHARED = (
    Case(float32, 1, 700, 128, "tiles of 64 steps"),
    Case(float32, 3, 300, 130, "tiles of three sequences", reset=True, reverse=True),
    Case(float64, 1, 60000, 1, "composed steps; a last tile shorter than the others"),
    Case(float32, 1, 20000, 3, "tiles that do not fill a vector", h0=False, reverse=True),
    Case(bfloat16, 1, 9000, 6, "rounded states before each tile, resets", reset=True),
    Case(float32, 1, 8000, 8, "the narrowest row of single steps", "halves"),
    Case(bfloat16, 1, 6, 9000, "rows wider than a tile, which are cut"),
    Case(float32, 1, 3000, 40, "packed", reset=True, cu_seqlens=(0, 0, 700, 701, 701, 3000)),
    Case(float32, 34, 64, 40, "sequences enough for each thread to have its own"),
    Case(float16, 1, 30000, 2, "packed narrow", cu_seqlens=(0, 9000, 9010, 30000), reverse=True),
)


@contextmanager
def _threads(num: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(num)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _assert_same_bits(actual: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert actual.keys() == wanted.keys()
    for key, x in actual.items():
        torch.testing.assert_close(
            x, wanted[key], rtol=0, atol=0, equal_nan=True, msg=f"{{}}: {key}".format
        )


@pytest.mark.parametrize("case", SHARED, ids=str)
@pytest.mark.parametrize("name", [*GATES, "minlstm_fused"])
def test_threads_do_not_change_a_bit(name: str, case: Case) -> None:
    inputs = make_inputs(name, case)
    with _threads(1):
        alone = run(operator(name), inputs)
    for num in (2, 4, 4):
        with _threads(num):
            _assert_same_bits(run(operator(name), inputs), alone)


@pytest.mark.parametrize("D", [1, 16])
def test_threads_share_what_is_broken(D: int) -> None:
    inputs = make_inputs("mingru", Case(float32, 1, 65536 // D, D, "tiles run twice", h0=False))
    inputs.gates["v"][0, 20000 // D] = float("nan")
    inputs.dh[0, 50000 // D] = float("inf")
    with _threads(1):
        alone = run(ops.mingru, inputs)
    with _threads(4):
        _assert_same_bits(run(ops.mingru, inputs), alone)


def test_callers_at_the_same_time_do_not_meet() -> None:
    cases = [Case(float32, 1, 700 + n, 128, "a caller's own") for n in range(4)]
    inputs = [make_inputs("minlstm", case) for case in cases]
    alone = [run(ops.minlstm, x) for x in inputs]
    with _threads(2), ThreadPoolExecutor(4) as callers:
        for _ in range(5):
            together = callers.map(lambda x: run(ops.minlstm, x), inputs)
            for found, wanted in zip(together, alone, strict=True):
                _assert_same_bits(found, wanted)


# 8: a row in one register; 64: scan without buffers; then rows that are a tile, and cut ones
@pytest.mark.parametrize("D", [8, 9, 23, 64, 130, 8193])
@pytest.mark.parametrize("dtype", [float32, float64, bfloat16, float16], ids=str)
@pytest.mark.parametrize("name", GATES)
def test_steps_equal_the_whole_bit_for_bit(name: str, dtype: torch.dtype, D: int) -> None:
    # beyond a tile; 8193 long enough that a column of its own would be composed
    T = 70 if D > 8192 else 8192 // D + 5
    for options in ({}, {"reset": True}, {"reverse": True}):
        inputs = make_inputs(name, Case(dtype, 1, T, D, "single steps", **options))
        op, steps = operator(name), in_pieces(operator(name), [*range(T + 1)])
        with torch.no_grad():
            whole, cut = (
                f(*inputs.gates.values(), inputs.h0, **inputs.options) for f in (op, steps)
            )
        assert torch.equal(cut[0], whole[0])
        assert torch.equal(cut[1], whole[1])


@pytest.mark.parametrize("D", [8, 40, 130])
@pytest.mark.parametrize("name", GATES)
def test_gradients_of_pieces_equal_the_whole_bit_for_bit(name: str, D: int) -> None:
    T = 2 * 8192 // D + 7
    for options in ({}, {"reset": True}, {"reverse": True}):
        # not in half precision, where a piece reads its first h0 unrounded
        inputs = make_inputs(name, Case(float32, 2, T, D, "pieces", **options))
        pieces = in_pieces(operator(name), [0, 1, 2, T // 2 - 1, T - 3, T])
        _assert_same_bits(run(pieces, inputs), run(operator(name), inputs))


@pytest.mark.parametrize("D", range(1, 8))
@pytest.mark.parametrize("name", GATES)
def test_narrow_steps_equal_the_whole_up_to_rounding(name: str, D: int) -> None:
    T = 8192 // D + 100
    inputs = make_inputs(name, Case(float32, 1, T, D, "composed"))
    op, steps = operator(name), in_pieces(operator(name), [*range(T + 1)])
    with torch.no_grad():
        whole, cut = (f(*inputs.gates.values(), inputs.h0, **inputs.options) for f in (op, steps))
    # Some 4 to 16 steps are composed there, and the roundings fall elsewhere; measured over six
    # seeds 1.2e-6 for scan, whose decays come near 1, and 1.9e-7 for the others
    for x, y in zip(cut, whole, strict=True):
        torch.testing.assert_close(x, y, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("D", range(33))
def test_every_width_and_misalignment(D: int) -> None:
    storage = torch.randn(2, 3 * (D + 3) * 7 + 8)
    for shift in range(3):
        k, v = (row[shift:].as_strided((3, 7, D), ((D + 3) * 7, D + 3, 1)) for row in storage)
        h, h_T = ops.mingru(k, v)
        expected, expected_T = reference.mingru(k.double(), v.double())
        torch.testing.assert_close(h.double(), expected, rtol=2e-6, atol=1e-6)
        torch.testing.assert_close(h_T.double(), expected_T, rtol=2e-6, atol=1e-6)


def _tree_scan(a, b, h0):
    return scans.blelloch(a, b, h0)


def _tree_mingru(k, v, h0):
    b = torch.sigmoid(k) * torch.where(v >= 0, v + 0.5, torch.sigmoid(v))
    return scans.blelloch(torch.sigmoid(-k), b, h0)


def _tree_minlstm(f, i, v, h0):
    total = torch.sigmoid(f) + torch.sigmoid(i)
    b = torch.sigmoid(i) / total * torch.where(v >= 0, v + 0.5, torch.sigmoid(v))
    return scans.blelloch(torch.sigmoid(f) / total, b, h0)


# in float64 and differentiated by autograd: the truth for sequences too long for the loop
SCANS = {"scan": _tree_scan, "mingru": _tree_mingru, "minlstm": _tree_minlstm}


@pytest.mark.parametrize("D", [1, 2, 3, 4, 5, 7, 8, 12, 15, 16])
@pytest.mark.parametrize("name", ["scan", "mingru", "minlstm"])
def test_long_narrow_rows_match_the_reference(name: str, D: int) -> None:
    T = 4133
    gates = [torch.randn(1, T, D, dtype=torch.float64) for _ in range(2 + (name == "minlstm"))]
    if name == "scan":
        gates[0] = torch.sigmoid(gates[0])
    h0, weight, weight_T = torch.randn(1, D).double(), torch.randn(1, T, D), torch.randn(1, D)
    found = []
    for kernel, dtype in ((getattr(ops, name), torch.float32), (SCANS[name], torch.float64)):
        inputs = [x.to(dtype).requires_grad_() for x in (*gates, h0)]
        h, h_T = kernel(*inputs)
        loss = (h * weight).sum() + (h_T * weight_T).sum()
        found.append([h, h_T, *torch.autograd.grad(loss, inputs)])
    for ours, truth in zip(*found, strict=True):
        torch.testing.assert_close(ours.double(), truth, rtol=1e-5, atol=2e-6)


def test_narrow_rows_run_backwards_and_in_pieces() -> None:
    k, v = torch.randn(2, 1, 1000, 3)
    h, h_T = ops.mingru(k, v)
    flipped, last = ops.mingru(k.flip(1), v.flip(1), reverse=True)
    torch.testing.assert_close(flipped.flip(1), h, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(last, h_T, rtol=1e-5, atol=1e-6)
    _, half = ops.mingru(k[:, :501], v[:, :501])
    torch.testing.assert_close(
        ops.mingru(k[:, 501:], v[:, 501:], half)[1], h_T, rtol=1e-5, atol=1e-6
    )
