"""The claims of docs/equations.md about precision, work and depth, measured."""

from math import ceil, isinf, log2

import pytest
import torch

from minrnn import MinGRU, MinLSTM, bench
from minrnn.bench.half_precision import _evaluate, _layer
from minrnn.bench.peers import step_loop
from minrnn.bench.precision import SUBJECTS, draw_noise, exact_states, make_inputs
from minrnn.bench.truth import coefficients
from minrnn.ops import reference, scans

HALVES = (torch.bfloat16, torch.float16)
POWERS = [2**n for n in range(1, 11)]


@pytest.fixture(scope="module")
def rows():
    return bench.precision(quick=True)


def _select(rows, algorithm, dtype):
    return [row for row in rows if row.algorithm == algorithm and row.dtype == dtype]


def test_every_error_is_within_its_tolerance(rows):
    assert [row for row in rows if not row.error <= row.tolerance] == []


def test_every_algorithm_is_measured_everywhere(rows):
    wanted = {
        (name, dtype, mean, T)
        for name in (*bench.SCANS, "mingru", "minlstm")
        for dtype in (torch.float32, *HALVES)
        for mean in (0.0, 3.0, -7.0)
        for T in (256, 4096)
        if dtype == torch.float32 or name in ("log_space", "mingru", "minlstm")
    }
    assert {(row.algorithm, row.dtype, row.gate_mean, row.T) for row in rows} == wanted
    assert len(rows) == len(wanted)


def test_only_log_space_in_half_precision_has_no_tolerance(rows):
    assert [row for row in rows if isinf(row.tolerance)] == [
        row for dtype in HALVES for row in _select(rows, "log_space", dtype)
    ]


def test_log_space_loses_what_real_space_keeps(rows):
    for name in ("sequential", "hillis_steele", "blelloch"):
        for row, log in zip(
            _select(rows, name, torch.float32),
            _select(rows, "log_space", torch.float32),
            strict=True,
        ):
            if row.gate_mean >= 0:
                # in proportion to T: at least 50 times at 256 steps, 800 times at 4,096
                assert log.error > 0.2 * row.T * row.error
            else:
                # the decay is near 1, so the sum of its logarithms is still small
                assert log.error < 2 * row.error


def test_log_space_in_half_precision_is_unusable(rows):
    for row in (row for dtype in HALVES for row in _select(rows, "log_space", dtype)):
        if row.gate_mean < 0:
            # with a long memory nine roundings of the output
            assert row.error > 5 * bench.ROUNDING[row.dtype]
        elif row.dtype == torch.bfloat16 or row.T == 4096:
            # worse than an answer of zero
            assert row.error > 1
        else:
            assert row.error > 100 * bench.ROUNDING[row.dtype]


def test_a_wrong_scan_exceeds_its_tolerance(monkeypatch):
    def slightly_slow(a, b):
        return scans.blelloch(a * (1 + 2**-20), b)

    subject = SUBJECTS["blelloch"]._replace(run=slightly_slow)
    monkeypatch.setitem(SUBJECTS, "blelloch", subject)
    wrong = bench.precision(quick=True, algorithms=["blelloch"])
    assert [row for row in wrong if row.error <= row.tolerance] == []


def test_nan_is_an_infinite_error(monkeypatch):
    subject = SUBJECTS["blelloch"]._replace(run=lambda a, b: (b * torch.nan, b))
    monkeypatch.setitem(SUBJECTS, "blelloch", subject)
    [row] = bench.precision(lengths=[4], gate_means=[0.0], algorithms=["blelloch"])
    assert isinf(row.error)


@pytest.mark.long
def test_half_precision_loses_little_at_every_gate():
    rows = bench.half_precision()
    assert [(row.dtype, row.algorithm, row.gate_mean) for row in rows] == [
        (dtype, name, mean)
        for dtype in HALVES
        for name in ("mingru", "minlstm")
        for mean in bench.HALF_GATE_MEANS
    ]
    assert [row for row in rows if not row.arithmetic < row.error < row.tolerance] == []
    assert {row.T for row in rows} == {4096}


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_a_state_kept_in_half_precision_would_exceed_that(monkeypatch, dtype):
    def loop(k, v):
        h = step_loop(*[x.to(dtype) for x in coefficients("mingru", [k.float(), v.float()])])
        return h, h[:, -1]

    monkeypatch.setitem(SUBJECTS, "mingru", SUBJECTS["mingru"]._replace(run=loop))
    [row, _] = bench.half_precision(gate_means=[-7.0], dtypes=[dtype])
    assert row.error > 4 * row.tolerance


