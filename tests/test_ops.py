"""Every backend of the operators against the reference in float64, and where others went wrong."""

import re

import pytest
import torch
from cases import (
    CASES,
    GATES,
    Case,
    Inputs,
    assert_close,
    expected,
    in_pieces,
    make_inputs,
    run,
)
from torch import bfloat16, float16, float32, float64

from minrnn import ops
from minrnn.ops import scans

NAN, INF = float("nan"), float("inf")


def _inputs(name: str, **case) -> Inputs:
    sizes = {"dtype": float32, "B": 2, "T": 6, "D": 3, "reason": "named by the test"}
    return make_inputs(name, Case(**sizes | case))


# trap 12
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("name", GATES)
def test_op_matches_reference(backend, name, case):
    inputs = make_inputs(name, case)
    actual = run(getattr(backend.ops, name), inputs)
    assert actual["h"].dtype == case.dtype
    assert actual["h_T"].dtype == (float64 if case.dtype == float64 else float32)
    assert_close(actual, expected(name, inputs))


# trap 12
@pytest.mark.parametrize("name", GATES)
def test_every_length_and_width_matches_reference(backend, name):
    sizes = [(T, 2) for T in (*range(10), 15, 16, 17, 31, 32, 33)]
    for T, D in [*sizes, *((3, D) for D in (0, 1, 7, 8, 9, 15, 16, 17, 31, 33))]:
        inputs = _inputs(name, T=T, D=D)
        assert_close(run(getattr(backend.ops, name), inputs), expected(name, inputs))


# trap 12
@pytest.mark.parametrize("name", GATES)
def test_each_result_hands_back_its_own_gradient(backend, name):
    inputs = _inputs(name, reset=True)
    for silent in ("dh", "dh_T"):
        one = inputs._replace(**{silent: torch.zeros_like(getattr(inputs, silent))})

        def alone(*args, result=0 if silent == "dh_T" else 1, **options):
            both = getattr(backend.ops, name)(*args, **options)
            return tuple(y if n == result else y.detach() for n, y in enumerate(both))

        assert_close(run(alone, one), expected(name, one))


@pytest.mark.parametrize("name", GATES)
def test_results_own_their_memory(backend, name):
    for T in (0, 1, 2):
        inputs = _inputs(name, T=T)
        given = [*inputs.gates.values(), inputs.h0]
        before = [x.clone() for x in given]
        h, h_T = getattr(backend.ops, name)(*given)
        h.fill_(NAN)
        assert h_T.isfinite().all()
        h_T.fill_(NAN)
        assert all(torch.equal(x, y) for x, y in zip(given, before, strict=True))


# trap 1
@pytest.mark.parametrize("dtype", [float32, float64, bfloat16, float16], ids=str)
@pytest.mark.parametrize("name", ["mingru", "minlstm"])
def test_slope_of_g_is_one_at_zero_and_a_quarter_below(backend, name, dtype):
    gates = [torch.zeros(1, 1, 1, dtype=dtype)] * (len(GATES[name]) - 1)
    for value, slope in ((0.0, 1.0), (-0.0, 1.0), (-torch.finfo(dtype).tiny, 0.25)):
        v = torch.full((1, 1, 1), value, dtype=dtype, requires_grad=True)
        h, h_T = getattr(backend.ops, name)(*gates, v)
        (dv,) = torch.autograd.grad(h.sum() + h_T.sum(), v)
        # twice the half open gate
        assert dv.item() == slope


# trap 2, trap 3
@pytest.mark.parametrize("state", [0.0, -3.0])
def test_state_may_be_zero_or_negative(backend, state):
    inputs = _inputs("mingru")
    inputs = inputs._replace(h0=torch.full_like(inputs.h0, state), dh=torch.zeros_like(inputs.dh))
    actual = run(backend.ops.mingru, inputs)
    decay = torch.sigmoid(-inputs.gates["k"].double()).prod(dim=1)
    assert_close({"dh0": actual["dh0"]}, {"dh0": decay * inputs.dh_T})
    assert_close(actual, expected("mingru", inputs))


# trap 4, trap 14, trap 18
@pytest.mark.parametrize("cuts", [[0, 5, 6, 13], [*range(14)], [0, 0, 13, 13]], ids=str)
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("dtype", [float32, bfloat16], ids=str)
@pytest.mark.parametrize("name", GATES)
def test_pieces_and_steps_equal_the_whole(backend, name, dtype, reverse, cuts):
    inputs = _inputs(name, dtype=dtype, B=3, T=13, reset=True, reverse=reverse)
    pieces = run(in_pieces(getattr(backend.ops, name), cuts), inputs)
    assert_close(pieces, expected(name, inputs))
    assert_close(pieces, run(getattr(backend.ops, name), inputs))


