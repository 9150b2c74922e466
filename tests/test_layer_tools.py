"""What stands around a layer: dropout, copies, dtypes, autocast, checkpointing, torch.func."""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from minrnn import MinGRU, MinGRUCell, MinLSTM, MinLSTMCell

LAYERS = pytest.mark.parametrize("layer", [MinGRU, MinLSTM])
CELLS = pytest.mark.parametrize("cell", [MinGRUCell, MinLSTMCell])


def _state(result: Any) -> Tensor:
    return result[1] if isinstance(result[1], Tensor) else result[1][0]


def _step(result: Any) -> Tensor:
    return result if isinstance(result, Tensor) else result[1]


@LAYERS
def test_dropout_acts_between_layers_only(layer: type) -> None:
    module, first = layer(4, 5, num_layers=2, dropout=1.0), layer(4, 5)
    first.load_state_dict({k: v for k, v in module.state_dict().items() if k in first.state_dict()})
    x = torch.randn(7, 3, 4)
    result = module(x)
    # the first state is not dropped, the second layer saw zeros, and its output is not dropped
    assert_close(_state(result)[0], _state(first(x))[0])
    second = layer(5, 5)
    names = {name: name.replace("l0", "l1") for name in second.state_dict()}
    second.load_state_dict({a: module.state_dict()[b] for a, b in names.items()})
    assert_close(result[0], second(torch.zeros(7, 3, 5))[0])
    assert_close(_state(result)[1], result[0][-1])
    assert (result[0] != 0).all()
    module.dropout = 0.0
    assert not torch.equal(module(x)[0], result[0])


@LAYERS
@pytest.mark.parametrize("bidirectional", [False, True])
def test_dropout_is_seeded_and_off_in_eval(layer: type, bidirectional: bool) -> None:
    module = layer(4, 5, num_layers=3, dropout=0.5, bidirectional=bidirectional)
    x = torch.randn(7, 3, 4)
    runs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        runs.append(module(x)[0])
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])
    y = module.eval()(x)[0]
    assert torch.equal(module(x)[0], y)
    module.train().dropout = 0.0
    assert torch.equal(module(x)[0], y)


def test_dropout_scales_what_it_keeps() -> None:
    module = MinGRU(4, 400, num_layers=2, dropout=0.25)
    seen = []
    with torch.no_grad():
        # a second layer that shows its input: all gates open, v = x
        module.candidate = "identity"
        for name, value in (("weight_ih_l1", 0.0), ("bias_ih_l1", 0.0)):
            getattr(module, name).fill_(value)
        module.bias_ih_l1[:400] = 100.0
        module.weight_ih_l1[400:] = torch.eye(400)
        x = torch.randn(5, 3, 4)
        for train in (True, False):
            seen.append(module.train(train)(x)[0])
    kept = seen[0] != 0
    assert_close(seen[0][kept], seen[1][kept] / 0.75)
    assert 0.7 < kept.float().mean() < 0.8


def test_repr_of_layers_and_cells() -> None:
    layer = MinGRU(4, 5, 3, False, dropout=0.5, bidirectional=True, learn_h0=True)
    text = "MinGRU(4, 5, num_layers=3, bias=False, dropout=0.5, bidirectional=True, learn_h0=True)"
    assert repr(layer) == text
    assert repr(MinGRUCell(4, 5)) == "MinGRUCell(4, 5)"
    cell = MinLSTMCell(4, 5, bias=False, candidate="tanh", normalized=False)
    assert repr(cell) == "MinLSTMCell(4, 5, bias=False, candidate='tanh', normalized=False)"


NAMES = {
    "h_0": (4, 5),
    "weight_ih_l0": (15, 4),
    "bias_ih_l0": (15,),
    "weight_hr_l0": (3, 5),
    "weight_ih_l0_reverse": (15, 4),
    "bias_ih_l0_reverse": (15,),
    "weight_hr_l0_reverse": (3, 5),
    "weight_ih_l1": (15, 6),
    "bias_ih_l1": (15,),
    "weight_hr_l1": (3, 5),
    "weight_ih_l1_reverse": (15, 6),
    "bias_ih_l1_reverse": (15,),
    "weight_hr_l1_reverse": (3, 5),
}


def test_names_and_shapes_of_saved_weights_are_fixed() -> None:
    layer = MinLSTM(4, 5, 2, bidirectional=True, proj_size=3, learn_h0=True)
    assert {name: tuple(x.shape) for name, x in layer.state_dict().items()} == NAMES
    for cell, rows in ((MinGRUCell, 10), (MinLSTMCell, 15)):
        shapes = {name: tuple(x.shape) for name, x in cell(4, 5).state_dict().items()}
        assert shapes == {"weight_ih": (rows, 4), "bias_ih": (rows,)}


