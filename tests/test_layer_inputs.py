"""What layers are given: states in all configurations, pairs, lengths, packed under tools."""

import re
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.rnn import PackedSequence, pack_sequence

from minrnn import MinGRU, MinGRUCell, MinLSTM, MinLSTMCell

PAIRS = pytest.mark.parametrize(
    ("ours", "theirs"), [(MinGRU, nn.GRU), (MinLSTM, nn.LSTM)], ids=["gru", "lstm"]
)
LAYERS = pytest.mark.parametrize("layer", [MinGRU, MinLSTM])
KINDS = ("padded", "packed", "unbatched")


def _input(kind: str, batch_first: bool) -> Any:
    if kind == "unbatched":
        return torch.randn(6, 4)
    if kind == "packed":
        return pack_sequence([torch.randn(T, 4) for T in (3, 6, 2)], enforce_sorted=False)
    return torch.randn(3, 6, 4) if batch_first else torch.randn(6, 3, 4)


@PAIRS
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("num_layers", [1, 2, 3])
def test_states_fit_in_every_axis(
    ours: type, theirs: type, num_layers: int, bidirectional: bool, batch_first: bool, kind: str
) -> None:
    settings = {"batch_first": batch_first, "bidirectional": bidirectional}
    layer, model = (kind(4, 5, num_layers, **settings) for kind in (ours, theirs))
    x = _input(kind, batch_first)
    sizes = [num_layers * (1 + bidirectional), *([] if kind == "unbatched" else [3]), 5]

    def call(module: nn.Module, shape: list[int]) -> Any:
        hx = torch.zeros(shape)
        return module(x, (hx, hx) if theirs is nn.LSTM else hx)

    assert torch.equal(_first(call(layer, sizes)[1]), _first(layer(x)[1]))
    for axis in range(len(sizes)):
        wrong = [size + (n == axis) for n, size in enumerate(sizes)]
        got = re.escape(f"= {tuple(sizes)}, got {tuple(wrong)}")
        with pytest.raises(ValueError, match=f"`hx` must have shape .* {got}") as found:
            call(layer, wrong)
        if axis == 1 and kind == "packed":
            # torch drops the rows that are too many, where lengths are not sorted
            continue
        with pytest.raises(Exception) as wanted:  # noqa: PT011
            call(model, wrong)
        assert isinstance(found.value, type(wanted.value))


def _first(state: Any) -> Tensor:
    return state[0] if isinstance(state, tuple) else state


GOOD = torch.zeros(1, 3, 5)
PAIRS_OF_STATES = {
    "h": ((torch.zeros(9), GOOD), RuntimeError, r"of one shape, got \(9,\) and \(1, 3, 5\)"),
    "features": ((torch.zeros(1, 3, 4), GOOD), RuntimeError, "of one shape"),
    "c": ((GOOD, torch.zeros(1, 2, 5)), RuntimeError, "of one shape"),
    "scalar": ((GOOD, torch.zeros(())), RuntimeError, "of one shape"),
    "dtype": ((GOOD.double(), GOOD), RuntimeError, "of one dtype and device, got torch.float64 on"),
    "none": ((GOOD, None), TypeError, "`hx` must be a Tensor, got NoneType"),
    "first none": ((None, GOOD), TypeError, "`hx` must be a Tensor, got NoneType"),
}


@pytest.mark.parametrize("case", PAIRS_OF_STATES)
def test_both_states_of_a_pair_are_checked(case: str) -> None:
    hx, kind, message = PAIRS_OF_STATES[case]
    for module, state in ((MinLSTM(4, 5), hx), (MinLSTMCell(4, 5), [_drop_layer(x) for x in hx])):
        x = torch.randn(7, 3, 4) if isinstance(module, MinLSTM) else torch.randn(3, 4)
        words = message if isinstance(module, MinLSTM) else message.replace("(1, ", "(")
        with pytest.raises(kind, match=words):
            module(x, state)
    if None not in hx:
        # nn.LSTM refuses them, too
        with pytest.raises((RuntimeError, ValueError)):
            nn.LSTM(4, 5)(torch.randn(7, 3, 4), hx)


def _drop_layer(x: Tensor | None) -> Tensor | None:
    return x[0] if x is not None and x.dim() == 3 else x


@pytest.mark.parametrize("sizes", [[2, 1], [4, 3], [1, 2, 2], [3, 2, 0], [5, -1, 1], []])
@LAYERS
def test_lengths_must_fit_the_rows(layer: type, sizes: list[int]) -> None:
    packed = PackedSequence(torch.randn(5, 4), torch.tensor(sizes, dtype=torch.long))
    with pytest.raises(RuntimeError, match="never rise and sum to S = 5, got") as found:
        layer(4, 5)(packed)
    assert isinstance(found.value, ValueError)
    if sizes:
        # torch drops rows without a word in two cases
        dropped = sizes in ([2, 1], [3, 2, 0])
        with nullcontext() if dropped else pytest.raises(Exception):  # noqa: PT011
            nn.GRU(4, 5)(packed)


@LAYERS
def test_padding_costs_nothing(layer: type, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.Size] = []
    recur = layer._recur

    def watched(self: Any, gates: Tensor, *args: Any, **layout: Any) -> Any:
        seen.append(gates.shape)
        return recur(self, gates, *args, **layout)

    monkeypatch.setattr(layer, "_recur", watched)
    module = layer(4, 5, num_layers=2, bidirectional=True)
    module(pack_sequence([torch.randn(T, 4) for T in (100, 2, 1)]))
    # one operator for each layer and direction, over the 103 steps there are
    assert seen == [(1, 103, module.num_gates * 5)] * 4