# trap 5
@pytest.mark.parametrize(("gate_mean", "limit"), [(-7.0, 5e-6), (0.0, 5e-7), (3.0, 5e-7)])
def test_float32_stays_exact_over_long_sequences(backend, gate_mean, limit):
    # the same numbers on every device
    k, v = torch.randn(2, 1, 65536, 4, device="cpu").to(torch.get_default_device())
    k = k + gate_mean
    h, h_T = backend.ops.mingru(k, v)
    # the reference would take minutes; the tree in float64 is held to it elsewhere
    k, v = k.double(), v.double()
    b = torch.sigmoid(k) * torch.where(v >= 0, v + 0.5, torch.sigmoid(v))
    wide, wide_T = scans.blelloch(torch.sigmoid(-k), b)
    # measured 3.8e-6 for the long memory of shut gates, 3.7e-7 and 2.6e-7 for the others
    torch.testing.assert_close(h.double(), wide, rtol=limit, atol=0)
    torch.testing.assert_close(h_T.double(), wide_T, rtol=limit, atol=0)


# trap 6, trap 7, trap 14
@pytest.mark.parametrize("dtype", [bfloat16, float16], ids=str)
@pytest.mark.parametrize("name", ["mingru", "minlstm"])
def test_half_precision_keeps_long_memories(backend, name, dtype):
    inputs = _inputs(name, dtype=dtype, T=512)
    gates = dict(inputs.gates)
    # open gates near exp(-7): a decay rounded to bfloat16 would be 1
    closing = "k" if name == "mingru" else "i"
    gates[closing] = gates[closing] - 7
    inputs = inputs._replace(gates=gates)
    assert_close(run(getattr(backend.ops, name), inputs), expected(name, inputs))


# trap 6
@pytest.mark.parametrize("name", GATES)
def test_autocast_changes_nothing(backend, name):
    inputs = _inputs(name, T=32)
    plain = run(getattr(backend.ops, name), inputs)
    with torch.autocast(backend.device, bfloat16):
        cast = run(getattr(backend.ops, name), inputs)
    assert all(torch.equal(plain[key], cast[key]) for key in plain)


# trap 7
def test_shut_gate_leaks_its_exact_share(backend):
    k = torch.tensor([20.0, 50.0, 80.0])[:, None, None]
    _, h_T = backend.ops.mingru(k, 0 * k, torch.ones(3, 1), candidate="identity")
    # 1 - sigmoid(20) is 0 in float32
    torch.testing.assert_close(h_T.double(), torch.exp(-k[:, 0].double()), rtol=1e-6, atol=0)


# trap 8
@pytest.mark.parametrize("dtype", [float32, float16], ids=str)
def test_normalized_gates_survive_where_both_underflow(backend, dtype):
    inputs = _inputs("minlstm", dtype=dtype)
    gates = {gate: x - 110 if gate != "v" else x for gate, x in inputs.gates.items()}
    actual = run(backend.ops.minlstm, inputs._replace(gates=gates))
    # there log sigmoid(x) = x, and only i - f is left of the gates
    k = gates["i"].double() - gates["f"].double()
    mingru = Inputs({"k": k, "v": gates["v"]}, inputs.h0, {}, inputs.dh, inputs.dh_T)
    wanted = expected("mingru", mingru)
    wanted |= {"df": -wanted["dk"], "di": wanted.pop("dk")}
    assert_close(actual, wanted)


# trap 8
@pytest.mark.parametrize("normalized", [True, False])
@pytest.mark.parametrize("dtype", [float32, float64, bfloat16, float16], ids=str)
def test_every_finite_pair_of_gates_has_its_gradients(backend, dtype, normalized):
    # from -7e8 on, float32 has no digits left for a shift by 40
    ends = [-3e38, -1e30, -1e9, -7e8, -1e5, -100.0, -41.0, -40.0, -19.0, -17.0, 0.0, 50.0, 3e38]
    # float16 ends at 65504
    ends = torch.tensor(ends).double().clamp(-6e4 if dtype == float16 else -4e38, 6e4).to(dtype)
    f, i = (x.reshape(1, 1, -1) for x in torch.meshgrid(ends, ends, indexing="ij"))
    inputs = _inputs("minlstm", dtype=dtype, B=1, T=1, D=f.shape[2], normalized=normalized)
    inputs = inputs._replace(gates={"f": f, "i": i, "v": inputs.gates["v"]})
    assert_close(run(backend.ops.minlstm, inputs), expected("minlstm", inputs))


# trap 8
def test_unnormalized_gates_integrate(backend):
    f = i = torch.full((1, 5, 1), 100.0)
    v = torch.ones(1, 5, 1)
    for normalized, h in ((False, [1, 2, 3, 4, 5]), (True, [0.5, 0.75, 0.875, 0.9375, 0.96875])):
        result, _ = backend.ops.minlstm(f, i, v, candidate="identity", normalized=normalized)
        assert result.flatten().tolist() == h


