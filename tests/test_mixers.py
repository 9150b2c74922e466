"""The paper's competitors against their equations, against others, and against closed forms."""

import importlib
import sys
from collections.abc import Callable
from typing import get_args

import pytest
import torch
from mixer_references import answer
from torch import Tensor, nn

from minrnn.mixers import (
    H3,
    S4D,
    S6,
    Aaren,
    Attention,
    LongConvolution,
    Mamba,
    Mixer,
    RecurrentNetwork,
    Ungated,
)
from minrnn.models import LanguageModel, MixerName, ModelConfig, build_mixer
from minrnn.ops import mingru
from minrnn.ops.selective import selective_scan

WIDTH = 8
MIXERS: dict[str, Callable[[], Mixer]] = {
    "gru": lambda: RecurrentNetwork(nn.GRU, WIDTH, 2),
    "lstm": lambda: RecurrentNetwork(nn.LSTM, WIDTH, 1),
    "attention": lambda: Attention(WIDTH, 2),
    "aaren": lambda: Aaren(WIDTH, 2),
    "s6": lambda: S6(WIDTH, 3),
    "s6-zoh": lambda: S6(WIDTH, 3, 2, "zoh"),
    "s4d": lambda: S4D(WIDTH, 6),
    "long convolution": lambda: LongConvolution(WIDTH, length=16),
    "mamba": lambda: Mamba(WIDTH, 2, S6(2 * WIDTH, 4)),
    "mamba-s4d": lambda: Mamba(WIDTH, 1, S4D(WIDTH, 4)),
    "h3": lambda: H3(WIDTH, S4D(WIDTH, 4)),
    "hyena": lambda: H3(WIDTH, LongConvolution(WIDTH, length=16)),
    "ungated": lambda: Ungated(WIDTH, S6(WIDTH, 2)),
}
GROWING = ("attention", "long convolution", "hyena")