@pytest.fixture(scope="module")
def layers():
    return bench.layer_precision(quick=True)


def test_layers_under_autocast_are_within_their_tolerances(layers):
    assert len(layers) == 4 * 3 * 3 * 2
    assert [row for row in layers if not row.error <= row.tolerance] == []
    free = {row.layer for row in layers if isinf(row.tolerance)}
    assert free == {"MinGRU in log space", "MinLSTM in log space"}


def test_log_space_layers_lose_what_ours_keep(layers):
    ours = [row for row in layers if "log" not in row.layer]
    theirs = [row for row in layers if "log" in row.layer]
    for row, log in zip(ours, theirs, strict=True):
        assert (log.dtype, log.T, log.gate_bias) == (row.dtype, row.T, row.gate_bias)
        if row.gate_bias >= 0:
            assert log.error > (40 if row.T == 256 else 200) * row.error
        elif row.dtype in HALVES:
            # short sums: it is worse, but not by much
            assert log.error > row.error


@pytest.mark.parametrize("kind", [MinGRU, MinLSTM])
def test_truth_of_a_layer_is_the_reference(kind):
    layer, x = _layer(kind, -7.0).double(), torch.randn(1, 300, 32, dtype=torch.float64)
    name = "mingru" if kind is MinGRU else "minlstm"
    gates = (x @ layer.weight_ih_l0.T + layer.bias_ih_l0).chunk(layer.num_gates, dim=-1)
    wanted = getattr(reference, name)(*gates)[0]
    torch.testing.assert_close(_evaluate(layer, x), wanted, rtol=1e-12, atol=0)


@pytest.mark.parametrize("recurrence", ["scan", "mingru", "minlstm"])
def test_truth_is_the_reference_bit_for_bit(recurrence):
    # three pieces, the last one short
    inputs = make_inputs(recurrence, draw_noise(600), 0.0, torch.float32)
    whole = getattr(reference, recurrence)(*[x.double() for x in inputs])[0]
    assert torch.equal(exact_states(recurrence, inputs), whole)


def test_printed_table_is_aligned(rows, capsys):
    bench.print_precision(rows)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(rows) + 2
    columns = {tuple(n for n, letter in enumerate(line) if letter == "|") for line in lines}
    assert len(columns) == 1


def test_sequential_cost():
    assert [bench.cost("sequential", T) for T in POWERS] == [(T, T) for T in POWERS]


def test_hillis_steele_cost():
    assert [bench.cost("hillis_steele", T) for T in POWERS] == [
        (2 * (T * log2(T) - T + 1), log2(T)) for T in POWERS
    ]


def test_blelloch_cost():
    assert [bench.cost("blelloch", T) for T in POWERS] == [(4 * T - 3, 2 * log2(T)) for T in POWERS]


def test_log_space_cost():
    # two prefix scans of 3 T - 2 operations and 2 log2 T steps, and five elementwise passes
    assert [bench.cost("log_space", T) for T in POWERS] == [
        (5 * T + 2 * (3 * T - 2), 4 + 4 * log2(T)) for T in POWERS
    ]


@pytest.mark.parametrize("T", [1, 3, 37, 1000])
def test_blelloch_cost_of_any_length(T):
    work, depth = bench.cost("blelloch", T)
    assert work <= 4 * T
    assert depth <= max(1, 2 * ceil(log2(T)))


def test_unpriced_operation_is_refused(monkeypatch):
    subject = SUBJECTS["sequential"]._replace(run=lambda a, b: (torch.sinh(b), b))
    monkeypatch.setitem(SUBJECTS, "sequential", subject)
    with pytest.raises(ValueError, match="no price is known for the operation 'sinh'"):
        bench.cost("sequential", 2)


def test_unknown_algorithm_is_refused():
    with pytest.raises(ValueError, match=r"must be one of sequential, .*, got 'mingru'"):
        bench.cost("mingru", 2)
