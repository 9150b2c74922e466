"""MinGRU and MinLSTM beside torch.nn.GRU and torch.nn.LSTM."""

import copy
import pickle

import pytest
import torch
from torch import nn

from minrnn import MinGRU, MinLSTM, ops

LAYERS = [MinGRU, MinLSTM]


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize(
    ("ours", "theirs"), [(MinGRU, nn.GRU), (MinLSTM, nn.LSTM)], ids=["gru", "lstm"]
)
def test_shapes_are_those_of_torch(ours: type, theirs: type, batch_first: bool) -> None:
    x = torch.randn(3, 7, 4)
    y, state = ours(4, 5, batch_first=batch_first)(x)
    expected, expected_state = theirs(4, 5, batch_first=batch_first)(x)
    assert y.shape == expected.shape
    if ours is MinGRU:
        assert state.shape == expected_state.shape
    else:
        assert [s.shape for s in state] == [s.shape for s in expected_state]


@pytest.mark.parametrize("layer", LAYERS)
def test_batch_first_only_swaps_axes(layer: type) -> None:
    first, second = layer(4, 5, batch_first=True), layer(4, 5)
    second.load_state_dict(first.state_dict())
    x, reset = torch.randn(3, 7, 4), torch.rand(3, 7) < 0.3
    y = first(x, reset=reset)[0]
    swapped = second(x.transpose(0, 1), reset=reset.T)[0].transpose(0, 1)
    torch.testing.assert_close(swapped, y)


def test_layer_is_its_op_over_one_projection() -> None:
    layer = MinGRU(4, 5, batch_first=True, candidate="tanh", proj_size=2)
    x, h0 = torch.randn(3, 7, 4), torch.rand(1, 3, 5)
    gates = x @ layer.weight_ih_l0.T + layer.bias_ih_l0
    h, h_T = ops.mingru(gates[..., :5], gates[..., 5:], h0[0], candidate="tanh")
    y, h_n = layer(x, h0)
    torch.testing.assert_close(y, h @ layer.weight_hr_l0.T)
    torch.testing.assert_close(h_n, h_T[None])


# trap 9
def test_state_is_not_the_projected_output() -> None:
    layer = MinGRU(4, 6, proj_size=2)
    y, h_n = layer(torch.randn(7, 3, 4))
    assert y.shape == (7, 3, 2)
    assert h_n.shape == (1, 3, 6)


# trap 14
@pytest.mark.parametrize("layer", LAYERS)
def test_state_stays_float32_under_autocast(layer: type) -> None:
    module = layer(4, 5)
    x = torch.randn(7, 3, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, state = module(x)
        state = state if isinstance(state, torch.Tensor) else state[0]
        again, _ = module(x, state)
    assert y.dtype == again.dtype == torch.bfloat16
    assert state.dtype == torch.float32
    torch.testing.assert_close(y.float(), module(x)[0], rtol=0.03, atol=0.03)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtype_of_the_layer(dtype: torch.dtype) -> None:
    y, h_n = MinGRU(4, 5, dtype=dtype)(torch.randn(7, 3, 4, dtype=dtype))
    assert y.dtype == dtype
    assert h_n.dtype == dtype


@pytest.mark.parametrize("layer", LAYERS)
def test_reset_equals_a_new_sequence(layer: type) -> None:
    module = layer(4, 5, batch_first=True)
    x = torch.randn(2, 9, 4)
    reset = torch.zeros(2, 9, dtype=torch.bool)
    reset[:, 4] = True
    y = module(x, reset=reset)[0]
    torch.testing.assert_close(y[:, 4:], module(x[:, 4:])[0])
    torch.testing.assert_close(y[:, :4], module(x[:, :4])[0])


@pytest.mark.parametrize("layer", LAYERS)
def test_layers_are_copied_and_pickled(layer: type) -> None:
    module = layer(4, 5, proj_size=3)
    x = torch.randn(7, 3, 4)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(twin(x)[0], module(x)[0])


def test_weights_have_the_names_of_torch() -> None:
    expected = {"weight_ih_l0": (15, 4), "bias_ih_l0": (15,), "weight_hr_l0": (3, 5)}
    layer = MinLSTM(4, 5, proj_size=3)
    assert {name: tuple(x.shape) for name, x in layer.state_dict().items()} == expected
    assert list(MinGRU(4, 5, bias=False).state_dict()) == ["weight_ih_l0"]


def test_repr_names_what_is_not_default() -> None:
    assert repr(MinGRU(4, 5)) == "MinGRU(4, 5)"
    layer = MinLSTM(
        4, 5, batch_first=True, proj_size=3, candidate="tanh", normalized=False, forget_bias=1.0
    )
    assert repr(layer) == (
        "MinLSTM(4, 5, batch_first=True, proj_size=3, candidate='tanh', normalized=False, "
        "forget_bias=1.0)"
    )


@pytest.mark.parametrize("layer", LAYERS)
def test_bad_constructor_arguments_are_named(layer: type) -> None:
    with pytest.raises(ValueError, match="`input_size` must be >= 1, got 0"):
        layer(0, 5)
    with pytest.raises(ValueError, match="`hidden_size` must be >= 1, got -1"):
        layer(4, -1)
    with pytest.raises(ValueError, match="`proj_size` must be >= 0, got -2"):
        layer(4, 5, proj_size=-2)
    with pytest.raises(ValueError, match="`candidate` must be one of 'g', 'identity', 'tanh'"):
        layer(4, 5, candidate="relu")


@pytest.mark.parametrize("layer", LAYERS)
def test_bad_inputs_are_named(layer: type) -> None:
    module = layer(4, 5)
    with pytest.raises(TypeError, match="`input` must be a Tensor, got list"):
        module([1.0])
    with pytest.raises(ValueError, match=r"`input` must have 2 or 3 dimensions, got shape \(4,\)"):
        module(torch.randn(4))
    with pytest.raises(ValueError, match=r"with input_size = 4, got \(7, 3, 6\)"):
        module(torch.randn(7, 3, 6))
    with pytest.raises(ValueError, match=r"`hx` must have shape .* = \(1, 3, 5\), got \(3, 5\)"):
        module(torch.randn(7, 3, 4), torch.zeros(3, 5))
    with pytest.raises(ValueError, match=r"`reset` must have shape \(T, B\) = \(7, 3\), got"):
        module(torch.randn(7, 3, 4), reset=torch.zeros(3, 7, dtype=torch.bool))
    with pytest.raises(TypeError, match="`reset` must be a Tensor, got list"):
        module(torch.randn(7, 3, 4), reset=[True])