def _modules() -> list[tuple[nn.Module, nn.Module, Tensor]]:
    """Each class, made twice with other weights, and an input."""
    x = torch.randn(7, 3, 4)
    layers = [
        (
            kind(4, 5, 2, bidirectional=True, learn_h0=True),
            kind(4, 5, 2, bidirectional=True, learn_h0=True),
            x,
        )
        for kind in (MinGRU, MinLSTM)
    ]
    return layers + [(kind(4, 5), kind(4, 5), x[0]) for kind in (MinGRUCell, MinLSTMCell)]


@pytest.mark.parametrize("n", range(4), ids=["MinGRU", "MinLSTM", "MinGRUCell", "MinLSTMCell"])
def test_weights_are_loaded_copied_and_pickled(n: int) -> None:
    module, other, x = _modules()[n]
    wanted = module(x)[0]
    assert not torch.equal(other(x)[0], wanted)
    assert torch.equal(torch.func.functional_call(other, module.state_dict(), (x,))[0], wanted)
    assert str(other.load_state_dict(module.state_dict())) == "<All keys matched successfully>"
    twins = [other, copy.deepcopy(module), pickle.loads(pickle.dumps(module))]
    for twin in twins:
        assert torch.equal(twin(x)[0], wanted)
        assert repr(twin) == repr(module)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
    for twin in twins:
        assert torch.equal(twin(x)[0], wanted)


