"""The pair (h_0, c_0) that MinLSTM and its cell take, and (h_n, c_n): one state, in both."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils.rnn import pack_sequence

from minrnn import MinLSTM, MinLSTMCell

B, WIDTH, D = 3, 4, 5


def _packed() -> Any:
    return pack_sequence([torch.randn(T, WIDTH) for T in (2, 6, 3)], enforce_sorted=False)


# module, input, shape of the state
CALLS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any], tuple[int, ...]]] = {
    "layer": (lambda: MinLSTM(WIDTH, D), lambda: torch.randn(7, B, WIDTH), (1, B, D)),
    "unbatched": (lambda: MinLSTM(WIDTH, D), lambda: torch.randn(7, WIDTH), (1, D)),
    "packed": (lambda: MinLSTM(WIDTH, D), _packed, (1, B, D)),
    "deep": (
        lambda: MinLSTM(WIDTH, D, 2, bidirectional=True, proj_size=2, batch_first=True),
        lambda: torch.randn(B, 7, WIDTH),
        (4, B, D),
    ),
    "no batch": (lambda: MinLSTM(WIDTH, D), lambda: torch.randn(7, 0, WIDTH), (1, 0, D)),
    "no time": (lambda: MinLSTM(WIDTH, D), lambda: torch.randn(0, B, WIDTH), (1, B, D)),
    "cell": (lambda: MinLSTMCell(WIDTH, D), lambda: torch.randn(B, WIDTH), (B, D)),
    "cell of one": (lambda: MinLSTMCell(WIDTH, D), lambda: torch.randn(WIDTH), (D,)),
}
CALL = pytest.mark.parametrize("call", CALLS)


def _last(result: Any) -> Tensor:
    """The state that a call ends in: h of a cell, h_n of a layer."""
    first, second = result
    return second[0] if isinstance(second, tuple) else first


@CALL
def test_one_state_in_every_form(call: str) -> None:
    make, data, shape = CALLS[call]
    module, x, state = make(), data(), torch.rand(shape)
    wanted, zeros = _last(module(x, state)), torch.zeros(shape)
    pairs = [
        (state, state),
        (state, state.clone()),
        (state, zeros),
        [zeros, state],
        (state, -zeros),
    ]
    # and entry by entry: what one of the two holds
    first = (torch.arange(D) < 2).float()
    pairs.append((state * first, state * (1 - first)))
    for pair in pairs:
        assert torch.equal(_last(module(x, pair)), wanted)
    torch.testing.assert_close(_last(module(x, (zeros, zeros))), _last(module(x)))


@pytest.mark.parametrize("call", [name for name in CALLS if name != "no batch"])
def test_states_that_differ_are_refused(call: str) -> None:
    make, data, shape = CALLS[call]
    module, x, state = make(), data(), torch.rand(shape) + 0.1
    other = state.clone()
    other.view(-1)[-1:] += 1
    message = f"agrees or is zero in one, got 1 of {state.numel()} entries that differ; pass one"
    with pytest.raises(ValueError, match=re.escape(message)):
        module(x, (state, other))
    with pytest.raises(ValueError, match=f"got {state.numel()} of {state.numel()} entries"):
        module(x, (state, state * torch.nan))


@pytest.mark.parametrize("call", ["layer", "packed", "cell"])
@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize("scale", [1.0, 0.0], ids=["some", "zeros"])
def test_the_lone_state_has_the_whole_gradient(call: str, place: int, scale: float) -> None:
    make, data, shape = CALLS[call]
    module, x = make(), data()
    alone, z = (nn.Parameter(scale * torch.ones(shape)) for _ in range(2))
    _last(module(x, alone)).sum().backward()
    pair = [torch.zeros(shape), torch.zeros(shape)]
    pair[place] = z
    _last(module(x, tuple(pair))).sum().backward()
    assert z.grad.abs().min() > 0
    assert torch.equal(z.grad, alone.grad)


@pytest.mark.parametrize("scale", [1.0, 0.0], ids=["some", "zeros"])
def test_equal_learned_states_share_the_gradient_and_stay_equal(scale: float) -> None:
    layer, x = MinLSTM(WIDTH, D), torch.randn(7, B, WIDTH)
    alone, h_0, c_0 = (nn.Parameter(scale * torch.ones(1, B, D)) for _ in range(3))
    layer(x, alone)[0].sum().backward()
    optimizer = torch.optim.Adam([h_0, c_0], lr=0.1)
    layer(x, (h_0, c_0))[0].sum().backward()
    torch.testing.assert_close(h_0.grad + c_0.grad, alone.grad)
    optimizer.step()
    layer(x, (h_0, c_0))[0].sum().backward()
    assert torch.equal(h_0, c_0)
    assert (h_0 != scale).all()


@CALL
def test_results_have_memory_of_their_own(call: str) -> None:
    make, data, shape = CALLS[call]
    module, x, state = make().eval(), data(), torch.rand(shape)
    before = state.clone()
    with torch.no_grad():
        result = module(x, (state, state))
    h_n, c_n = result[1] if isinstance(result[1], tuple) else result
    assert torch.equal(h_n, c_n)
    wanted = 0.5 * h_n
    for tensor in (h_n, c_n):
        tensor.mul_(0.5)
    assert torch.equal(h_n, wanted)
    assert torch.equal(c_n, wanted)
    assert torch.equal(state, before)
    assert load(save({"h": h_n, "c": c_n})).keys() == {"h", "c"}


def test_a_carried_pair_has_the_gradient_of_one_state() -> None:
    layer, x = MinLSTM(WIDTH, D).double(), torch.randn(8, B, WIDTH).double()
    whole = torch.autograd.grad(layer(x)[0].square().sum(), list(layer.parameters()))
    y, state = layer(x[:5])
    # through the pair, one of the two, and with what stateful code does to both
    for carried in (state, state[0], state[1], tuple(1.0 * s for s in state)):
        loss = y.square().sum() + layer(x[5:], carried)[0].square().sum()
        found = torch.autograd.grad(loss, list(layer.parameters()), retain_graph=True)
        torch.testing.assert_close(found, whole)
    mask = torch.tensor([1.0, 0.0, 1.0])[:, None]
    masked = tuple((mask * s).detach() for s in state)
    assert torch.equal(layer(x[5:], masked)[0], layer(x[5:], masked[1])[0])


def test_a_state_of_nan_is_left_to_the_reset() -> None:
    layer, x = MinLSTM(WIDTH, D), torch.randn(7, B, WIDTH)
    state, reset = torch.full((1, B, D), torch.nan), torch.zeros(7, B, dtype=torch.bool)
    reset[0] = True
    y, (h_n, _) = layer(x, (state, state.clone()), reset=reset)
    torch.testing.assert_close(y, layer(x)[0])
    assert h_n.isfinite().all()


@pytest.mark.parametrize("features", [1, 2, D])
def test_h_0_of_a_projected_lstm(features: int) -> None:
    layer, x = MinLSTM(WIDTH, D, proj_size=features % D or 2), torch.randn(7, B, WIDTH)
    c_0 = torch.rand(1, B, D) + 0.1
    assert torch.equal(layer(x, (torch.zeros(1, B, features), c_0))[0], layer(x, c_0)[0])
    message = "entries that differ" if features == D else "h_0 is zeros where it has not"
    with pytest.raises(ValueError, match=message):
        layer(x, (torch.full((1, B, features), 9.0), c_0))
    with pytest.raises(RuntimeError, match="of one shape"):
        layer(x, (torch.zeros(1, B, 3), c_0))


class _Call(nn.Module):
    """A layer that is given the two states as two arguments."""

    def __init__(self, layer: MinLSTM) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, h_0: Tensor, c_0: Tensor) -> Tensor:
        return self.layer(x, (h_0, c_0))[0]


def _vmapped(module: _Call, example: tuple[Tensor, ...]) -> Callable[..., Tensor]:
    mapped = torch.func.vmap(module)
    return lambda *given: mapped(*[x[None] for x in given])[0]


TOOLS: dict[str, Callable[[_Call, tuple[Tensor, ...]], Callable[..., Tensor]]] = {
    "compile": lambda module, _: torch.compile(module, backend="aot_eager", fullgraph=True),
    "export": lambda module, example: torch.export.export(module, example).module(),
    "trace": lambda module, example: torch.jit.trace(module, example),
    "make_fx": lambda module, example: make_fx(module)(*example),
    "vmap": _vmapped,
}


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("tool", TOOLS)
def test_pairs_in_graphs(tool: str) -> None:
    module, x = _Call(MinLSTM(WIDTH, D)), torch.randn(7, B, WIDTH)
    state, zeros = torch.rand(1, B, D) + 0.1, torch.zeros(1, B, D)
    torch._dynamo.reset()
    call = TOOLS[tool](module, (x, state, state.clone()))
    wanted = module(x, state, state)
    for pair in ((state, state.clone()), (state, zeros), (zeros, state)):
        torch.testing.assert_close(call(x, *pair), wanted)
    # values cannot be looked at there: entries that differ are NaN, and no others
    other = state.clone()
    other[0, 1, 2] += 1
    off = call(x, state, other).isnan()
    assert off[:, 1, 2].all()
    assert off.sum() == 7


def test_pairs_under_autocast() -> None:
    layer, x = MinLSTM(WIDTH, D), torch.randn(7, B, WIDTH)
    state = torch.rand(1, B, D)
    with torch.autocast("cpu", torch.bfloat16):
        wanted = layer(x, state)[0]
        for pair in ((state, torch.zeros(1, B, D)), (state, state.clone())):
            assert torch.equal(layer(x, pair)[0], wanted)
        # as an encoder makes it, beside zeros in float32
        z = nn.Linear(WIDTH, D)(torch.rand(1, B, WIDTH))
        for pair in ((z, torch.zeros(1, B, D)), (torch.zeros(1, B, D), z)):
            y, (h_n, c_n) = layer(x, pair)
            assert torch.equal(y, layer(x, z)[0])
            assert h_n.dtype == c_n.dtype == torch.float32
        with pytest.raises(ValueError, match="entries that differ"):
            layer(x, (state, 1 + state))
