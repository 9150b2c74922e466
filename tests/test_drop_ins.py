"""MinGRU and MinLSTM in place of nn.GRU and nn.LSTM: shapes, states, packing, directions."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence, unpack_sequence
from torch.testing import assert_close

from minrnn import MinGRU, MinGRUCell, MinLSTM, MinLSTMCell

LAYERS = [MinGRU, MinLSTM]
PAIRS = pytest.mark.parametrize(
    ("ours", "theirs"), [(MinGRU, nn.GRU), (MinLSTM, nn.LSTM)], ids=["gru", "lstm"]
)
BOTH = pytest.mark.parametrize("bidirectional", [False, True], ids=["one", "both"])
LAYOUT = pytest.mark.parametrize("batch_first", [False, True], ids=["time", "batch"])
LENGTHS = {"sorted": [5, 5, 3, 1], "unsorted": [3, 5, 1, 5]}


def _state(result: Any) -> Tensor:
    """h_n of either layer."""
    return result[1] if isinstance(result[1], Tensor) else result[1][0]


def _shapes(result: Any) -> list[tuple[int, ...]]:
    y, state = result
    states = [state] if isinstance(state, Tensor) else [*state]
    return [tuple(x.shape) for x in (y.data if isinstance(y, PackedSequence) else y, *states)]


def _sequences(kind: str, features: int = 4) -> list[Tensor]:
    return [torch.randn(length, features) for length in LENGTHS[kind]]


def _pack(sequences: list[Tensor], kind: str) -> PackedSequence:
    return pack_sequence(sequences, enforce_sorted=kind == "sorted")


def _input(kind: str, batch_first: bool) -> Tensor | PackedSequence:
    if kind in LENGTHS:
        return _pack(_sequences(kind), kind)
    if kind == "unbatched":
        return torch.randn(7, 4)
    return torch.randn(3, 7, 4) if batch_first else torch.randn(7, 3, 4)


@PAIRS
@BOTH
@LAYOUT
@pytest.mark.parametrize("num_layers", [1, 2, 3])
def test_shapes_are_those_of_torch(
    ours: type, theirs: type, bidirectional: bool, batch_first: bool, num_layers: int
) -> None:
    options = {
        "num_layers": num_layers,
        "bidirectional": bidirectional,
        "batch_first": batch_first,
    }
    layer, model = ours(4, 5, **options), theirs(4, 5, **options)
    for kind in ("padded", "unbatched", "sorted", "unsorted"):
        x = _input(kind, batch_first)
        result, wanted = layer(x), model(x)
        assert _shapes(result) == _shapes(wanted), kind
        # their states are taken as ours, with or without a batch; of an LSTM one of the two
        again = layer(x, wanted[1] if ours is MinGRU else wanted[1][1])
        assert _shapes(again) == _shapes(wanted), kind
        if isinstance(x, PackedSequence):
            for name in ("batch_sizes", "sorted_indices", "unsorted_indices"):
                assert getattr(result[0], name) is getattr(x, name)


@LAYOUT
@BOTH
def test_projection_keeps_the_size_of_the_state(batch_first: bool, bidirectional: bool) -> None:
    options = {"proj_size": 2, "batch_first": batch_first, "bidirectional": bidirectional}
    x = _input("padded", batch_first)
    y, (h_n, c_n) = MinLSTM(4, 5, **options)(x)
    # float64: oneDNN has no projections in float32, and warns
    wanted, (_, wanted_c) = nn.LSTM(4, 5, **options).double()(x.double())
    assert y.shape == wanted.shape
    # nn.LSTM's h_n is its projected output; ours is the cell, trap 9
    assert torch.equal(h_n, c_n)
    assert c_n.shape == wanted_c.shape


@pytest.mark.parametrize("ours", LAYERS)
@LAYOUT
@BOTH
def test_outputs_are_contiguous(ours: type, batch_first: bool, bidirectional: bool) -> None:
    layer = ours(4, 5, 2, batch_first=batch_first, bidirectional=bidirectional)
    for x in (_input("padded", batch_first), _input("padded", not batch_first).transpose(0, 1)):
        result = layer(x)
        assert result[0].is_contiguous()
        assert _state(result).is_contiguous()


@pytest.mark.parametrize("ours", LAYERS)
@LAYOUT
@BOTH
def test_empty_time_and_batch(ours: type, batch_first: bool, bidirectional: bool) -> None:
    layer = ours(4, 5, batch_first=batch_first, bidirectional=bidirectional)
    states = 2 if bidirectional else 1
    hx = torch.rand(states, 3, 5)
    shape = (3, 0, 4) if batch_first else (0, 3, 4)
    result = layer(torch.zeros(shape), hx)
    assert result[0].shape == (*shape[:2], 5 * states)
    assert torch.equal(_state(result), hx)
    none = layer(torch.zeros((0, 7, 4) if batch_first else (7, 0, 4)))
    assert _state(none).shape == (states, 0, 5)


@pytest.mark.parametrize("ours", LAYERS)
def test_reverse_is_the_forward_layer_on_the_flipped_sequence(ours: type) -> None:
    both, alone = ours(4, 5, bidirectional=True), ours(4, 5)
    weights = both.state_dict()
    x = torch.randn(7, 3, 4)
    result = both(x)
    for n, suffix in enumerate(["", "_reverse"]):
        alone.load_state_dict({name: weights[name + suffix] for name in alone.state_dict()})
        wanted = alone(x.flip(0) if n else x)
        y = wanted[0].flip(0) if n else wanted[0]
        assert_close(result[0].chunk(2, dim=2)[n], y)
        assert_close(_state(result)[n], _state(wanted)[0])


@pytest.mark.parametrize("ours", LAYERS)
@LAYOUT
def test_no_batch_is_a_batch_of_one(ours: type, batch_first: bool) -> None:
    layer = ours(4, 5, 2, batch_first=batch_first, bidirectional=True)
    x, hx, reset = torch.randn(7, 4), torch.rand(4, 5), torch.rand(7) < 0.3
    axis = 0 if batch_first else 1
    result = layer(x, hx, reset=reset)
    wanted = layer(x.unsqueeze(axis), hx[:, None], reset=reset.unsqueeze(axis))
    assert_close(result[0], wanted[0].squeeze(axis))
    assert_close(_state(result), _state(wanted)[:, 0])


def _leaves(layer: nn.Module, xs: list[Tensor], hx: Tensor | None) -> dict[str, Tensor]:
    leaves = dict(layer.named_parameters()) | {f"x{n}": x for n, x in enumerate(xs)}
    if hx is not None:
        leaves["hx"] = hx
    return {name: x.requires_grad_() for name, x in leaves.items()}


@pytest.mark.parametrize("ours", LAYERS)
@pytest.mark.parametrize("kind", LENGTHS)
@pytest.mark.parametrize("start", ["zeros", "hx", "learn_h0"])
def test_packed_equals_each_sequence_alone(ours: type, kind: str, start: str) -> None:
    layer = ours(4, 5, 3, bidirectional=True, proj_size=3, learn_h0=start == "learn_h0").double()
    if start == "learn_h0":
        nn.init.uniform_(layer.h_0)
    xs = [x.double() for x in _sequences(kind)]
    hx = torch.rand(6, len(xs), 5, dtype=torch.float64) if start == "hx" else None
    leaves = _leaves(layer, xs, hx)
    result = layer(_pack(xs, kind), hx)
    together = [*unpack_sequence(result[0]), _state(result)]
    runs = [layer(x, None if hx is None else hx[:, n]) for n, x in enumerate(xs)]
    alone = [*(run[0] for run in runs), torch.stack([_state(run) for run in runs], dim=1)]
    assert_close(together, alone, rtol=1e-6, atol=1e-6)
    weights = [torch.randn_like(y) for y in alone]
    grads, wanted = (
        torch.autograd.grad(
            sum((w * y).sum() for w, y in zip(weights, ys, strict=True)), list(leaves.values())
        )
        for ys in (together, alone)
    )
    for name, grad, want in zip(leaves, grads, wanted, strict=True):
        assert want.abs().max() > 0, name
        assert_close(
            grad, want, rtol=1e-6, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("ours", LAYERS)
def test_packed_equals_padded_in_float32(ours: type) -> None:
    layer = ours(4, 5, 2)
    xs = _sequences("unsorted")
    result = layer(_pack(xs, "unsorted"))
    padded = layer(nn.utils.rnn.pad_sequence(xs))[0]
    for n, y in enumerate(unpack_sequence(result[0])):
        assert_close(y, padded[: len(y), n], rtol=1e-6, atol=1e-6)
        assert_close(_state(result)[1, n], y[-1], rtol=1e-6, atol=1e-6)


def _parts(reset: Tensor) -> list[tuple[int, int]]:
    """The stretches between one sequence's resets."""
    starts = sorted({0, *reset.nonzero()[:, 0].tolist()})
    return list(zip(starts, [*starts[1:], len(reset)], strict=True))


