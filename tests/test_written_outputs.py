"""What a layer returns is the caller's: a dtype that fits its model, memory to be written to."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence

from minrnn import MinGRU, MinGRUCell, MinLSTM, MinLSTMCell

LAYERS = pytest.mark.parametrize("layer", [MinGRU, MinLSTM])
HALF = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])


def _first(state: Any) -> Tensor:
    return state[0] if isinstance(state, tuple) else state


@HALF
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [(MinGRU, nn.GRU), (MinLSTM, nn.LSTM), (MinGRUCell, nn.GRUCell), (MinLSTMCell, nn.LSTMCell)],
)
def test_a_cast_model_takes_its_states(ours: type, theirs: type, dtype: torch.dtype) -> None:
    head = nn.Linear(5, 2).to(dtype)
    for module in (ours(4, 5).to(dtype), theirs(4, 5).to(dtype)):
        cell = isinstance(module, (MinGRUCell, MinLSTMCell, nn.RNNCellBase))
        x = torch.randn(3, 4, dtype=dtype) if cell else torch.randn(7, 3, 4, dtype=dtype)
        state = module(x) if cell else module(x)[1]
        assert head(_first(state)).dtype == dtype
        # and the state goes in again
        again = module(x, state)
        assert _first(again if cell else again[1]).dtype == dtype
        head(_first(state)).sum().backward()


@LAYERS
@HALF
def test_a_state_has_the_dtype_of_the_one_before(layer: type, dtype: torch.dtype) -> None:
    module = layer(4, 5, 2, bidirectional=True).to(dtype)
    packed = pack_sequence([torch.randn(3, 4, dtype=dtype), torch.randn(2, 4, dtype=dtype)])
    for x, sizes in ((torch.randn(7, 3, 4, dtype=dtype), (4, 3, 5)), (packed, (4, 2, 5))):
        zeros = torch.zeros(sizes)
        exact, short = _first(module(x, zeros)[1]), _first(module(x)[1])
        assert exact.dtype == torch.float32
        assert short.dtype == dtype
        torch.testing.assert_close(exact.to(dtype), short)
        torch.testing.assert_close(_first(module(x, zeros.to(dtype))[1]), short)


@LAYERS
def test_learned_first_state_of_a_cast_layer(layer: type) -> None:
    module = layer(4, 5, learn_h0=True).bfloat16()
    h_n = _first(module(torch.randn(7, 3, 4, dtype=torch.bfloat16))[1])
    assert h_n.dtype == torch.bfloat16
    h_n.sum().backward()
    assert module.h_0.grad.dtype == torch.bfloat16


IN_PLACE: dict[str, Callable[[Tensor], Any]] = {
    "relu": torch.relu_,
    "add": lambda y: y.add_(1.0),
    "part": lambda y: y[:2].mul_(3.0),
    "dropout": lambda y: nn.functional.dropout(y, 0.5, inplace=True),
    "set": lambda y: y.__setitem__(0, 0.0),
}
SETTINGS: dict[str, dict[str, Any]] = {
    "one": {},
    "deep": {"num_layers": 2, "dropout": 0.5, "batch_first": True},
    "both": {"bidirectional": True},
    "projected": {"proj_size": 3},
}


def _gradients(module: nn.Module, x: Any, change: Callable[[Tensor], Any], copy: bool) -> Any:
    torch.manual_seed(1)
    y, state = module(x)
    data = y if isinstance(y, Tensor) else y.data
    if copy:
        data = data.clone()
    change(data)
    loss = data.square().sum() + _first(state).sum()
    return torch.autograd.grad(loss, list(module.parameters()), retain_graph=True)


@LAYERS
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("kind", ["batch", "unbatched", "packed"])
def test_outputs_may_be_written_to_in_training(layer: type, setting: str, kind: str) -> None:
    module = layer(4, 5, candidate="tanh", **SETTINGS[setting])
    x: Any = torch.randn(7, 3, 4) if kind == "batch" else torch.randn(7, 4)
    if kind == "packed":
        x = pack_sequence([torch.randn(3, 4), torch.randn(2, 4)])
    for name, change in IN_PLACE.items():
        wanted = _gradients(module, x, change, copy=True)
        found = _gradients(module, x, change, copy=False)
        torch.testing.assert_close(found, wanted, msg=lambda text, name=name: f"{name}: {text}")


class _Written(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu_(self.layer(x)[0])


@LAYERS
def test_outputs_may_be_written_to_in_graphs(layer: type) -> None:
    module, x = _Written(layer(4, 5, candidate="tanh")), torch.randn(7, 3, 4)
    weights = dict(module.named_parameters())

    def gradients(call: Callable[[Tensor], Tensor]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(call(x).square().sum(), list(weights.values()))

    def loss(weights: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(module, weights, (x,)).square().sum()

    wanted = gradients(lambda x: torch.relu(module.layer(x)[0]))
    torch._dynamo.reset()
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(gradients(compiled), wanted)
    torch.testing.assert_close(tuple(torch.func.grad(loss)(weights).values()), wanted)
    kept = torch.utils.checkpoint.checkpoint
    torch.testing.assert_close(gradients(lambda x: kept(module, x, use_reentrant=False)), wanted)
    with torch.utils.flop_counter.FlopCounterMode(display=False):
        torch.testing.assert_close(gradients(module), wanted)


@LAYERS
def test_nothing_is_copied_for_who_does_not_write(layer: type) -> None:
    module, x = layer(4, 5), torch.randn(7, 3, 4)
    y, _ = module(x)
    nn.functional.linear(y, torch.randn(2, 5)).square().sum().backward()
    assert torch._C._is_cow_tensor(y)
    # and written to, it is the caller's alone
    before = module(x)[0].detach().clone()
    y.detach().zero_()
    assert torch.equal(module(x)[0], before)


@pytest.mark.parametrize("cell", [MinGRUCell, MinLSTMCell])
def test_states_of_cells_may_be_written_to(cell: type) -> None:
    module, x = cell(4, 5), torch.randn(3, 4)

    def gradients(copy: bool) -> Any:
        state = _first(module(x))
        state = state.clone() if copy else state
        loss = _first(module(x, state.mul_(2.0))).square().sum()
        return torch.autograd.grad(loss, list(module.parameters()))

    torch.testing.assert_close(gradients(copy=False), gradients(copy=True))


def _tensors(nest: Any) -> list[Tensor]:
    if isinstance(nest, PackedSequence):
        return [nest.data]
    return [nest] if isinstance(nest, Tensor) else [x for part in nest for x in _tensors(part)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [MinGRU, MinLSTM, MinGRUCell, MinLSTMCell])
def test_results_share_no_memory(kind: type, dtype: torch.dtype) -> None:
    """Not with each other, nor with what was passed: no step at all, one, and several."""
    cell = kind in (MinGRUCell, MinLSTMCell)
    options = [{}] if cell else [{}, *SETTINGS.values(), {"learn_h0": True}]
    shapes = [(3, 4), (4,)] if cell else [(0, 3, 4), (1, 3, 4), (5, 3, 4), (1, 4), (5, 4)]
    inputs: list[Any] = [torch.randn(shape, dtype=dtype) for shape in shapes]
    if not cell:
        inputs += [pack_sequence([x[:, 0], x[:1, 1]]) for x in inputs[1:3]]
    for module in (kind(4, 4, **given).to(dtype).eval() for given in options):
        for x in inputs:
            state = module(x)
            hx = _first(state if cell else state[1]).detach().clone()
            for given in ((x,), (x, hx)):
                tensors = [*_tensors(module(*given)), *_tensors(given), *module.parameters()]
                places = [t.untyped_storage().data_ptr() for t in tensors if t.numel()]
                assert len(set(places)) == len(places)
