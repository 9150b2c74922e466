"""The block and the language model of the paper."""

from typing import get_args

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from minrnn.blocks import Block, CausalConv, FeedForward
from minrnn.layers import MinGRU
from minrnn.mixers import MinimalRNN
from minrnn.models import LanguageModel, MixerName, ModelConfig


def test_convolution_is_causal_depthwise_then_pointwise() -> None:
    conv = CausalConv(3, 4).double()
    x = torch.randn(2, 6, 3, dtype=torch.float64)
    w, padded = conv.depthwise.weight[:, 0], F.pad(x, (0, 0, 3, 0))
    u = torch.stack([(padded[:, t : t + 4] * w.T).sum(1) for t in range(6)], dim=1)
    expected = (u + conv.depthwise.bias) @ conv.pointwise.weight.T + conv.pointwise.bias
    torch.testing.assert_close(conv(x)[0], expected)


def test_block_adds_three_branches() -> None:
    block = Block(MinimalRNN(MinGRU, 4, 2), 4, conv_width=4, mlp_ratio=2, dropout=0.5).eval()
    x = torch.randn(2, 6, 4)
    y = x + block.conv(x)[0]
    y = y + block.mixer(block.mixer_norm(y))[0]
    y = y + block.mlp(block.mlp_norm(y))
    torch.testing.assert_close(block(x)[0], y)


# trap 16
def test_dropout_leaves_the_residual_stream_and_the_state_alone() -> None:
    block = Block(MinimalRNN(MinGRU, 4, 2), 4, conv_width=0, mlp_ratio=0, dropout=0.999)
    x = torch.randn(2, 6, 4)
    y, state = block.train()(x)
    # nearly every branch value is dropped, so x itself comes through
    assert (y == x).float().mean() > 0.8
    assert torch.equal(state["mixer"]["h"], block.eval()(x)[1]["mixer"]["h"])


def test_feed_forward_sees_one_step_at_a_time() -> None:
    mlp, x = FeedForward(4, 3), torch.randn(2, 6, 4)
    torch.testing.assert_close(mlp(x)[:, 2:3], mlp(x[:, 2:3]))


def test_paper_model_has_its_size() -> None:
    with torch.device("meta"):
        model = LanguageModel(ModelConfig(vocab_size=65))
    width = 384
    conv = width * 4 + width + width * width + width
    rnn = 2 * (2 * width) * width + 2 * (2 * width) + 2 * width * width
    mlp = 2 * 4 * width * width + 4 * width + width
    layers = 3 * (conv + rnn + mlp + 2 * width)
    assert sum(p.numel() for p in model.parameters()) == layers + 65 * (2 * width + 1) + width


@pytest.mark.parametrize("mixer", ["mingru", "minlstm"])
def test_one_batch_is_learnt_by_heart(mixer: str) -> None:
    torch.manual_seed(0)
    model = LanguageModel(ModelConfig(vocab_size=7, width=16, num_layers=1, mixer=mixer, dropout=0))
    ids = torch.randint(7, (2, 17))
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(150):
        loss = F.cross_entropy(model(ids[:, :-1])[0].flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.05


def test_untrained_model_finds_every_symbol_equally_likely() -> None:
    model = LanguageModel(ModelConfig(vocab_size=50, width=64)).eval()
    probabilities = model(torch.randint(50, (2, 9)))[0].softmax(-1)
    assert probabilities.max() < 0.05


def test_wrong_ids_are_named() -> None:
    model = LanguageModel(ModelConfig(vocab_size=7, width=8))
    with pytest.raises(
        ValueError, match=r"`ids` must have shape \(B, T\) with T >= 1, got \(2, 0\)"
    ):
        model(torch.zeros(2, 0, dtype=torch.long))
    with pytest.raises(TypeError, match=r"`ids` must hold integers, got torch\.float32"):
        model(torch.zeros(2, 3))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("width", 0, "`width` must be >= 1, got 0"),
        ("num_layers", 0, "`num_layers` must be >= 1, got 0"),
        ("conv_width", -1, "`conv_width` must be >= 0, got -1"),
        ("dropout", 1.0, r"`dropout` must be in \[0, 1\), got 1.0"),
        ("mixer", "rnn", "`mixer` must be one of 'mingru', 'minlstm', .*, 'none', got 'rnn'"),
        ("candidate", "relu", "`candidate` must be one of 'g', 'identity', 'tanh', got 'relu'"),
    ],
)
def test_wrong_configurations_are_named(field: str, value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModelConfig(**{field: value})


def test_a_model_needs_symbols() -> None:
    with pytest.raises(ValueError, match=r"`config.vocab_size` must be >= 1, got 0"):
        LanguageModel(ModelConfig())


def test_model_trains_under_bfloat16_autocast() -> None:
    model = LanguageModel(ModelConfig(vocab_size=7, width=16, num_layers=1, dropout=0))
    ids = torch.randint(7, (2, 17))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits, state = model(ids)
        loss = F.cross_entropy(logits.float().flatten(0, 1), ids.flatten())
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())
    assert state["0"]["mixer"]["h"].dtype == torch.float32
    assert isinstance(model.blocks, nn.ModuleList)


@pytest.mark.parametrize("mixer", get_args(MixerName))
def test_a_state_of_another_model_or_batch_is_named(mixer: str) -> None:
    fields = {"vocab_size": 9, "width": 8, "mixer": mixer, "num_heads": 2}
    model, deeper = (LanguageModel(ModelConfig(num_layers=n, **fields)).eval() for n in (1, 2))
    ids = torch.randint(9, (2, 5))
    with pytest.raises(ValueError, match=r"whose part '1\..*' has shape None a row, got \("):
        model(ids, deeper(ids)[1])
    with pytest.raises(ValueError, match=r"whose part '1\..*' has shape \(.*\) a row, got None"):
        deeper(ids, model(ids)[1])
    wider = LanguageModel(ModelConfig(num_layers=1, **fields | {"width": 16})).eval()
    with pytest.raises(ValueError, match=r"has shape \(.*\) a row, got \("):
        model(ids, wider(ids)[1])
    with pytest.raises(ValueError, match="`state` must have batch size B = 2, got 1"):
        model(ids, model(ids[:1])[1])