RESETS = [[2, 5], [0, 1], [], [6]]


def _reset(length: int, at: list[int]) -> Tensor:
    return torch.tensor([t in at for t in range(length)])


def _alone(layer: nn.Module, x: Tensor, reset: Tensor) -> tuple[Tensor, Tensor]:
    """The parts of one sequence, each run alone: the outputs, and the states at both ends."""
    runs = [layer(x[start:stop]) for start, stop in _parts(reset)]
    forward, backward = _state(runs[-1])[0::2], _state(runs[0])[1::2]
    h_n = torch.stack([forward, backward], dim=1).flatten(0, 1)
    return torch.cat([run[0] for run in runs]), h_n


@pytest.mark.parametrize("ours", LAYERS)
@LAYOUT
def test_reset_separates_parts_in_both_directions(ours: type, batch_first: bool) -> None:
    layer = ours(4, 5, 2, batch_first=batch_first, bidirectional=True)
    x, axis = torch.randn(7, len(RESETS), 4), 0 if batch_first else 1
    reset = torch.stack([_reset(7, at) for at in RESETS], dim=1)
    result = layer(
        *([x.transpose(0, 1)] if batch_first else [x]), reset=reset.T if batch_first else reset
    )
    for n in range(len(RESETS)):
        y, h_n = _alone(layer, x[:, n], reset[:, n])
        assert_close(result[0].select(axis, n), y)
        assert_close(_state(result)[:, n], h_n)