# trap 8, trap 13
@pytest.mark.parametrize("normalized", [True, False])
@pytest.mark.parametrize("name", GATES)
def test_extremes_stay_finite(backend, name, normalized):
    inputs = _inputs(name, T=40, normalized=normalized)
    # decays whose product underflows at once, gates shut and open
    ends = [-1.0, 0.0, 1e-30, 1.0] if name == "scan" else [-110.0, -100.0, -20.0, 20.0, 100.0]
    gates = {
        gate: torch.tensor(ends)[torch.randint(len(ends), x.shape)]
        for gate, x in inputs.gates.items()
    }
    inputs = inputs._replace(gates=gates)
    actual = run(getattr(backend.ops, name), inputs)
    assert all(x.isfinite().all() for x in actual.values())
    assert_close(actual, expected(name, inputs))


# trap 15
def test_gates_beyond_twenty_are_exact_in_float64(backend):
    f = torch.linspace(-40, 40, 33, dtype=float64)[:, None, None].expand(-1, 1, 33)
    i = f.transpose(0, 2)
    one = torch.ones(33, 33, dtype=float64)
    _, share = backend.ops.minlstm(f, i, 0 * f, one, candidate="identity")
    wanted = torch.sigmoid(f) / (torch.sigmoid(f) + torch.sigmoid(i))
    # measured 3.8e-15; torch's softplus is off by 2e-9 from 20 on
    torch.testing.assert_close(share, wanted[:, 0], rtol=8e-15, atol=0)


@pytest.mark.parametrize("dtype", [bfloat16, float16, float64], ids=str)
@pytest.mark.parametrize("name", GATES)
def test_state_of_another_dtype_is_taken(backend, name, dtype):
    inputs = _inputs(name)
    inputs = inputs._replace(h0=inputs.h0.to(dtype))
    actual = run(getattr(backend.ops, name), inputs)
    assert actual["h_T"].dtype == float32
    assert actual["dh0"].dtype == dtype
    # a double state gets a double gradient, of float32 arithmetic
    actual["dh0"] = actual["dh0"].float() if dtype == float64 else actual["dh0"]
    assert_close(actual, expected(name, inputs))


def _spoiled(inputs: Inputs, half: int, value: float) -> Inputs:
    """`value` in all that the first or the last three of six steps take in, forth and back."""
    gates = {gate: x.clone() for gate, x in inputs.gates.items()}
    dh, dh_T, h0 = inputs.dh.clone(), inputs.dh_T.clone(), inputs.h0
    for x in (*gates.values(), dh):
        x[:, 3 * half : 3 * half + 3] = value
    if h0 is not None:
        h0 = h0.clone()
        h0[half] = dh_T[half] = value
    return Inputs(gates, h0, inputs.options, dh, dh_T)


# trap 11
@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("cut", ["reset", "packed"])
@pytest.mark.parametrize("name", GATES)
def test_nothing_broken_crosses_a_cut(backend, name, cut, reverse, value):
    bounds = (0, 3, 6) if cut == "packed" else None
    inputs = _inputs(name, B=1, h0=cut == "packed", cu_seqlens=bounds, reverse=reverse)
    if cut == "reset":
        inputs.options["reset"] = torch.arange(6)[None] == (2 if reverse else 3)
    for half in (0, 1):
        broken = run(getattr(backend.ops, name), _spoiled(inputs, half, value))
        clean = run(getattr(backend.ops, name), _spoiled(inputs, half, 0.0))
        whole = slice(3, 6) if half == 0 else slice(0, 3)
        for key in broken:
            if key not in ("h_T", "dh0"):
                assert torch.equal(broken[key][:, whole], clean[key][:, whole]), key
            elif cut == "packed":
                assert torch.equal(broken[key][1 - half], clean[key][1 - half]), key


@pytest.mark.parametrize("name", GATES)
def test_broken_input_is_not_hidden(backend, name):
    inputs = _inputs(name)
    inputs.gates[GATES[name][-1]][0, -1] = NAN
    h, h_T = getattr(backend.ops, name)(*inputs.gates.values(), inputs.h0)
    for last in (h[:, -1], h_T):
        assert last[0].isnan().all()
        assert last[1].isfinite().all()


# trap 11
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("name", GATES)
def test_reset_at_the_first_step_drops_h0(backend, name, reverse):
    inputs = _inputs(name, reverse=reverse)
    wanted = expected(name, inputs._replace(h0=None))
    reset = torch.zeros(2, 6, dtype=torch.bool)
    reset[:, -1 if reverse else 0] = True
    broken = torch.full_like(inputs.h0, NAN)
    inputs = inputs._replace(h0=broken, options=inputs.options | {"reset": reset})
    actual = run(getattr(backend.ops, name), inputs)
    assert actual.pop("dh0").eq(0).all()
    assert_close(actual, wanted)


