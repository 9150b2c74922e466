"""Wrong arguments and inputs: an error of torch's class that names the argument and what came."""

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence

from minrnn import MinGRU, MinGRUCell, MinLSTM, MinLSTMCell

PAIRS = pytest.mark.parametrize(
    ("ours", "theirs"), [(MinGRU, nn.GRU), (MinLSTM, nn.LSTM)], ids=["gru", "lstm"]
)
CELLS = pytest.mark.parametrize(
    ("ours", "theirs"), [(MinGRUCell, nn.GRUCell), (MinLSTMCell, nn.LSTMCell)], ids=["gru", "lstm"]
)


def _error(call: Callable[[], Any]) -> type[Exception]:
    """The class of what torch raises."""
    try:
        call()
    except Exception as error:
        return type(error)
    pytest.fail("torch raised nothing")


def _raises(kind: type[Exception], call: Callable[[], Any], message: str) -> None:
    with pytest.raises(kind, match=f"^{re.escape(message)}$"):
        call()


def _state(module: nn.Module, hx: Any) -> Any:
    """`hx` as this class takes it: a pair for an LSTM."""
    return (hx, hx) if "LSTM" in type(module).__name__ else hx


SIZES = [
    ("input_size", 0, "`input_size` must be >= 1, got 0"),
    ("input_size", -1, "`input_size` must be >= 1, got -1"),
    ("input_size", 4.0, "`input_size` must be an int, got float"),
    ("input_size", "4", "`input_size` must be an int, got str"),
    ("hidden_size", 0, "`hidden_size` must be >= 1, got 0"),
    ("hidden_size", -1, "`hidden_size` must be >= 1, got -1"),
    ("hidden_size", 5.0, "`hidden_size` must be an int, got float"),
    ("hidden_size", "5", "`hidden_size` must be an int, got str"),
    ("hidden_size", None, "`hidden_size` must be an int, got NoneType"),
]
# nn.GRU takes a flag for a size, as in GRU(4, 5, True) for batch_first, and reads it as 1
FLAGS_AS_SIZES = [
    ("hidden_size", True, "`hidden_size` must be an int, got bool"),
    ("num_layers", True, "`num_layers` must be an int, got bool"),
    ("proj_size", False, "`proj_size` must be an int, got bool"),
]
ARGUMENTS = [
    *SIZES,
    ("num_layers", 0, "`num_layers` must be >= 1, got 0"),
    ("num_layers", -1, "`num_layers` must be >= 1, got -1"),
    ("bias", 1, "`bias` must be a bool, got int"),
    ("bias", "x", "`bias` must be a bool, got str"),
    ("batch_first", "x", "`batch_first` must be a bool, got str"),
    ("batch_first", 1, "`batch_first` must be a bool, got int"),
    ("dropout", 1.5, "`dropout` must be a number from 0 to 1, got 1.5"),
    ("dropout", True, "`dropout` must be a number from 0 to 1, got True"),
    ("dropout", -0.1, "`dropout` must be a number from 0 to 1, got -0.1"),
    ("dropout", "x", "`dropout` must be a number from 0 to 1, got 'x'"),
    ("proj_size", -1, "`proj_size` must be >= 0, got -1"),
]


@PAIRS
@pytest.mark.parametrize(("name", "value", "message"), ARGUMENTS)
def test_wrong_arguments(ours: type, theirs: type, name: str, value: Any, message: str) -> None:
    arguments = {"input_size": 4, "hidden_size": 5, "num_layers": 2} | {name: value}
    kind = _error(lambda: theirs(**arguments))
    assert kind in (ValueError, TypeError)
    _raises(kind, lambda: ours(**arguments), message)


@PAIRS
@pytest.mark.parametrize("value", [1.0, "2"])
def test_wrong_num_layers(ours: type, theirs: type, value: Any) -> None:
    # nn.GRU compares a str with 0, or hands a float to range(): a TypeError in the end
    assert _error(lambda: theirs(4, 5, value)) is TypeError
    message = f"`num_layers` must be an int, got {type(value).__name__}"
    _raises(TypeError, lambda: ours(4, 5, value), message)


@pytest.mark.parametrize(("name", "value", "message"), FLAGS_AS_SIZES)
@pytest.mark.parametrize("ours", [MinGRU, MinLSTM])
def test_flags_are_no_sizes(ours: type, name: str, value: bool, message: str) -> None:
    _raises(
        TypeError, lambda: ours(**({"input_size": 4, "hidden_size": 5} | {name: value})), message
    )