@pytest.mark.parametrize("n", range(4), ids=["MinGRU", "MinLSTM", "MinGRUCell", "MinLSTMCell"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_module_moves_to_a_dtype(n: int, dtype: torch.dtype) -> None:
    module, _, x = _modules()[n]
    wanted = module(x)[0]
    result = module.to(dtype)(x.to(dtype))
    state = _step(result) if n > 1 else _state(result)
    if n < 2:
        assert result[0].dtype == dtype
    assert state.dtype == dtype
    # eight bits of weights and inputs
    tolerance = 1e-6 if dtype == torch.float64 else 0.05
    assert_close(result[0].float(), wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("n", range(4), ids=["MinGRU", "MinLSTM", "MinGRUCell", "MinLSTMCell"])
def test_meta_device_then_weights(n: int) -> None:
    module, _, x = _modules()[n]
    with torch.device("meta"):
        empty = _modules()[n][0]
        shapes = empty(torch.empty(x.shape))[0].shape
    assert shapes == module(x)[0].shape
    assert all(parameter.is_meta for parameter in empty.parameters())
    made = empty.to_empty(device="cpu")
    # conftest fills what nobody wrote with NaN
    assert made(x)[0].isnan().any()
    made.reset_parameters()
    assert made(x)[0].isfinite().all()
    made.load_state_dict(module.state_dict())
    assert torch.equal(made(x)[0], module(x)[0])


@LAYERS
def test_flatten_parameters_does_nothing(layer: type) -> None:
    module = layer(4, 5)
    before = {name: (x.data_ptr(), x.clone()) for name, x in module.named_parameters()}
    assert module.flatten_parameters() is None
    for name, parameter in module.named_parameters():
        assert parameter.data_ptr() == before[name][0]
        assert torch.equal(parameter, before[name][1])


@LAYERS
def test_weight_with_a_parametrization(layer: type) -> None:
    class Halved(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return weight / 2

    module, plain = layer(4, 5), layer(4, 5)
    plain.load_state_dict(module.state_dict())
    parametrize.register_parametrization(module, "weight_ih_l0", Halved())
    x = torch.randn(7, 3, 4)
    with torch.no_grad():
        plain.weight_ih_l0 /= 2
    assert torch.equal(module(x)[0], plain(x)[0])
    module(x)[0].sum().backward()
    plain(x)[0].sum().backward()
    original = module.parametrizations.weight_ih_l0.original
    assert_close(original.grad, plain.weight_ih_l0.grad / 2)
    square = parametrizations.orthogonal(layer(4, 5), "weight_ih_l0")
    assert_close(square.weight_ih_l0.T @ square.weight_ih_l0, torch.eye(4), rtol=0, atol=1e-5)
    square(x)[0].sum().backward()
    assert square.parametrizations.weight_ih_l0.original.grad.abs().max() > 0


@LAYERS
def test_gradient_penalty(layer: type) -> None:
    """|d critic / d x| is pulled to 1, as in a Wasserstein GAN: a gradient of a gradient."""
    module = layer(4, 5, 2, bidirectional=True).double()
    x = torch.randn(6, 3, 4, dtype=torch.float64, requires_grad=True)

    def penalty(weight: Tensor) -> Tensor:
        y = torch.func.functional_call(module, {"weight_ih_l0": weight}, (x,))[0]
        (slope,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        return (slope.norm(dim=(0, 2)) - 1).square().sum()

    assert torch.autograd.gradcheck(penalty, (module.weight_ih_l0.detach().requires_grad_(),))


@LAYERS
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing_gives_equal_gradients(layer: type, use_reentrant: bool) -> None:
    module = layer(4, 5, 3, dropout=0.5)
    x = torch.randn(7, 3, 4, requires_grad=True)
    leaves = [x, *module.parameters()]
    grads = []
    for run in (module, lambda x: checkpoint(module, x, use_reentrant=use_reentrant)):
        torch.manual_seed(1)
        for leaf in leaves:
            leaf.grad = None
        (run(x)[0] ** 2).sum().backward()
        grads.append([leaf.grad for leaf in leaves])
    for actual, wanted in zip(*grads, strict=True):
        assert wanted.abs().max() > 0
        assert torch.equal(actual, wanted)


@LAYERS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(layer: type, dtype: torch.dtype) -> None:
    module = layer(4, 5, 2, bidirectional=True)
    x = torch.randn(7, 3, 4, requires_grad=True)
    wanted = module(x)
    (grad,) = torch.autograd.grad(wanted[0].sum(), x)
    with torch.autocast("cpu", dtype=dtype):
        result = module(x)
        again = module(x, result[1])[0]
    assert result[0].dtype == again.dtype == dtype
    assert _state(result).dtype == torch.float32
    # eight or eleven bits in gates and outputs
    tolerance = {torch.bfloat16: 0.03, torch.float16: 0.005}[dtype]
    assert_close(result[0].float(), wanted[0], rtol=tolerance, atol=tolerance)
    assert_close(_state(result), _state(wanted), rtol=tolerance, atol=tolerance)
    (half,) = torch.autograd.grad(result[0].float().sum(), x)
    assert_close(half, grad, rtol=5 * tolerance, atol=5 * tolerance)


@CELLS
def test_autocast_of_a_step(cell: type) -> None:
    module = cell(4, 5)
    x, h = torch.randn(3, 4), torch.rand(3, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        state = _step(module(x, h))
    assert state.dtype == torch.float32
    assert_close(state, _step(module(x, h)), rtol=0.03, atol=0.03)


def _loss(module: nn.Module, weights: dict[str, Tensor], x: Tensor) -> Tensor:
    return torch.func.functional_call(module, weights, (x,))[0].square().sum()


@pytest.mark.parametrize("n", range(4), ids=["MinGRU", "MinLSTM", "MinGRUCell", "MinLSTMCell"])
def test_gradients_of_torch_func(n: int) -> None:
    module, _, x = _modules()[n]
    weights = dict(module.named_parameters())
    grads = torch.func.grad(lambda weights: _loss(module, weights, x))(weights)
    wanted = torch.autograd.grad(_loss(module, weights, x), list(weights.values()))
    for grad, want in zip(grads.values(), wanted, strict=True):
        assert want.abs().max() > 0
        assert_close(grad, want)


@LAYERS
@pytest.mark.parametrize("batch_first", [False, True])
def test_gradients_per_sample(layer: type, batch_first: bool) -> None:
    module = layer(4, 5, 2, bidirectional=True, batch_first=batch_first)
    weights = dict(module.named_parameters())
    axis = 0 if batch_first else 1
    x = torch.randn(3, 6, 4) if batch_first else torch.randn(6, 3, 4)

    def loss(weights: dict[str, Tensor], sample: Tensor) -> Tensor:
        return _loss(module, weights, sample.unsqueeze(axis))

    per_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, axis))(weights, x)
    for b in range(3):
        wanted = torch.autograd.grad(loss(weights, x.select(axis, b)), list(weights.values()))
        for grad, want in zip(per_sample.values(), wanted, strict=True):
            assert_close(grad[b], want)


@LAYERS
@CELLS
def test_ensemble_in_one_call(layer: type, cell: type) -> None:
    x = torch.randn(6, 3, 4)
    for kind, example in ((layer, x), (cell, x[0])):
        members = [kind(4, 5) for _ in range(3)]
        weights, _ = torch.func.stack_module_state(members)

        def call(weights: dict[str, Tensor], kind: Any = members[0], x: Tensor = example) -> Tensor:
            result = torch.func.functional_call(kind, weights, (x,))
            return result if isinstance(result, Tensor) else result[0]

        ys = torch.func.vmap(call)(weights)
        for n, member in enumerate(members):
            result = member(example)
            assert_close(ys[n], result if isinstance(result, Tensor) else result[0])


@LAYERS
def test_jacobian_is_that_of_autograd(layer: type) -> None:
    module = layer(4, 5, bidirectional=True).double()
    x = torch.randn(4, 2, 4, dtype=torch.float64)

    def call(x: Tensor) -> Tensor:
        return module(x)[0]

    wanted = torch.autograd.functional.jacobian(call, x)
    assert wanted.abs().max() > 0
    assert_close(torch.func.jacrev(call)(x), wanted)