class _Counted(nn.Module):
    """Leaves a weight as it is, and counts how often it was asked."""

    calls = 0

    def forward(self, weight: Tensor) -> Tensor:
        self.calls += 1
        return weight


@pytest.mark.parametrize("kind", [MinGRU, MinLSTM, MinGRUCell, MinLSTMCell])
def test_parametrized_weights_are_computed_once_in_a_call(kind: type) -> None:
    module, counted = kind(4, 5), _Counted()
    cell = hasattr(module, "weight_ih")
    parametrize.register_parametrization(module, "weight_ih" if cell else "weight_ih_l0", counted)
    for x in [torch.randn(3, 4)] if cell else [torch.randn(6, 3, 4), _input("packed", False)]:
        counted.calls = 0
        module(x)
        assert counted.calls == 1


@LAYERS
def test_packed_input_under_autocast_and_transforms(layer: type) -> None:
    module, packed = layer(4, 5, num_layers=2, bidirectional=True), _input("packed", False)
    y, state = module(packed)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half, last = module(packed)
    assert half.data.dtype == torch.bfloat16
    assert _first(last).dtype == torch.float32
    torch.testing.assert_close(half.data.float(), y.data, rtol=0.05, atol=0.05)
    torch.testing.assert_close(_first(last), _first(state), rtol=0.05, atol=0.05)

    def loss(weights: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(module, weights, (packed,))[0].data.square().sum()

    weights = dict(module.named_parameters())
    grads = torch.func.grad(loss)(weights)
    wanted = torch.autograd.grad(loss(weights), list(weights.values()))
    torch.testing.assert_close(tuple(grads.values()), wanted)


HALVES = (torch.bfloat16, torch.float16)


@pytest.mark.parametrize("kind", [*KINDS, "cell"])
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("autocast", HALVES)
def test_states_of_any_cast_dtype_under_autocast(
    autocast: torch.dtype, dtype: torch.dtype, kind: str
) -> None:
    """An encoder's projection, the last state of a packed call, zeros: whatever autocast casts."""
    for name in (MinGRUCell, MinLSTMCell) if kind == "cell" else (MinGRU, MinLSTM):
        module = name(4, 5)
        x = torch.randn(3, 4) if kind == "cell" else _input(kind, False)
        sizes = {"unbatched": (1, 5), "cell": (3, 5)}.get(kind, (1, 3, 5))
        hx = torch.rand(sizes).to(dtype).requires_grad_()
        wanted = _first(_last(module(x, hx.float())))
        # mixed pairs too, with a lone state
        zeros = torch.zeros(sizes)
        pairs = [(hx, hx), (zeros, hx), (zeros.bfloat16(), hx), (hx, zeros)]
        for state in [hx, *(pairs if name in (MinLSTM, MinLSTMCell) else [])]:
            with torch.autocast("cpu", dtype=autocast):
                last = _first(_last(module(x, state)))
            torch.testing.assert_close(last.float(), wanted, rtol=0.03, atol=0.03)
            (grad,) = torch.autograd.grad(last.sum(), hx)
            assert grad.dtype == dtype
            assert grad.abs().max() > 0
        with (
            torch.autocast("cpu", dtype=autocast),
            pytest.raises(ValueError, match=r"`hx` must have dtype .*, got torch\.float64"),
        ):
            module(x, hx.double())


def _last(result: Any) -> Any:
    """h_n of a layer, (h_n, c_n) of an LSTM; of a cell all there is."""
    is_layer = isinstance(result, tuple) and isinstance(result[0], (PackedSequence, Tensor))
    return result[1] if is_layer else result


@LAYERS
@pytest.mark.filterwarnings("ignore")
def test_packed_input_compiles_in_parts(layer: type) -> None:
    module, packed = layer(4, 5, bidirectional=True), _input("packed", False)
    torch._dynamo.reset()
    compiled = torch.compile(module, backend="eager")
    torch.testing.assert_close(compiled(packed)[0].data, module(packed)[0].data)
    # how many rows there are depends on what batch_sizes holds
    torch._dynamo.reset()
    with pytest.raises(Exception, match="data-dependent expression"):
        torch.compile(module, backend="eager", fullgraph=True)(packed)


@LAYERS
@pytest.mark.parametrize("dtype", [torch.float64, torch.int64])
def test_what_autocast_does_not_cast_is_refused(layer: type, dtype: torch.dtype) -> None:
    x = torch.ones(7, 3, 4, dtype=dtype)
    with (
        torch.autocast("cpu", dtype=torch.bfloat16),
        pytest.raises(
            ValueError, match=f"`input` must have a dtype that autocast casts, got {dtype}"
        ),
    ):
        layer(4, 5)(x)


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"forget_bias": "x"}, ValueError, "`forget_bias` must be a finite number, got 'x'"),
        ({"forget_bias": True}, ValueError, "`forget_bias` must be a finite number, got True"),
        ({"forget_bias": float("nan")}, ValueError, "`forget_bias` must be a finite number"),
        ({"forget_bias": 1.0, "bias": False}, ValueError, "= 1.0 needs `bias` = True, got False"),
        ({"normalized": 1}, TypeError, "`normalized` must be a bool, got int"),
        ({"forget_bias": 1.0, "bias": "no"}, TypeError, "`bias` must be a bool, got str"),
    ],
)
def test_wrong_options_of_minlstm(options: Any, kind: type[Exception], message: str) -> None:
    for module in (MinLSTM, MinLSTMCell):
        with pytest.raises(kind, match=message):
            module(4, 5, **options)
