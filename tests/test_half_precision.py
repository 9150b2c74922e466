"""bfloat16 and float16, under autocast or with weights cast: dtypes, gradients, state, pieces."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, bfloat16, float16, float32, nn

from minrnn import MinGRU, MinGRUCell, MinLSTM, MinLSTMCell
from minrnn.decision import DecisionConfig, DecisionModel
from minrnn.mixers import LongConvolution
from minrnn.models import LanguageModel, MixerName, ModelConfig
from minrnn.state import State

B, T, WIDTH, VOCAB = 3, 13, 12, 11
SIZES: dict[str, Any] = {"width": WIDTH, "num_layers": 2, "num_heads": 3, "state_size": 4}
MODULES: dict[str, Callable[[], nn.Module]] = {
    "MinGRU": lambda: MinGRU(WIDTH, 5, 2, batch_first=True, learn_h0=True),
    "MinLSTM": lambda: MinLSTM(WIDTH, 9, batch_first=True, proj_size=5, normalized=False),
    "DecisionModel": lambda: DecisionModel(
        DecisionConfig(WIDTH - 4, 2, blocks=ModelConfig(**SIZES, dropout=0.0))
    ),
}
for mixer in get_args(MixerName):
    MODULES[mixer] = lambda mixer=mixer: LanguageModel(
        ModelConfig(VOCAB, **SIZES, mixer=mixer, dropout=0.0)
    )
# float16 weights are what float16 autocast and bfloat16 weights are together
WAYS = {"autocast": bfloat16, "autocast-float16": float16, "cast": bfloat16}

# Largest |half - float32| over the largest |float32|: measured up to 8.9e-3 and 1.1e-3, in both
# ways and over all modules; the rounding of weights and of each layer's output, 2^-8 or 2^-11.
TOLERANCE = {bfloat16: 1.8e-2, float16: 2.2e-3}
# One unit in the last place of the largest: what pieces may differ from the whole by, since a
# product of other sizes may add in another order. Measured 0 for most, up to 0.86 units; for the
# state of nn.LSTM, which torch rounds at every step, 1.8.
UNIT = {bfloat16: 2.0**-7, float16: 2.0**-10}


@pytest.fixture(params=MODULES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def _inputs(module: nn.Module) -> Tensor:
    if isinstance(module, LanguageModel):
        return torch.randint(VOCAB, (B, T))
    x = torch.randn(B, T, WIDTH)
    if isinstance(module, DecisionModel):
        # returns and step numbers that half precision has no room for
        x[..., 2] = 3000 + 100 * x[..., 2]
        x[..., -1] = torch.arange(601, 601 + T)
    return x


def _in_half(
    module: nn.Module, x: Tensor, way: str
) -> tuple[nn.Module, Tensor, AbstractContextManager[Any]]:
    """The module in half precision, its input, and the context to call it in."""
    if way != "cast":
        return module, x, torch.autocast("cpu", dtype=WAYS[way])
    keeps = isinstance(module, (LanguageModel, DecisionModel))
    return module.bfloat16(), x if keeps else x.bfloat16(), nullcontext()


def _states(state: Any) -> dict[str, Tensor]:
    if isinstance(state, State):
        return dict(state.flatten())
    return {"h": state[0] if isinstance(state, tuple) else state}


def _zeros(module: nn.Module) -> Tensor | None:
    """A layer's first state in float32; models begin with it."""
    if isinstance(module, (MinGRU, MinLSTM)):
        return torch.zeros(module.num_layers, B, module.hidden_size)
    return None


def _off(found: Tensor, wanted: Tensor) -> float:
    return ((found.float() - wanted.float()).abs().max() / wanted.float().abs().max()).item()