@pytest.fixture(params=MIXERS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def test_mixer_is_its_equation(name: str) -> None:
    module = MIXERS[name]().double()
    x = torch.randn(2, 11, WIDTH, dtype=torch.float64, requires_grad=True)
    leaves = [x, *module.parameters()]
    y, wanted = module(x)[0], answer(module, x)
    torch.testing.assert_close(y, wanted, rtol=1e-9, atol=1e-9)
    dy = torch.randn_like(y)
    grads, wanted = (torch.autograd.grad(z, leaves, dy) for z in (y, wanted))
    for one, other in zip(grads, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-8)


def test_pieces_and_steps_are_the_whole(name: str) -> None:
    module = MIXERS[name]().double()
    x = torch.randn(3, 13, WIDTH, dtype=torch.float64)
    whole, last = module(x)
    for lengths in ([1] * 13, [5, 1, 7], [12, 1]):
        state, pieces = None, []
        for piece in x.split(lengths, dim=1):
            y, state = module(piece, state)
            pieces.append(y)
        torch.testing.assert_close(torch.cat(pieces, dim=1), whole, rtol=1e-9, atol=1e-9)
        for one, other in zip(state.flatten().values(), last.flatten().values(), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def test_only_attention_and_hyena_keep_their_past(name: str) -> None:
    module, x = MIXERS[name](), torch.randn(2, 9, WIDTH)
    sizes = [state.num_bytes for state in (module(x[:, :1])[1], module(x)[1])]
    assert (sizes[1] > sizes[0]) == (name in GROWING)
    if name not in GROWING:
        assert sizes[0] == module.init_state(2).num_bytes


def test_state_stays_float32_under_autocast(name: str) -> None:
    module, x = MIXERS[name](), torch.randn(2, 9, WIDTH)
    wanted, _ = module(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, state = module(x)
        again, _ = module(x, state)
    # inner layers have no product that autocast lowers: they keep the dtype that they are given
    inner = name in ("s6", "s6-zoh", "s4d", "long convolution")
    assert y.dtype == again.dtype == (x.dtype if inner else torch.bfloat16)
    torch.testing.assert_close(y.float(), wanted, rtol=0.05, atol=0.05)
    recurrent = {"h", "c", "a", "m"}
    for part, tensor in state.flatten().items():
        if part.rpartition(".")[2] in recurrent and name not in ("gru", "lstm"):
            assert tensor.dtype == torch.float32, part


def test_selective_scan_with_one_state_is_mingru() -> None:
    """Theorem 1 of Gu and Dao 2023: N = 1, A = -1, B = C = 1 gives a gate sigmoid(k)."""
    k, v = torch.randn(2, 2, 15, 4, dtype=torch.float64)
    h0, ones = torch.randn(2, 4, dtype=torch.float64), torch.ones(2, 15, 1, dtype=torch.float64)
    dt, A = nn.functional.softplus(k), -torch.ones(4, 1, dtype=torch.float64)
    y, h_T = selective_scan(v, dt, A, ones, ones, h0, "zoh")
    wanted, last = mingru(k, v, h0, candidate="identity")
    torch.testing.assert_close(y, wanted, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(h_T, last, rtol=1e-8, atol=1e-8)


def test_a_step_of_aaren_needs_no_shift_to_stay_finite() -> None:
    module = Aaren(WIDTH, 2)
    with torch.no_grad():
        module.query.mul_(1e4)
    x = torch.randn(1, 50, WIDTH, requires_grad=True)
    y, state = module(x)
    y.sum().backward()
    assert torch.isfinite(y).all()
    assert torch.isfinite(x.grad).all()
    assert torch.isfinite(state.tensor("c")).all()


@pytest.mark.parametrize("mixer", ["gru", "lstm", "mingru", "minlstm"])
def test_parameters_are_as_many_as_the_paper_counts(mixer: str) -> None:
    """Of the gates and candidates, without biases: 3 d (d + n) for a GRU, 2 d n for a minGRU."""
    n, d = 6, 12
    module = build_mixer(ModelConfig(width=n, expansion=2, mixer=mixer))
    count = sum(w.numel() for name, w in module.rnn.named_parameters() if "weight_" in name)
    projected = n * d if mixer.startswith("min") else 0
    counts = {"gru": 3 * d * (d + n), "lstm": 4 * d * (d + n), "mingru": 2 * d * n}
    assert count - projected == (counts | {"minlstm": 3 * d * n})[mixer]


def test_parameters_of_mamba_and_attention() -> None:
    d, N, rank = 2 * 48, 16, 3
    inner = d * (rank + 2 * N) + rank * d + d + d * N + d
    assert _size("mamba", 48) == 48 * 2 * d + (4 * d + d) + inner + d * 48
    assert _size("attention", 48) == 4 * 48 * 48 + 4 * 48
    assert _size("aaren", 48) == 3 * 48 * 48 + 3 * 48 + 48


def _size(mixer: str, width: int) -> int:
    module = build_mixer(ModelConfig(width=width, mixer=mixer))
    return sum(weight.numel() for weight in module.parameters())


@pytest.mark.parametrize("mixer", get_args(MixerName))
def test_every_mixer_makes_a_model_that_learns(mixer: str) -> None:
    config = ModelConfig(7, width=24, num_layers=1, mixer=mixer, conv_width=0, mlp_ratio=0)
    model = LanguageModel(config).eval()
    ids = torch.randint(7, (4, 12))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        logits, state = model(ids)
        # what came before, which only a mixer can know
        loss = nn.functional.cross_entropy(logits[:, 1:].flatten(0, 1), ids[:, :-1].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert state.batch_size == 4


def block_of_mambapy() -> nn.Module:
    theirs = importlib.import_module("mambapy.mamba")
    return theirs.MambaBlock(theirs.MambaConfig(d_model=16, n_layers=1, d_state=4, expand_factor=2))


def block_of_transformers() -> nn.Module:
    theirs = importlib.import_module("transformers.models.mamba.modeling_mamba")
    sizes = {"hidden_size": 16, "state_size": 4, "expand": 2, "time_step_rank": 1}
    return theirs.MambaMixer(theirs.MambaConfig(**sizes), layer_idx=0)


# transformers has left Python 3.10 behind
BLOCKS = [block_of_mambapy, block_of_transformers][: 1 + (sys.version_info >= (3, 11))]


@pytest.mark.parametrize("theirs", BLOCKS)
def test_mamba_is_that_of_others(theirs: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    block = theirs()
    ours = Mamba(16, 2, S6(32, 4, rank=1))
    inner = ("x_proj", "dt_proj", "A_log", "D")
    names = {"conv1d": "conv"} | {name: f"inner.{name}" for name in inner}
    weights = {}
    for name, weight in block.state_dict().items():
        head, dot, rest = name.partition(".")
        weights[f"{names.get(head, head)}{dot}{rest}"] = weight
    ours.load_state_dict(weights)
    x: Tensor = torch.randn(2, 20, 16)
    torch.testing.assert_close(ours(x)[0], block(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Attention(12, 4), "`num_heads` must divide `width` = 12 evenly, got 4"),
        (lambda: Aaren(12, 5), "`num_heads` must divide `width` = 12, got 5"),
        (lambda: S4D(4, 3), "`state_size` must be even, got 3"),
    ],
)
def test_sizes_that_do_not_fit_are_named(make: Callable[[], Mixer], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def built(seed: int, **fields: object) -> nn.Module:
    torch.manual_seed(seed)
    return build_mixer(ModelConfig(width=64, expansion=8, **fields)).rnn


@pytest.mark.parametrize("name", ["mingru", "minlstm"])
def test_memories_at_the_start_are_log_uniform(name: MixerName) -> None:
    drawn, spread = built(0, mixer=name), built(0, mixer=name, longest_memory=100)
    assert torch.equal(drawn.weight_ih_l0, spread.weight_ih_l0)
    gates = (spread.bias_ih_l0 - drawn.bias_ih_l0).detach().unflatten(0, (-1, 512))
    assert not gates[-1].any(), "the candidate's bias"
    if name == "mingru":
        z = gates[0].sigmoid()
    else:
        torch.testing.assert_close(gates[0], -gates[1])
        z = gates[1].sigmoid() / (gates[0].sigmoid() + gates[1].sigmoid())
    # z of an open gate is 1 / 2: its memory is 1 / z - 1 = 1 step
    memory = 1 / z - 1
    assert memory.min() >= 1 - 1e-5
    assert memory.max() <= 100 * (1 + 1e-5)
    tenths = (memory.log() / memory.new_tensor(100.0).log() * 10).long().clamp(0, 9).bincount()
    assert tenths.min() > 512 / 10 / 2