@pytest.mark.parametrize("cell", [MinGRUCell, MinLSTMCell])
def test_wrong_flags_of_cells(cell: type) -> None:
    _raises(TypeError, lambda: cell(4, True), "`hidden_size` must be an int, got bool")
    for bias, kind in (("no", "str"), (0, "int"), (None, "NoneType")):
        _raises(TypeError, partial(cell, 4, 5, bias), f"`bias` must be a bool, got {kind}")


def test_wrong_proj_size() -> None:
    # nn.GRU has no projection; nn.LSTM says "empty(): argument 'size' failed to unpack"
    assert _error(lambda: nn.LSTM(4, 5, proj_size=2.0)) is TypeError
    for ours in (MinGRU, MinLSTM):
        call = partial(ours, 4, 5, proj_size=2.0)
        _raises(TypeError, call, "`proj_size` must be an int, got float")


@PAIRS
def test_dropout_with_one_layer_warns(ours: type, theirs: type) -> None:
    with pytest.warns(UserWarning, match="num_layers"):
        theirs(4, 5, dropout=0.5)
    with pytest.warns(
        UserWarning, match="`dropout` acts between layers: 0.5 does nothing"
    ) as list_:
        ours(4, 5, dropout=0.5)
    assert list_[0].filename == __file__


@CELLS
@pytest.mark.parametrize(("name", "value", "message"), SIZES)
def test_wrong_sizes_of_cells(
    ours: type, theirs: type, name: str, value: Any, message: str
) -> None:
    arguments = {"input_size": 4, "hidden_size": 5} | {name: value}
    # nn.GRUCell(0, 5) is made, and nn.GRUCell(-1, 5) fails in torch.empty: the layers' class
    kind = ValueError if isinstance(value, int) else _error(lambda: theirs(**arguments))
    _raises(kind, lambda: ours(**arguments), message)


X = torch.randn(7, 3, 4)
WANTED = "`input` must have the dtype of the weights, torch.float32, got"
INPUTS = {
    "1d": (X[0, 0], "`input` must have 2 or 3 dimensions, got shape (4,)"),
    "4d": (X[None], "`input` must have 2 or 3 dimensions, got shape (1, 7, 3, 4)"),
    "features": (
        torch.randn(7, 3, 6),
        "`input` must have shape (T, B, input_size) with input_size = 4, got (7, 3, 6)",
    ),
    "unbatched": (
        torch.randn(7, 6),
        "`input` must have shape (T, input_size) with input_size = 4, got (7, 6)",
    ),
    "float64": (X.double(), f"{WANTED} torch.float64"),
    "int": (X.long(), f"{WANTED} torch.int64"),
    "meta": (X.to("meta"), "`input` must be on cpu like the weights, got meta"),
    "packed": (
        pack_sequence([torch.randn(3, 6), torch.randn(2, 6)]),
        "`input` must have shape (S, input_size) with input_size = 4, got (5, 6)",
    ),
}


@PAIRS
@pytest.mark.parametrize("case", INPUTS)
def test_wrong_inputs(ours: type, theirs: type, case: str) -> None:
    x, message = INPUTS[case]
    _raises(_error(lambda: theirs(4, 5)(x)), lambda: ours(4, 5)(x), message)


def test_wrong_features_are_said_in_the_order_of_the_axes() -> None:
    message = "`input` must have shape (B, T, input_size) with input_size = 4, got (7, 3, 6)"
    layer = MinGRU(4, 5, batch_first=True)
    _raises(RuntimeError, lambda: layer(torch.randn(7, 3, 6)), message)


