"""Weights of other public minGRUs: the layer read computes what its layout's equation says.

The equations stand here in float64, written out for each layout's keys; nothing of another package
is needed. Where one is installed (`make .venv/peers`), its own output is compared too.
"""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from minrnn.bench import peers
from minrnn.layers import MinGRU, MinLSTM, read_weights

B, T, WIDTH, D = 2, 9, 5, 7
Weights = dict[str, Tensor]


@pytest.fixture(autouse=True)
def _float64() -> Any:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def _g(x: Tensor) -> Tensor:
    return torch.where(x >= 0, x + 0.5, torch.sigmoid(x))


def _loop(a: Tensor, b: Tensor, h0: Tensor | float = 0.0) -> Tensor:
    """h_t = a_t * h_{t-1} + b_t."""
    h, states = h0 * torch.ones_like(b[:, 0]), []
    for t in range(b.shape[1]):
        h = a[:, t] * h + b[:, t]
        states.append(h)
    return torch.stack(states, dim=1)


def _gru(k: Tensor, v: Tensor, h0: Tensor | float = 0.0) -> Tensor:
    return _loop(torch.sigmoid(-k), torch.sigmoid(k) * _g(v), h0)


def _lstm(f: Tensor, i: Tensor, v: Tensor, normalized: bool, h0: Tensor | float = 0.0) -> Tensor:
    f, i = torch.sigmoid(f), torch.sigmoid(i)
    total = f + i if normalized else 1.0
    return _loop(f / total, i / total * _g(v), h0)


def _linear(name: str, rows: int, columns: int, bias: bool) -> Weights:
    weights = {f"{name}.weight": torch.randn(rows, columns)}
    return weights | ({f"{name}.bias": torch.randn(rows)} if bias else {})


