"""What code written for nn.GRU and nn.LSTM reads of a layer, and in which order it passes."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_sequence

from minrnn import MinGRU, MinGRUCell, MinLSTM, MinLSTMCell

PAIRS = pytest.mark.parametrize(
    ("ours", "theirs"), [(MinGRU, nn.GRU), (MinLSTM, nn.LSTM)], ids=["gru", "lstm"]
)
OPTIONS: list[dict[str, Any]] = [
    {},
    {"bias": False, "num_layers": 2},
    {"bidirectional": True, "num_layers": 2, "batch_first": True, "dropout": 0.5},
]


@PAIRS
@pytest.mark.parametrize("options", OPTIONS)
def test_weights_are_listed_as_torch_lists_them(ours: type, theirs: type, options: Any) -> None:
    layer, model = ours(4, 5, **options), theirs(4, 5, **options)
    names = [[n for n in group if "_hh_" not in n] for group in model._all_weights]
    assert layer._all_weights == names
    assert layer._flat_weights_names == [n for group in names for n in group]
    assert [
        [x is getattr(layer, n) for x, n in zip(g, group, strict=True)]
        for g, group in zip(layer.all_weights, names, strict=True)
    ] == [[True] * len(g) for g in names]
    assert all(a is b for a, b in zip(layer._flat_weights, layer.parameters(), strict=True))
    assert layer.mode == model.mode
    for name in theirs.__constants__:
        assert getattr(layer, name) == getattr(model, name)


def test_projections_are_listed() -> None:
    layer = MinLSTM(4, 5, proj_size=2)
    assert layer._all_weights == [["weight_ih_l0", "bias_ih_l0", "weight_hr_l0"]]
    assert [tuple(x.shape) for x in layer.all_weights[0]] == [(15, 4), (15,), (2, 5)]


@PAIRS
def test_usual_ways_to_draw_weights_work(ours: type, theirs: type) -> None:
    for layer in (ours(4, 5, 2), theirs(4, 5, 2)):
        for names in layer._all_weights:
            for name in names:
                draw = nn.init.orthogonal_ if "weight" in name else nn.init.zeros_
                draw(getattr(layer, name))
        for weights in layer.all_weights:
            nn.init.xavier_uniform_(weights[0])
        assert all((x == 0).all() for n, x in layer.named_parameters() if "bias" in n)


@PAIRS
@pytest.mark.parametrize("options", OPTIONS)
def test_methods_of_torch(ours: type, theirs: type, options: Any) -> None:
    layer, model = ours(4, 5, **options), theirs(4, 5, **options)
    packed = pack_sequence([torch.randn(3, 4), torch.randn(2, 4)])
    for x, batch_sizes in ((torch.randn(7, 3, 4), None), (packed.data, packed.batch_sizes)):
        sizes = model.get_expected_hidden_size(x, batch_sizes)
        assert layer.get_expected_hidden_size(x, batch_sizes) == sizes
        hx: Any = torch.rand(sizes)
        if ours is MinLSTM:
            assert layer.get_expected_cell_size(x, batch_sizes) == sizes
            hx = (hx, hx)
        layer.check_forward_args(x, hx, batch_sizes)
        order = torch.arange(sizes[1]).flip(0)
        found, wanted = layer.permute_hidden(hx, order), model.permute_hidden(hx, order)
        torch.testing.assert_close(found, wanted)
        assert layer.permute_hidden(hx, None) is hx


@PAIRS
@pytest.mark.parametrize("batch_first", [False, True])
def test_checks_of_torch(ours: type, theirs: type, batch_first: bool) -> None:
    x, right, wrong = torch.randn(7, 3, 4), (1, 7 if batch_first else 3, 5), torch.rand(1, 2, 5)
    state: Any = (wrong, wrong) if ours is MinLSTM else wrong
    for module in (ours(4, 5, batch_first=batch_first), theirs(4, 5, batch_first=batch_first)):
        with pytest.raises(RuntimeError):
            module.check_input(x[..., :3], None)
        with pytest.raises(RuntimeError):
            module.check_input(x[0], None)
        with pytest.raises(ValueError, match=r"dtype.*float64"):
            module.check_input(x.double(), None)
        with pytest.raises(RuntimeError):
            module.check_hidden_size(wrong, right)
        with pytest.raises(RuntimeError, match="ours"):
            module.check_hidden_size(wrong, right, "ours {} {}")
        with pytest.raises(RuntimeError):
            module.check_forward_args(x, state, None)


@PAIRS
def test_arguments_have_the_order_of_torch(ours: type, theirs: type) -> None:
    given = (4, 5, 2, False, True, 0.5, True, 0, "meta", torch.float64)
    for kind in (ours, theirs):
        layer = kind(*given)
        assert (layer.num_layers, layer.bias, layer.batch_first) == (2, False, True)
        assert (layer.dropout, layer.bidirectional, layer.proj_size) == (0.5, True, 0)
        assert layer.weight_ih_l0.is_meta
        assert layer.weight_ih_l0.dtype == torch.float64
    # float64: oneDNN has no projections in float32, and warns
    x, given = torch.randn(7, 3, 4).double(), (4, 5, 1, True, False, 0.0, False, 2)
    assert ours(*given).double()(x)[0].shape == nn.LSTM(*given).double()(x)[0].shape
    # a device in its place, as in the eighth of nn.GRU's documented arguments
    with pytest.raises(TypeError):
        theirs(4, 5, 1, True, False, 0.0, False, "cpu")
    with pytest.raises(TypeError, match="`proj_size` must be an int, got str"):
        ours(4, 5, 1, True, False, 0.0, False, "cpu")


TYPES = [
    ({"device": 3.5}, TypeError, "`device` must be a torch.device or a str, got float"),
    ({"device": True}, TypeError, "`device` must be a torch.device or a str, got bool"),
    ({"dtype": "float32"}, TypeError, "`dtype` must be a torch.dtype, got str"),
    ({"dtype": torch.int64}, RuntimeError, "`dtype` must be one of torch.float32, .*int64"),
    ({"dtype": torch.complex64}, TypeError, "`dtype` must be one of torch.float32, .*complex64"),
]
FLAGS = [
    ({"bidirectional": "x"}, TypeError, "`bidirectional` must be a bool, got str"),
    ({"bidirectional": 1}, TypeError, "`bidirectional` must be a bool, got int"),
    ({"learn_h0": 1}, TypeError, "`learn_h0` must be a bool, got int"),
]


@pytest.mark.parametrize(("options", "kind", "message"), TYPES)
def test_wrong_devices_and_dtypes(options: Any, kind: type[Exception], message: str) -> None:
    for module in (MinGRU, MinLSTM, MinGRUCell, MinLSTMCell):
        with pytest.raises(kind, match=message):
            module(4, 5, **options)


@pytest.mark.parametrize(("options", "kind", "message"), FLAGS)
def test_wrong_flags(options: Any, kind: type[Exception], message: str) -> None:
    for module in (MinGRU, MinLSTM):
        with pytest.raises(kind, match=message):
            module(4, 5, **options)


def test_a_dtype_that_does_not_fit_is_a_type_error_too() -> None:
    whole, states = torch.randn(7, 3, 4), torch.zeros(1, 3, 5)
    cell = (MinGRUCell(4, 5), whole[0], states[0])
    for module, x, hx in ((MinGRU(4, 5), whole, states), cell):
        for given in ((x.double(),), (x, hx.double()), (x, hx.long())):
            for kind in (TypeError, ValueError, RuntimeError):
                with pytest.raises(kind, match="dtype"):
                    module(*given)
        with pytest.raises(ValueError, match="must be on cpu") as found:
            module(x.to("meta"))
        assert not isinstance(found.value, TypeError)
        assert type(found.value).__name__ == "DeviceError"
