"""The reference against NumPy in float64, against numbers worked by hand, and its gradients."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from cases import CASES, GATES, Inputs, assert_close, make_inputs, run
from torch import Tensor
from torch.autograd import gradcheck

from minrnn.ops import reference

Array = np.ndarray


def _numpy_coefficients(name: str, gates: list[Array], options: dict) -> tuple[Array, Array]:
    """The decay and the addend of each step, by the textbook formulas."""

    def sigmoid(x: Array) -> Array:
        return 1 / (1 + np.exp(-x))

    *gates, v = gates
    if name == "scan":
        return gates[0], v
    candidate = {
        "g": lambda v: np.where(v < 0, sigmoid(v), v + 0.5),
        "identity": lambda v: v,
        "tanh": lambda v: 2 * sigmoid(2 * v) - 1,
    }[options["candidate"]]
    if name == "mingru":
        z = sigmoid(gates[0])
        return 1 - z, z * candidate(v)
    f, i = sigmoid(gates[0]), sigmoid(gates[1])
    total = f + i if options["normalized"] else 1.0
    return f / total, i / total * candidate(v)


def _numpy_run(name: str, inputs: Inputs) -> dict[str, Tensor]:
    """h and h_T, one number at a time."""
    gates = [x.numpy() for x in inputs.gates.values()]
    a, b = _numpy_coefficients(name, gates, inputs.options)
    B, T, D = b.shape
    bounds = inputs.options.get("cu_seqlens", torch.tensor([0, T])).tolist()
    sequences = [(row, *ends) for row in range(B) for ends in pairwise(bounds)]
    reset = inputs.options.get("reset", torch.zeros(B, T, dtype=torch.bool)).numpy()
    h, h_T = np.full((B, T, D), np.nan), np.zeros((len(sequences), D))
    for n, (row, start, stop) in enumerate(sequences):
        steps = range(stop - 1, start - 1, -1) if inputs.options["reverse"] else range(start, stop)
        for d in range(D):
            state = 0.0 if inputs.h0 is None else inputs.h0[n, d].item()
            for t in steps:
                state = a[row, t, d] * (0.0 if reset[row, t] else state) + b[row, t, d]
                h[row, t, d] = state
            h_T[n, d] = state
    return {"h": torch.from_numpy(h), "h_T": torch.from_numpy(h_T)}


def test_unwritten_memory_is_nan():
    assert torch.empty(3).isnan().all()


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("name", GATES)
def test_reference_matches_numpy(name, case):
    inputs = make_inputs(name, case).double()
    actual = run(getattr(reference, name), inputs)
    assert_close({key: actual[key] for key in ("h", "h_T")}, _numpy_run(name, inputs))


def _column(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)[None, :, None]


def _flat(h: Tensor, h_T: Tensor) -> tuple[list[float], list[float]]:
    return h.flatten().tolist(), h_T.flatten().tolist()


HALF_OPEN = _column(0.0, 0.0, 0.0)
V = _column(2.0, 4.0, 8.0)


@pytest.mark.parametrize(
    ("options", "h", "h_T"),
    [
        ({}, [1.0, 2.5, 5.25], [5.25]),
        ({"h0": [16.0]}, [9.0, 6.5, 7.25], [7.25]),
        ({"reverse": True}, [3.0, 4.0, 4.0], [3.0]),
        ({"h0": [16.0], "reverse": True}, [5.0, 8.0, 12.0], [5.0]),
        ({"h0": [16.0], "reset": [1, 0, 1]}, [1.0, 2.5, 4.0], [4.0]),
        ({"h0": [16.0], "reset": [0, 1, 0], "reverse": True}, [2.0, 2.0, 12.0], [2.0]),
        ({"h0": [4.0, 7.0, 12.0], "cu_seqlens": [0, 1, 1, 3]}, [3, 8, 8], [3, 7, 8]),
        (
            {"h0": [4.0, 7.0, 12.0], "cu_seqlens": [0, 1, 1, 3], "reverse": True},
            [3.0, 7.0, 10.0],
            [3.0, 7.0, 7.0],
        ),
    ],
    ids=lambda x: "" if isinstance(x, list) else "-".join(x) or "plain",
)
def test_mingru_by_hand(options, h, h_T):
    given = {
        "h0": lambda x: torch.tensor(x, dtype=torch.float64)[:, None],
        "reset": lambda x: torch.tensor([x], dtype=torch.bool),
        "cu_seqlens": torch.tensor,
        "reverse": bool,
    }
    options = {key: given[key](x) for key, x in options.items()}
    result = reference.mingru(HALF_OPEN, V, **options, candidate="identity")
    assert _flat(*result) == (h, h_T)


def test_scan_by_hand():
    a, b = _column(2.0, -1.0, 0.0), _column(1.0, 1.0, 5.0)
    assert _flat(*reference.scan(a, b, torch.tensor([[3.0]]))) == ([7.0, -6.0, 5.0], [5.0])


@pytest.mark.parametrize(("normalized", "h"), [(True, [0.8, 2.08]), (False, [1.0, 2.75])])
def test_minlstm_by_hand(normalized, h):
    # sigmoid(log 3) = 3/4 and sigmoid(0) = 1/2: divided by their sum 3/5 and 2/5
    f, i, v = _column(*[np.log(3.0)] * 2), _column(0.0, 0.0), _column(2.0, 4.0)
    result, h_T = reference.minlstm(f, i, v, candidate="identity", normalized=normalized)
    torch.testing.assert_close(result, _column(*h))
    assert torch.equal(h_T, result[:, -1])


@pytest.mark.parametrize(
    ("candidate", "expected"),
    [
        ("g", [0.25, 0.5, 0.5, 1.5]),
        ("identity", [-np.log(3.0), -0.0, 0.0, 1.0]),
        ("tanh", [-0.8, 0.0, 0.0, (np.e**2 - 1) / (np.e**2 + 1)]),
    ],
)
def test_candidates_by_hand(candidate, expected):
    v = _column(-np.log(3.0), -0.0, 0.0, 1.0)
    # a gate this far open lets nothing through but the candidate
    h, _ = reference.mingru(torch.full_like(v, 100.0), v, candidate=candidate)
    torch.testing.assert_close(h, _column(*expected))


# trap 1
def test_slope_of_g_by_hand():
    v = _column(-np.log(3.0), -0.0, 0.0, 1.0).requires_grad_()
    h, _ = reference.mingru(torch.full_like(v, 100.0), v)
    (slope,) = torch.autograd.grad(h.sum(), v)
    torch.testing.assert_close(slope, _column(3 / 16, 1.0, 1.0, 1.0))


# trap 7, trap 8, trap 15
def test_saturated_gates_by_hand():
    zero, h0 = _column(0.0), torch.ones(1, 1, dtype=torch.float64)
    # 1 - z where 1 - sigmoid(50) is 0, f' where sigmoid(-800) is 0, f' where softplus is cut short
    _, leak = reference.mingru(_column(50.0), zero, h0, candidate="identity")
    _, share = reference.minlstm(_column(-800.0), _column(-801.0), zero, h0, candidate="identity")
    _, tail = reference.minlstm(_column(-20.5), _column(0.0), zero, h0, candidate="identity")
    sigmoid = 1 / (1 + np.exp([-50.0, -1.0, 20.5]))
    wanted = [np.exp(-50) * sigmoid[0], sigmoid[1], sigmoid[2] / (sigmoid[2] + 0.5)]
    actual = torch.cat([leak, share, tail]).flatten()
    torch.testing.assert_close(actual, torch.tensor(wanted), rtol=1e-14, atol=0)


def test_half_precision_rounds_only_h():
    k, v = torch.randn(2, 1, 9, 3, dtype=torch.bfloat16)
    h, h_T = reference.mingru(k, v)
    wide_h, wide_h_T = reference.mingru(k.float(), v.float())
    assert torch.equal(h, wide_h.bfloat16())
    assert torch.equal(h_T, wide_h_T)


# trap 11
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_reset_drops_a_broken_state(value):
    v = _column(value, 2.0, 4.0)
    reset = torch.tensor([[False, True, False]])
    h, _ = reference.mingru(HALF_OPEN, v, candidate="identity", reset=reset)
    assert h[0, 1:, 0].tolist() == [1.0, 2.5]


@pytest.mark.parametrize("candidate", ["g", "identity", "tanh"])
@pytest.mark.parametrize("name", ["mingru", "minlstm"])
def test_reference_gradients_match_finite_differences(name, candidate):
    op = getattr(reference, name)
    gates = torch.randn(len(GATES[name]), 2, 4, 2, dtype=torch.float64)
    h0 = torch.randn(2, 2, dtype=torch.float64)
    reset = torch.tensor([[False, False, True, False], [True, False, False, False]])
    inputs = [x.clone().requires_grad_() for x in (*gates, h0)]
    assert gradcheck(lambda *x: op(*x, candidate=candidate, reset=reset), inputs)


def test_unknown_options_are_refused():
    # a candidate of another name was the identity
    x = torch.zeros(1, 2, 3)
    for name in ("mingru", "minlstm"):
        with pytest.raises(ValueError, match=r"`candidate` must be one of 'g', .* got 'G'"):
            getattr(reference, name)(*[x] * len(GATES[name]), candidate="G")
    with pytest.raises(TypeError, match="`normalized` must be a bool, got 'no'"):
        reference.minlstm(x, x, x, normalized="no")
    for name, gates in GATES.items():
        with pytest.raises(TypeError, match="`reverse` must be a bool, got None"):
            getattr(reference, name)(*[x] * len(gates), reverse=None)