def _apply(weights: Weights, name: str, x: Tensor) -> Tensor:
    return F.linear(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"))


def _check(layer: nn.Module, x: Tensor, expected: Tensor) -> None:
    """The whole sequence, one step, and a sequence in two pieces."""
    torch.testing.assert_close(layer(x)[0], expected)
    torch.testing.assert_close(layer(x[:, :1])[0], expected[:, :1])
    first, state = layer(x[:, :4])
    torch.testing.assert_close(torch.cat([first, layer(x[:, 4:], state)[0]], 1), expected)


@pytest.mark.parametrize("projected", [False, True])
def test_minGRU_pytorch(projected: bool) -> None:
    x = torch.randn(B, T, WIDTH)
    for name, gates in {"to_hidden_and_gate": 2, "to_hidden_and_f_i_gate": 3}.items():
        weights = _linear(name, gates * D, WIDTH, bias=False)
        weights |= _linear("to_out", WIDTH, D, bias=False) if projected else {}
        v, *rest = _apply(weights, name, x).chunk(gates, dim=-1)
        h = _gru(rest[0], v) if gates == 2 else _lstm(*rest, v, normalized=True)
        layer = read_weights({f"layers.0.2.{key}": w for key, w in weights.items()}, "layers.0.2.")
        assert (layer.hidden_size, layer.proj_size) == (D, WIDTH if projected else 0)
        assert layer.h_0 is None
        assert layer.bias is False
        _check(layer, x, _apply(weights, "to_out", h) if projected else h)


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize(
    ("gates", "normalized"), [(2, None), (3, None), (3, False), (3, True)], ids=str
)
def test_layers_of_the_authors(gates: int, normalized: bool | None, learned: bool) -> None:
    x = torch.randn(B, T, WIDTH)
    weights = _linear("to_hidden_and_gate", gates * D, WIDTH, bias=True)
    weights |= _linear("to_out", WIDTH, D, bias=True)
    h0: Tensor | float = 0.0
    if learned:
        weights["init_hidden_state"] = torch.randn(D)
        h0 = _g(weights["init_hidden_state"])
    v, *rest = _apply(weights, "to_hidden_and_gate", x).chunk(gates, dim=-1)
    h = _gru(*rest, v, h0) if gates == 2 else _lstm(*rest, v, bool(normalized), h0)
    layer = read_weights(weights, normalized=normalized)
    assert type(layer) is (MinGRU if gates == 2 else MinLSTM)
    _check(layer, x, _apply(weights, "to_out", h))
    # the bias of the projection lives in a channel of its own, whose state is 1
    h_n = layer(x)[1] if gates == 2 else layer(x)[1][0]
    torch.testing.assert_close(h_n[0, :, :D], h[:, -1])
    assert torch.equal(h_n[0, :, D], torch.ones(B))
    assert (layer.h_0 is not None and layer.h_0.requires_grad) == learned


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_constant_channel_holds_in_every_dtype(dtype: torch.dtype) -> None:
    for gates in (2, 3):
        weights = _linear("to_hidden_and_gate", gates * D, WIDTH, bias=True)
        weights |= _linear("to_out", WIDTH, D, bias=True)
        layer = read_weights({key: x.to(dtype) for key, x in weights.items()})
        assert layer.weight_ih_l0.dtype == dtype
        h_n = layer(torch.randn(B, T, WIDTH).to(dtype))[1]
        assert torch.equal((h_n[0] if gates == 3 else h_n)[0, :, D], torch.ones(B).float())


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", ["to_gate_hidden", "layers.{}.gate_hidden", "to_gate_hidden.{}"])
def test_cheind(name: str, bias: bool) -> None:
    x = y = torch.randn(B, T, WIDTH)
    weights: Weights = {}
    count = 2 if "{}" in name else 1
    for n in range(count):
        weights |= _linear(name.format(n), 2 * D, D if n else WIDTH, bias)
        y = _gru(*_apply(weights, name.format(n), y).chunk(2, dim=-1), h0=0.5)
    layer = read_weights(weights)
    assert layer.num_layers == count
    assert not layer.h_0.requires_grad
    _check(layer, x, y)


# trap 10
def test_cheinds_two_directions_are_not_ours() -> None:
    x = torch.randn(B, T, WIDTH)
    weights = {f"rnn.{k}": w for k, w in _linear("to_gate_hidden", 2 * D, WIDTH, True).items()}
    layer = read_weights(weights, "rnn.")
    forth, back = layer(x)[0], layer(x.flip(1))[0]
    theirs = torch.cat([forth, back], dim=-1)
    ours = MinGRU(WIDTH, D, batch_first=True, bidirectional=True, learn_h0=True)
    state = {key + end: w for key, w in layer.state_dict().items() for end in ("", "_reverse")}
    both = torch.cat([layer.h_0, layer.h_0])
    ours.load_state_dict({k: w for k, w in state.items() if "h_0" not in k} | {"h_0": both})
    # beside step t theirs has step T - 1 - t of the way back
    assert not torch.allclose(ours(x)[0], theirs)
    torch.testing.assert_close(ours(x)[0], torch.cat([forth, back.flip(1)], dim=-1))


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_mingru_scans(bias: bool, learned: bool) -> None:
    x = torch.randn(B, T, WIDTH)
    weights = _linear("linear_z", D, WIDTH, bias) | _linear("linear_h", D, WIDTH, bias)
    weights |= {"h0_pre": torch.randn(1, 1, D)} if learned else {}
    h0 = _g(weights["h0_pre"][0]) if learned else 0.5
    layer = read_weights(weights)
    assert layer.h_0.requires_grad == learned
    _check(layer, x, _gru(_apply(weights, "linear_z", x), _apply(weights, "linear_h", x), h0))


def test_weights_are_copied() -> None:
    weights = _linear("to_gate_hidden", 2 * D, WIDTH, bias=True)
    kept = {key: x.clone() for key, x in weights.items()}
    layer = read_weights(weights)
    with torch.no_grad():
        layer.weight_ih_l0.zero_()
        layer.bias_ih_l0.zero_()
    assert all(torch.equal(x, kept[key]) for key, x in weights.items())


GRU, LSTM = "to_hidden_and_gate", "to_hidden_and_f_i_gate"
STACK = {"layers.0.gate_hidden.weight": torch.ones(6, 2)}
BAD = [
    ({"weight_ih_l0": torch.ones(4, 2)}, "got the keys weight_ih_l0; known are: minGRU of minGRU-"),
    ({}, "known layout under `prefix` = '', got the keys ;"),
    ({str(n): torch.ones(1) for n in range(9)}, "0, 1, 2, 3, 4, 5, 6, 7 and 1 more"),
    ({f"{LSTM}.weight": torch.ones(4, 2)}, rf"`{LSTM}.weight` must have shape \(3, 2\), got \(4"),
    ({f"{GRU}.weight": torch.ones(4, 2, 1, 1)}, r"\(rows, features\), got \(4, 2, 1, 1\)"),
    (
        {f"{GRU}.weight": torch.ones(4, 2), "to_out.weight": torch.ones(2, 3)},
        r"`to_out.weight` must have shape \(2, 2\), got \(2, 3\)",
    ),
    (
        {f"{GRU}.weight": torch.ones(4, 2), "init_hidden_state": torch.ones(3)},
        r"`init_hidden_state` must have shape \(2,\), got \(3,\)",
    ),
    (
        {f"{GRU}.weight": torch.ones(4, 2), f"{GRU}.bias": torch.ones(3)},
        rf"`{GRU}.bias` must have shape \(4,\), got \(3,\)",
    ),
    (STACK | {"layers.0.norm.weight": torch.ones(2)}, "got also layers.0.norm.weight"),
    (
        STACK | {"layers.1.gate_hidden.weight": torch.ones(8, 3)},
        r"`layers.1.gate_hidden.weight` must have shape \(6, 3\), got \(8, 3\)",
    ),
    (
        STACK
        | {"layers.1.gate_hidden.weight": torch.ones(6, 3)}
        | {"layers.1.gate_hidden.bias": torch.ones(6)},
        "`layers.0.gate_hidden.bias` and `layers.1.gate_hidden.bias` must be there both",
    ),
    ({"linear_z.weight": torch.ones(3, 2)}, r"`linear_h.weight` must have shape .*, got none"),
    (
        {f"linear_{one}.weight": torch.ones(3, 2) for one in "zhs"},
        "no more than the MinGRU of mingru-scans does .* got also linear_s.weight",
    ),
]


@pytest.mark.parametrize(("weights", "message"), BAD)
def test_unknown_weights_are_named(weights: Weights, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_weights(weights)


def test_bad_arguments_are_named() -> None:
    weights = _linear(GRU, 4, 2, bias=False)
    with pytest.raises(ValueError, match=r"`normalized` must be None .*, got False"):
        read_weights(weights, normalized=False)
    with pytest.raises(ValueError, match=r"under `prefix` = 'rnn.', got the keys to_hidden"):
        read_weights(weights, "rnn.")
    with pytest.raises(TypeError, match=r"state_dict\['to_hidden_and_gate.weight'\]` must be a T"):
        read_weights({f"{GRU}.weight": [1.0]})  # type: ignore[dict-item]


# the packages themselves


def _peer(package: str, module: str, name: str) -> Any:
    try:
        return getattr(peers.require(package, module), name)
    except peers.MissingPeerError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("expansion", [1.0, 2.0])
@pytest.mark.parametrize("name", ["minGRU", "minLSTM"])
def test_package_minGRU_pytorch(name: str, expansion: float) -> None:
    theirs = _peer("minGRU-pytorch", f"minGRU_pytorch.{name}", name)(WIDTH, expansion)
    layer, x = read_weights(theirs.state_dict()), torch.randn(B, T, WIDTH)
    _check(layer, x, theirs(x))


# trap 4
def test_package_minLSTM_does_not_carry_its_state() -> None:
    theirs = _peer("minGRU-pytorch", "minGRU_pytorch.minLSTM", "minLSTM")(WIDTH)
    layer, x = read_weights(theirs.state_dict()), torch.randn(B, T, WIDTH)
    _, state = theirs(x[:, :4], return_next_prev_hidden=True)
    _, h_n = layer(x[:, :4])
    torch.testing.assert_close(h_n[0][0], state[:, 0])
    # one step on it is right; several apply g to it
    torch.testing.assert_close(layer(x[:, 4:5], h_n)[0], theirs(x[:, 4:5], state))
    wrong = theirs(x[:, 4:], state)
    assert (layer(x[:, 4:], h_n)[0] - wrong).abs().max() > 0.01
    torch.testing.assert_close(layer(x[:, 4:], _g(state).transpose(0, 1))[0], wrong)


# trap 2
def test_package_minGRU_has_no_gradient_of_a_zero_state() -> None:
    theirs = _peer("minGRU-pytorch", "minGRU_pytorch.minGRU", "minGRU")(WIDTH)
    layer, x = read_weights(theirs.state_dict()), torch.randn(1, T, WIDTH)
    zeros = [torch.zeros(1, 1, WIDTH, requires_grad=True) for _ in range(2)]
    torch.testing.assert_close(layer(x, zeros[0])[0], theirs(x, zeros[1]))
    [ours] = torch.autograd.grad(layer(x, zeros[0])[0].sum(), zeros[0])
    [wrong] = torch.autograd.grad(theirs(x, zeros[1]).sum(), zeros[1])
    assert wrong.isnan().all()
    assert (ours > 0).all()


@pytest.mark.parametrize("learned", [False, True])
def test_package_mingru_scans(learned: bool) -> None:
    theirs = _peer("mingru-scans", "mingru", "MinGRU")(WIDTH, D, learnable_h0=learned)
    if learned:
        nn.init.normal_(theirs.h0_pre)
    layer, x = read_weights(theirs.state_dict()), torch.randn(B, T, WIDTH)
    _check(layer, x, theirs(x))
    for variant in ("SignedMinGRU", "MinGRUStack"):
        sizes = (WIDTH, D) if variant == "SignedMinGRU" else (WIDTH, D, 1)
        other = _peer("mingru-scans", "mingru", variant)(*sizes).state_dict()
        with pytest.raises(ValueError, match="got"):
            read_weights(other)
    assert read_weights(other, "blocks.0.mingru.").hidden_size == D


# trap 2
def test_package_mingru_scans_cuts_the_gradient_of_a_zero_state() -> None:
    theirs = _peer("mingru-scans", "mingru", "MinGRU")(WIDTH, D)
    layer, x = read_weights(theirs.state_dict()), torch.randn(1, T, WIDTH)
    zeros = [torch.zeros(1, 1, D, requires_grad=True) for _ in range(2)]
    torch.testing.assert_close(layer(x, zeros[0])[0], theirs(x, zeros[1]))
    [ours] = torch.autograd.grad(layer(x, zeros[0])[0][:, 0].sum(), zeros[0])
    [wrong] = torch.autograd.grad(theirs(x, zeros[1])[:, 0].sum(), zeros[1])
    # 1 - z of the first step
    torch.testing.assert_close(ours[0, 0], torch.sigmoid(-theirs.linear_z(x)[0, 0]))
    assert (wrong == 0).all()
