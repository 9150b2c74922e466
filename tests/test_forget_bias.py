"""`forget_bias`: what it makes of the gates and the memory of a minLSTM."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from minrnn import MinLSTM, MinLSTMCell
from minrnn.models import LanguageModel, ModelConfig

D = 5


def _layer(**options: float) -> tuple[nn.Module, list[Tensor]]:
    module = MinLSTM(4, D, 2, bidirectional=True, candidate="identity", **options)
    return module, [x for name, x in module.named_parameters() if name.startswith("bias")]


def _cell(**options: float) -> tuple[nn.Module, list[Tensor]]:
    module = MinLSTMCell(4, D, candidate="identity", **options)
    return module, [module.bias_ih]


MODULES = pytest.mark.parametrize("make", [_layer, _cell], ids=["layer", "cell"])


@MODULES
@pytest.mark.parametrize(("normalized", "of_i"), [(True, -3.0), (False, 0.0)])
def test_rows_that_it_moves(make: Callable, normalized: bool, of_i: float) -> None:
    torch.manual_seed(0)
    plain = make(normalized=normalized)[1]
    torch.manual_seed(0)
    module, biased = make(normalized=normalized, forget_bias=3.0)
    wanted = torch.tensor([3.0] * D + [of_i] * D + [0.0] * D)
    for before, after in zip(plain, biased, strict=True):
        torch.testing.assert_close(after - before, wanted)
    assert "forget_bias=3.0" in repr(module)
    # drawn anew, not moved once more
    module.reset_parameters()
    assert all((x[:D] - 3).abs().max() <= 0.5 for x in biased)


@MODULES
@pytest.mark.parametrize("normalized", [True, False])
@pytest.mark.parametrize("b", [-2.0, 0.0, 1.0, 4.0])
def test_share_that_a_step_keeps(make: Callable, normalized: bool, b: float) -> None:
    """sigmoid(b) where weights and drawn biases are zero, as in an LSTM."""
    module, _ = make(normalized=normalized, forget_bias=b)
    with torch.no_grad():
        for name, x in module.named_parameters():
            # biases are drawn within 1/2 of zero
            x.zero_() if name.startswith("weight") else x.round_()
    x = torch.zeros(1, 4) if isinstance(module, MinLSTMCell) else torch.zeros(1, 1, 4)
    state = torch.ones(*([4] if x.dim() == 3 else []), 1, D)
    result = module(x, state)
    kept = result[0] if isinstance(module, MinLSTMCell) else result[1][0]
    torch.testing.assert_close(kept, torch.full_like(kept, 1 / (1 + math.exp(-b))))


@pytest.mark.parametrize("normalized", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_large_one_keeps_the_state(normalized: bool, dtype: torch.dtype) -> None:
    options = {"normalized": normalized, "candidate": "identity"}
    layer = MinLSTM(8, 64, forget_bias=100.0, dtype=dtype, **options)
    cell = MinLSTMCell(8, 64, forget_bias=100.0, dtype=dtype, **options)
    x, h_0 = torch.randn(10, 3, 8, dtype=dtype), torch.ones(1, 3, 64, dtype=dtype)
    if not normalized:
        # i is open then: nothing to let in
        x.zero_()
        for bias in (layer.bias_ih_l0, cell.bias_ih):
            nn.init.zeros_(bias[128:])
    h_n, state = layer(x, h_0)[1][0], h_0[0]
    for x_t in x:
        state = cell(x_t, state)[0]
    # rounding of float16 and of the CPU kernels' exponential at most
    torch.testing.assert_close(h_n, h_0, rtol=1e-4, atol=0)
    torch.testing.assert_close(state, h_0[0], rtol=1e-4, atol=0)


def test_memory_is_one_plus_exp_b_steps() -> None:
    torch.manual_seed(0)
    for b, steps in ((0.0, 2), (2.0, 8), (4.0, 56)):
        layer = MinLSTM(8, 256, forget_bias=b)
        x, ends = torch.randn(200, 1, 8) * 0.1, torch.tensor([0.0, 1.0])
        # linear in the first state: how much of it is left after each step
        y = layer(x.expand(200, 2, 8), ends[None, :, None].expand(1, 2, 256))[0]
        left = (y[:, 1] - y[:, 0]).mean(-1)
        memory = 1 + left.sum().item()
        assert steps / 1.3 < memory < steps * 1.3, b


def test_language_model_passes_it_on() -> None:
    sizes = {"vocab_size": 7, "width": 8, "num_layers": 1, "mixer": "minlstm"}
    for normalized in (True, False):
        config = ModelConfig(**sizes, forget_bias=5.0, normalized=normalized)
        (bias,) = (
            x for name, x in LanguageModel(config).named_parameters() if name.endswith("bias_ih_l0")
        )
        f, i, v = bias.chunk(3)
        assert (f - 5).abs().max() < 1
        assert (i + (5 if normalized else 0)).abs().max() < 1
        assert v.abs().max() < 1