HX = "`hx` must have shape (num_layers * directions, B, hidden_size) ="
UNBATCHED = "`hx` must have shape (num_layers * directions, hidden_size) = (1, 5), got"
SORTED = pack_sequence([torch.randn(3, 4), torch.randn(2, 4)])
UNSORTED = pack_sequence([torch.randn(2, 4), torch.randn(3, 4)], enforce_sorted=False)
STATES = {
    "2d": (X, torch.zeros(3, 5), f"{HX} (1, 3, 5), got (3, 5)"),
    "4d": (X, torch.zeros(1, 1, 3, 5), f"{HX} (1, 3, 5), got (1, 1, 3, 5)"),
    "layers": (X, torch.zeros(2, 3, 5), f"{HX} (1, 3, 5), got (2, 3, 5)"),
    "batch": (X, torch.zeros(1, 2, 5), f"{HX} (1, 3, 5), got (1, 2, 5)"),
    "size": (X, torch.zeros(1, 3, 6), f"{HX} (1, 3, 5), got (1, 3, 6)"),
    "float64": (
        X,
        torch.zeros(1, 3, 5).double(),
        "`hx` must have dtype torch.float32, got torch.float64",
    ),
    "bfloat16": (
        X,
        torch.zeros(1, 3, 5).bfloat16(),
        "`hx` must have dtype torch.float32, got torch.bfloat16",
    ),
    "int": (X, torch.zeros(1, 3, 5).long(), "`hx` must have dtype torch.float32, got torch.int64"),
    "meta": (
        X,
        torch.zeros(1, 3, 5, device="meta"),
        "`hx` must be on cpu like `input`, got meta",
    ),
    "unbatched-3d": (X[:, 0], torch.zeros(1, 1, 5), f"{UNBATCHED} (1, 1, 5)"),
    "unbatched-1d": (X[:, 0], torch.zeros(5), f"{UNBATCHED} (5,)"),
    "packed-batch": (SORTED, torch.zeros(1, 3, 5), f"{HX} (1, 2, 5), got (1, 3, 5)"),
    "packed-size": (SORTED, torch.zeros(1, 2, 6), f"{HX} (1, 2, 5), got (1, 2, 6)"),
    "unsorted-size": (UNSORTED, torch.zeros(1, 2, 6), f"{HX} (1, 2, 5), got (1, 2, 6)"),
    "unsorted-meta": (
        UNSORTED,
        torch.zeros(1, 2, 5, device="meta"),
        "`hx` must be on cpu like `input`, got meta",
    ),
}


@PAIRS
@pytest.mark.parametrize("case", STATES)
def test_wrong_states(ours: type, theirs: type, case: str) -> None:
    x, hx, message = STATES[case]

    def call(layer: nn.Module) -> Any:
        return layer(x, _state(layer, hx))

    _raises(_error(lambda: call(theirs(4, 5))), lambda: call(ours(4, 5)), message)


@PAIRS
def test_packed_state_of_another_batch_is_refused_unsorted(ours: type, theirs: type) -> None:
    hx = torch.zeros(1, 3, 5)
    # torch drops the third row without a word: the batch is 2
    model, layer = theirs(4, 5), ours(4, 5)
    assert model(UNSORTED, _state(model, hx))[0].data.shape == (5, 5)
    message = f"{HX} (1, 2, 5), got (1, 3, 5)"
    _raises(RuntimeError, lambda: layer(UNSORTED, _state(layer, hx)), message)


def test_packed_state_without_a_batch() -> None:
    hx = torch.zeros(1, 5)
    # nn.LSTM raises an IndexError from its kernel here
    assert _error(lambda: nn.GRU(4, 5)(SORTED, hx)) is RuntimeError
    for x in (SORTED, UNSORTED):
        call = partial(MinGRU(4, 5), x, hx)
        _raises(RuntimeError, call, f"{HX} (1, 2, 5), got (1, 5)")


@PAIRS
def test_no_tensor_is_a_type_error(ours: type, theirs: type) -> None:
    # torch: "AttributeError: 'list' object has no attribute 'dim'", no class to hold on to
    assert _error(lambda: theirs(4, 5)([1.0])) is AttributeError
    layer = ours(4, 5)
    _raises(TypeError, lambda: layer([1.0]), "`input` must be a Tensor, got list")
    _raises(TypeError, lambda: layer(None), "`input` must be a Tensor, got NoneType")
    for x in (X, SORTED, UNSORTED):
        hx = _state(layer, 1.0)
        call = partial(layer, x, hx)
        _raises(TypeError, call, "`hx` must be a Tensor, got float")


def test_pair_of_another_length() -> None:
    hx = (torch.zeros(1, 3, 5),)
    message = "`hx` must be a tensor or the pair (h_0, c_0), got 1 parts"
    for module, x in ((MinLSTM(4, 5), X), (MinLSTMCell(4, 5), X[0])):
        call = partial(module, x, hx)
        _raises(ValueError, call, message)


PACKED_RESET = "`reset` must be packed like `input`, a bool for each step"
NO_RESET = torch.zeros(7, 3, dtype=torch.bool)


def _packed_reset(*lengths: int) -> PackedSequence:
    return pack_sequence([torch.zeros(length, dtype=torch.bool) for length in lengths])


