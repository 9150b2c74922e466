"""Infinite numbers, NaN and overflow in the kernels: they reach the steps that they must, no other.

A width below 8 composes several steps into one unless there are resets, 8 has a row in a register,
40 one in memory; the lengths go beyond a tile of 8,192 numbers.
"""

import pytest
import torch
from cases import GATES, TOLERANCES, Case, Inputs, in_pieces, make_inputs, operator, run
from torch import Tensor, float32, float64

from minrnn import ops
from minrnn.ops import reference, scans

NAN, INF = float("nan"), float("inf")
BROKEN = (INF, -INF, NAN)
SIZES = (
    (8300, 1, False),
    (2800, 3, False),
    (2800, 3, True),
    (1100, 8, False),
    (300, 40, False),
    (300, 40, True),
)


def _alike(actual: Tensor, wanted: Tensor, what: str) -> None:
    """NaN and infinities stand at the same places, and between them is no more than rounding."""
    # both are of float32
    limit = 2 * TOLERANCES[float32]
    torch.testing.assert_close(
        actual, wanted, rtol=limit, atol=limit, equal_nan=True, msg=f"{{}}: {what}".format
    )


def _spoiled(name: str, T: int, D: int) -> tuple[Inputs, Tensor]:
    """Inputs with a broken number in each row but the last, and the step that it comes in at."""
    places = [("h0", 0), *((gate, t) for gate in GATES[name] for t in (5, T // 2, T - 1))]
    rows = [(*place, value) for place in places for value in BROKEN]
    inputs = make_inputs(name, Case(float32, len(rows) + 1, T, D, "broken"))
    # in the last quarter a product of 16 decays is 0 in float32, and 0 * INF would be NaN
    decay = inputs.gates[GATES[name][0]][:, T - T // 4 :]
    decay.copy_({"scan": decay / 1000, "mingru": decay + 10, "minlstm": decay - 20}[name])
    for row, (gate, t, value) in enumerate(rows):
        place = inputs.h0 if gate == "h0" else inputs.gates[gate][:, t]
        assert place is not None
        place[row, D // 2] = value
    return inputs, torch.tensor([*(t for _, t, _ in rows), T])


@pytest.mark.parametrize(("T", "D", "reset"), SIZES)
@pytest.mark.parametrize("name", GATES)
def test_broken_numbers_reach_what_single_steps_reach(
    name: str, T: int, D: int, reset: bool
) -> None:
    inputs, come_in = _spoiled(name, T, D)
    cut = T // 2 + 20
    if reset:
        inputs.options["reset"] = torch.zeros(len(come_in), T, dtype=torch.bool)
        inputs.options["reset"][:, cut] = True
    steps = in_pieces(getattr(reference, name), [*range(T + 1)])
    with torch.no_grad():
        (h, h_T), wanted = (
            f(*inputs.gates.values(), inputs.h0, **inputs.options) for f in (operator(name), steps)
        )
    _alike(h, wanted[0], "h")
    _alike(h_T, wanted[1], "h_T")
    # (rows, T): a step at or after the broken number, with no reset between
    first, step = come_in[:, None], torch.arange(T)
    met = (step >= first) & ~((step >= cut) & (first < cut) & reset)
    broken = ~h.isfinite()
    assert not broken[~met].any()
    assert broken.any(dim=(0, 1)).nonzero().flatten().tolist() == [D // 2]
    # NaN is every third; infinity may be squashed by its activation
    assert torch.equal(broken[2::3, :, D // 2], met[2::3])


@pytest.mark.parametrize(("T", "D", "reset"), SIZES)
@pytest.mark.parametrize("name", GATES)
def test_broken_gradients_reach_the_steps_before_them(
    name: str, T: int, D: int, reset: bool
) -> None:
    rows = [(t, value) for t in (5, T // 2, T - 1, T) for value in BROKEN]
    clean = make_inputs(name, Case(float32, len(rows), T, D, "clean"))
    cut = T // 2 - 20
    if reset:
        clean.options["reset"] = torch.zeros(len(rows), T, dtype=torch.bool)
        clean.options["reset"][:, cut] = True
    spoiled = clean._replace(dh=clean.dh.clone(), dh_T=clean.dh_T.clone())
    for row, (t, value) in enumerate(rows):
        place = spoiled.dh_T if t == T else spoiled.dh[:, t]
        place[row, D // 2] = value
    # (rows, T): a step at or before the broken one, with no reset between
    last, step = torch.tensor([t for t, _ in rows])[:, None], torch.arange(T)
    met = (step <= last) & ~((step < cut) & (last >= cut) & reset)
    found, wanted = run(operator(name), spoiled), run(operator(name), clean)
    for key in ("h", "h_T"):
        assert torch.equal(found[key], wanted[key])
    for gate in GATES[name]:
        broken = ~found[f"d{gate}"].isfinite()
        assert torch.equal(broken[..., D // 2], met)
        _alike(found[f"d{gate}"][~broken], wanted[f"d{gate}"][~broken], gate)
        assert broken.sum() == met.sum()
    broken = ~found["dh0"].isfinite()
    assert torch.equal(broken[:, D // 2], met[:, 0])
    assert broken.sum() == met[:, 0].sum()


def _cliffs(T: int, D: int, dtype: torch.dtype) -> Inputs:
    """Rows whose states stay small, though products of their decays, or sums, do not."""
    large = 1e30 if dtype == float32 else 1e250
    a, b = torch.full((5, T, D), 0.5, dtype=dtype), torch.zeros(5, T, D, dtype=dtype)
    h0 = torch.zeros(5, D, dtype=dtype)
    # to and fro
    a[0, ::2], a[0, 1::2], h0[0] = large, 1 / large, 1.0
    # two large decays of a state 0 overflow, and times 0 give NaN
    a[1, 100:102], a[1, 102:104], b[1, 300:] = large, 1 / large, 1.0
    # two small decays of a large state underflow, and a large one cannot bring it back
    a[2], h0[2] = 1.0, 1.0
    a[2, 200:204] = torch.tensor([large, 1 / large, 1 / large, large], dtype=dtype)[:, None]
    # |a| <= 1, but two of b overflow without the state that they add to
    most = torch.finfo(dtype).max
    a[3, :150], a[3, 150:], h0[3] = 1.0, 0.5, -most
    b[3, 120:122], b[3, 130:], b[3, 122] = most, 1.0, -most
    # signs, and a decay of 0 behind which nothing is left
    a[4, ::3], a[4, 1::3], a[4, 2::3], h0[4], b[4] = -large, -1 / large, -1.0, 1.0, 1 / large
    a[4, 250] = 0.0
    # where a large state meets no large gradient
    dh, dh_T = torch.zeros_like(b), torch.zeros_like(h0)
    dh[0, 301] = dh[1, :50] = dh[4, 200] = dh_T[1:4] = 1.0
    return Inputs({"a": a, "b": b}, h0, {}, dh, dh_T)


def _flipped(inputs: Inputs) -> Inputs:
    gates = {gate: x.flip(1) for gate, x in inputs.gates.items()}
    return inputs._replace(gates=gates, dh=inputs.dh.flip(1), options={"reverse": True})


# every remainder by the number of composed steps: one lane of them may overflow where no other does
@pytest.mark.parametrize("dtype", [float32, float64], ids=str)
@pytest.mark.parametrize("T", range(500, 516))
def test_small_states_stay_right_where_products_are_not_small(T: int, dtype: torch.dtype) -> None:
    # the channels are all the same
    wanted = run(scans.sequential, _cliffs(T, 1, dtype))
    assert all(x.isfinite().all() for x in wanted.values())
    for D in (1, 2, 3, 5, 7, 8):
        inputs = _cliffs(T, D, dtype)
        forth, back = run(ops.scan, inputs), run(ops.scan, _flipped(inputs))
        for key, x in wanted.items():
            x = x.expand(*x.shape[:-1], D)
            torch.testing.assert_close(forth[key], x, rtol=1e-6, atol=0)
            x = x.flip(1) if x.dim() == 3 else x
            torch.testing.assert_close(back[key], x, rtol=1e-6, atol=0)