@pytest.mark.parametrize("way", WAYS)
def test_dtypes_values_and_gradients(name: str, way: str) -> None:
    module, dtype = MODULES[name](), WAYS[way]
    x = _inputs(module)
    wanted = module(x)[0].detach()
    module, x, context = _in_half(module, x, way)
    with context:
        y, state = module(x)
    # the actions leave a DecisionModel through buffers that autocast does not touch
    assert y.dtype == (float32 if name == "DecisionModel" and way != "cast" else dtype)
    assert _off(y, wanted) < TOLERANCE[dtype]
    for part, tensor in _states(state).items():
        # what is kept of inputs has their dtype, what is recurrent is float32; torch's own aside,
        # and the layers, which return a state as torch's do
        alone = name in ("MinGRU", "MinLSTM") and way == "cast"
        if part.rpartition(".")[2] in ("h", "c", "a", "m") and name not in ("gru", "lstm"):
            assert tensor.dtype == (dtype if alone else float32), part
    y.float().square().sum().backward()
    # nothing comes after the norm in front of no mixer
    for parameter in (p for p in module.parameters() if p.grad is not None or name != "none"):
        assert parameter.grad.dtype == parameter.dtype
        assert parameter.grad.isfinite().all()


@pytest.mark.parametrize("way", WAYS)
@torch.no_grad()
def test_pieces_and_steps_are_the_whole(name: str, way: str) -> None:
    module, dtype = MODULES[name]().eval(), WAYS[way]
    module, x, context = _in_half(module, _inputs(module), way)
    with context:
        # a state has the dtype of the one before
        first = _zeros(module)
        whole, last = module(x, first)
        for lengths in ([1] * T, [5, 1, 7]):
            state, pieces = first, []
            for piece in x.split(lengths, dim=1):
                y, state = module(piece, state)
                pieces.append(y)
            assert _off(torch.cat(pieces, dim=1), whole) <= UNIT[dtype]
            found, units = _states(state), 2 if name == "lstm" else 1
            for part, tensor in _states(last).items():
                assert found[part].dtype == tensor.dtype, part
                assert not tensor.numel() or _off(found[part], tensor) <= units * UNIT[dtype], part


@pytest.mark.parametrize(("cell", "layer"), [(MinGRUCell, MinGRU), (MinLSTMCell, MinLSTM)])
@pytest.mark.parametrize("way", WAYS)
@torch.no_grad()
def test_thousand_steps_decode_as_they_were_trained(cell: type, layer: type, way: str) -> None:
    """A memory of some 660 steps: a state rounded at each would be off by 2e-2 in bfloat16."""
    module = layer(WIDTH, WIDTH, batch_first=True)
    gate = slice(WIDTH, 2 * WIDTH) if layer is MinLSTM else slice(WIDTH)
    module.bias_ih_l0[gate] -= 7
    module, x, context = _in_half(module, torch.randn(B, 1000, WIDTH), way)
    step = cell(WIDTH, WIDTH).to(x.dtype)
    weights = {name.removesuffix("_l0"): x for name, x in module.state_dict().items()}
    step.load_state_dict(weights)
    with context:
        whole, last = module(x, _zeros(module))
        state = torch.zeros(B, WIDTH)
        for x_t in x.unbind(1):
            result = step(x_t, state)
            state = result if isinstance(result, Tensor) else result[0]
    last = last if isinstance(last, Tensor) else last[0]
    assert state.dtype == last.dtype == float32
    assert whole.dtype == WAYS[way]
    # measured 0: the products of a step round as those of the sequence
    torch.testing.assert_close(state, last[0], rtol=2e-3, atol=0)


def test_late_positions_of_a_filter_fit_in_half_precision() -> None:
    """float16 ends at 65,504, bfloat16 counts to 256."""
    module = LongConvolution(2, length=70_000)
    wanted = module.kernel(70_000)
    # measured, over four seeds: 1.7e-3 and 1.6e-2 of the largest
    for dtype, tolerance in ((float16, 4e-3), (bfloat16, 4e-2)):
        assert _off(module.to(dtype).kernel(70_000), wanted) < tolerance