@pytest.mark.parametrize("ours", [MinGRU, MinLSTM])
@pytest.mark.parametrize(
    ("x", "reset", "kind", "message"),
    [
        (X, NO_RESET.T, ValueError, "`reset` must have shape (T, B) = (7, 3), got (3, 7)"),
        (X[:, 0], NO_RESET, ValueError, "`reset` must have shape (T,) = (7,), got (7, 3)"),
        (X, NO_RESET.int(), TypeError, "`reset` must have dtype torch.bool, got torch.int32"),
        (X, [True], TypeError, "`reset` must be a Tensor, got list"),
        (SORTED, NO_RESET, ValueError, PACKED_RESET),
        (SORTED, _packed_reset(3, 1), ValueError, PACKED_RESET),
        # as many steps, of sequences of other lengths
        (SORTED, _packed_reset(4, 1), ValueError, PACKED_RESET),
    ],
    ids=["shape", "unbatched", "dtype", "list", "packed", "steps", "lengths"],
)
def test_wrong_resets(ours: type, x: Any, reset: Any, kind: type[Exception], message: str) -> None:
    _raises(kind, lambda: ours(4, 5)(x, reset=reset), message)


CELL_X = torch.randn(3, 4)
CELL_INPUTS = {
    "0d": (torch.tensor(1.0), "`input` must have 1 or 2 dimensions, got shape ()"),
    "3d": (CELL_X[None], "`input` must have 1 or 2 dimensions, got shape (1, 3, 4)"),
    "features": (
        torch.randn(3, 6),
        "`input` must have shape (B, input_size) with input_size = 4, got (3, 6)",
    ),
    "unbatched": (
        torch.randn(6),
        "`input` must have shape (input_size,) with input_size = 4, got (6,)",
    ),
    "float64": (CELL_X.double(), f"{WANTED} torch.float64"),
    "int": (CELL_X.long(), f"{WANTED} torch.int64"),
    "meta": (CELL_X.to("meta"), "`input` must be on cpu like the weights, got meta"),
}
CELL_STATES = {
    "3d": (CELL_X, torch.zeros(1, 3, 5), "`hx` must have 1 or 2 dimensions, got shape (1, 3, 5)"),
    "batch": (CELL_X, torch.zeros(2, 5), "(B, hidden_size) = (3, 5), got (2, 5)"),
    "size": (CELL_X, torch.zeros(3, 6), "(B, hidden_size) = (3, 5), got (3, 6)"),
    "1d": (CELL_X, torch.zeros(5), "(B, hidden_size) = (3, 5), got (5,)"),
    "unbatched": (CELL_X[0], torch.zeros(1, 5), "(hidden_size,) = (5,), got (1, 5)"),
    "float64": (CELL_X, torch.zeros(3, 5).double(), "dtype torch.float32, got torch.float64"),
    "int": (CELL_X, torch.zeros(3, 5).long(), "dtype torch.float32, got torch.int64"),
    "meta": (
        CELL_X,
        torch.zeros(3, 5, device="meta"),
        "`hx` must be on cpu like `input`, got meta",
    ),
}


@CELLS
@pytest.mark.parametrize("case", CELL_INPUTS)
def test_wrong_inputs_of_cells(ours: type, theirs: type, case: str) -> None:
    x, message = CELL_INPUTS[case]
    _raises(_error(lambda: theirs(4, 5)(x)), lambda: ours(4, 5)(x), message)


@CELLS
@pytest.mark.parametrize("case", CELL_STATES)
def test_wrong_states_of_cells(ours: type, theirs: type, case: str) -> None:
    x, hx, message = CELL_STATES[case]
    if message[0] == "(":
        message = f"`hx` must have shape {message}"
    if message[0] == "d":
        message = f"`hx` must have {message}"

    def call(cell: nn.Module) -> Tensor:
        return cell(x, _state(cell, hx))

    _raises(_error(lambda: call(theirs(4, 5))), lambda: call(ours(4, 5)), message)


@CELLS
def test_no_tensor_is_a_type_error_for_cells(ours: type, theirs: type) -> None:
    # torch: AttributeError, as for the layers
    assert _error(lambda: theirs(4, 5)([1.0])) is AttributeError
    cell = ours(4, 5)
    _raises(TypeError, lambda: cell([1.0]), "`input` must be a Tensor, got list")
    call = partial(cell, CELL_X, _state(cell, 1.0))
    _raises(TypeError, call, "`hx` must be a Tensor, got float")