X, META = torch.zeros(2, 3, 4), torch.zeros(2, 3, 4, device="meta")
BAD = (
    ({"candidate": "relu"}, "`candidate` must be one of 'g', 'identity', 'tanh', got 'relu'"),
    ({"k": 1.0}, "`k` must be a Tensor, got float"),
    ({"v": [1.0]}, "`v` must be a Tensor, got list"),
    ({"k": X.long()}, "`k` must have dtype float32, float64, bfloat16, float16, got torch.int64"),
    ({"v": X.double()}, "`v` must have the dtype of `k`, torch.float32, got torch.float64"),
    ({"k": X[0]}, "`k` must have shape (B, T, D), got (3, 4)"),
    ({"v": X[0]}, "`v` must have shape (B, T, D), got (3, 4)"),
    ({"v": X[:, :2]}, "`v` must have shape (B, T, D) = (2, 3, 4), got (2, 2, 4)"),
    ({"v": META}, "`v` must be on cpu like the gates, got meta"),
    ({"h0": 0.0}, "`h0` must be a Tensor, got float"),
    ({"h0": X[:, 0].long()}, "`h0` must have a floating dtype, got torch.int64"),
    ({"h0": X[:, 0, :3]}, "`h0` must have shape (B, D) = (2, 4), got (2, 3)"),
    ({"h0": META[:, 0]}, "`h0` must be on cpu like the gates, got meta"),
    ({"reset": [True]}, "`reset` must be a Tensor, got list"),
    ({"reset": X[:, :, 0]}, "`reset` must have dtype torch.bool, got torch.float32"),
    ({"reset": X.bool()}, "`reset` must have shape (B, T) = (2, 3), got (2, 3, 4)"),
    ({"reset": META[:, :, 0].bool()}, "`reset` must be on cpu like the gates, got meta"),
    ({"cu_seqlens": torch.arange(2)}, "`cu_seqlens` needs a batch of one row, B = 1, got B = 2"),
)
BAD_BOUNDS = (
    ([0, 3], "`cu_seqlens` must be a Tensor, got list"),
    (torch.tensor([0.0, 3.0]), "`cu_seqlens` must have dtype int32 or int64, got torch.float32"),
    (torch.tensor([[0, 3]]), "`cu_seqlens` must have shape (N + 1,), got (1, 2)"),
    (torch.tensor([], dtype=torch.int32), "`cu_seqlens` must have shape (N + 1,), got (0,)"),
    (torch.tensor([1, 3]), "`cu_seqlens` must rise from 0 to T = 3, got [1, 3]"),
    (torch.tensor([0, 2]), "`cu_seqlens` must rise from 0 to T = 3, got [0, 2]"),
    (torch.tensor([0, 2, 1, 3]), "`cu_seqlens` must rise from 0 to T = 3, got [0, 2, 1, 3]"),
    (torch.arange(10), "`cu_seqlens` must rise from 0 to T = 3, got [0, 1, ..., 9]"),
    (torch.tensor([0, 3], device="meta"), "`cu_seqlens` must be on cpu like the gates, got meta"),
    (torch.tensor([0, 1, 3]), "`h0` must have shape (N, D) = (2, 4), got (1, 4)"),
)
ROW = {"k": X[:1], "v": X[:1], "h0": X[:1, 0]}
BAD += tuple((ROW | {"cu_seqlens": x}, message) for x, message in BAD_BOUNDS)


@pytest.mark.parametrize(("change", "message"), BAD, ids=lambda x: x if isinstance(x, str) else "")
def test_bad_input_is_named(change, message):
    kind = TypeError if "Tensor" in message or "dtype" in message else ValueError
    with pytest.raises(kind, match=f"^{re.escape(message)}$"):
        ops.mingru(**{"k": X, "v": X} | change)


@pytest.mark.parametrize("value", [None, "no", 0])
def test_flags_are_bools(value):
    # torch takes None for False
    for name, gates in GATES.items():
        flags = ["reverse", "normalized"] if name == "minlstm" else ["reverse"]
        for flag in flags:
            with pytest.raises(TypeError, match=f"`{flag}` must be a bool, got {value!r}"):
                getattr(ops, name)(*[X] * len(gates), **{flag: value})


@pytest.mark.parametrize("name", GATES)
def test_bad_gate_is_named_as_in_the_signature(name):
    for n, gate in enumerate(GATES[name]):
        gates = [X] * len(GATES[name])
        gates[n] = X.bool()
        with pytest.raises(TypeError, match=f"^`{gate}` must have dtype float32, "):
            getattr(ops, name)(*gates)