@pytest.mark.parametrize("ours", LAYERS)
@pytest.mark.parametrize("kind", LENGTHS)
def test_reset_separates_parts_of_packed_sequences(ours: type, kind: str) -> None:
    layer = ours(4, 5, 2, bidirectional=True)
    xs = _sequences(kind)
    resets = [_reset(len(x), at) for x, at in zip(xs, [[2], [0, 1], [0], [4]], strict=True)]
    result = layer(_pack(xs, kind), reset=_pack(resets, kind))
    for n, y in enumerate(unpack_sequence(result[0])):
        wanted, h_n = _alone(layer, xs[n], resets[n])
        assert_close(y, wanted)
        assert_close(_state(result)[:, n], h_n)


@pytest.mark.parametrize("ours", LAYERS)
@pytest.mark.parametrize("kind", LENGTHS)
def test_reset_of_a_packed_sequence_leaves_its_neighbour_the_state(ours: type, kind: str) -> None:
    layer = ours(4, 5, 2, bidirectional=True)
    xs, hx = _sequences(kind), torch.rand(4, 4, 5)
    # a reset at the first step must not cut what enters the sequence before from its end
    resets = [_reset(len(x), [0]) for x in xs]
    result = layer(_pack(xs, kind), hx, reset=_pack(resets, kind))
    for n, y in enumerate(unpack_sequence(result[0])):
        alone = layer(xs[n], hx[:, n], reset=resets[n])
        assert_close(y, alone[0])
        assert_close(_state(result)[:, n], _state(alone))


@pytest.mark.parametrize("ours", LAYERS)
@LAYOUT
@BOTH
def test_reset_drops_a_state_that_is_nan(
    ours: type, batch_first: bool, bidirectional: bool
) -> None:
    layer = ours(4, 5, batch_first=batch_first, bidirectional=bidirectional)
    x, hx = torch.randn(3, 3, 4), torch.full((2 if bidirectional else 1, 3, 5), torch.nan)
    hx[1:] = 0.5
    reset = torch.zeros(3, 3, dtype=torch.bool)
    assert layer(x, hx)[0].isnan().any()
    reset.select(1 if batch_first else 0, 0)[:] = True
    result = layer(x, hx, reset=reset)
    assert result[0].isfinite().all()
    assert _state(result).isfinite().all()


@pytest.mark.parametrize(
    ("ours", "theirs"), [(MinGRUCell, nn.GRUCell), (MinLSTMCell, nn.LSTMCell)], ids=["gru", "lstm"]
)
@pytest.mark.parametrize("shape", [(4,), (3, 4), (0, 4)], ids=["one", "batch", "empty"])
def test_cells_have_the_shapes_of_torch(ours: type, theirs: type, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    state, wanted = ours(4, 5)(x), theirs(4, 5)(x)
    for _ in range(2):
        if isinstance(wanted, Tensor):
            assert state.shape == wanted.shape
        else:
            assert [s.shape for s in state] == [s.shape for s in wanted]
        # and their state is taken as ours; of an LSTM one of the two
        state = ours(4, 5)(x, wanted if ours is MinGRUCell else wanted[1])


@pytest.mark.parametrize(
    ("cell", "ours"), [(MinGRUCell, MinGRU), (MinLSTMCell, MinLSTM)], ids=["gru", "lstm"]
)
def test_cell_is_a_step_of_its_layer(cell: type, ours: type) -> None:
    layer, step = ours(4, 5, candidate="tanh"), cell(4, 5, candidate="tanh")
    names = {"weight_ih": "weight_ih_l0", "bias_ih": "bias_ih_l0"}
    step.load_state_dict({mine: layer.state_dict()[name] for mine, name in names.items()})
    x, state = torch.randn(6, 3, 4), torch.rand(3, 5)
    y = layer(x, state[None])[0]
    for t in range(6):
        state = step(x[t], state)
        state = state if isinstance(state, Tensor) else state[1]
        assert_close(state, y[t])
        assert_close(step(x[t, 0])[-1] if ours is MinLSTM else step(x[t, 0]), layer(x[t:, 0])[0][0])
