"""The contract of every stateful object: whole = chunks = steps, and rows do not mix."""

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

import minrnn
from minrnn.blocks import Block, CausalConv
from minrnn.layers import MinGRU, MinLSTM
from minrnn.mixers import MinimalRNN
from minrnn.models import LanguageModel, ModelConfig
from minrnn.state import State

WIDTH, VOCAB, B, T = 6, 11, 3, 13


def _block(layer: type, **sizes: int) -> Block:
    mixer = MinimalRNN(layer, WIDTH, expansion=2)
    return Block(mixer, WIDTH, dropout=0.1, **({"conv_width": 4, "mlp_ratio": 2} | sizes))


def _model(**fields: object) -> LanguageModel:
    return LanguageModel(ModelConfig(vocab_size=VOCAB, width=WIDTH, num_layers=2, **fields))


STATEFUL: dict[str, Callable[[], nn.Module]] = {
    "MinGRU": lambda: MinGRU(WIDTH, 5, batch_first=True),
    "MinGRU-projected-tanh": lambda: MinGRU(
        WIDTH, 9, batch_first=True, proj_size=4, candidate="tanh", bias=False
    ),
    "MinLSTM": lambda: MinLSTM(WIDTH, 5, batch_first=True, forget_bias=1.0),
    "MinLSTM-plain": lambda: MinLSTM(WIDTH, 5, batch_first=True, normalized=False),
    "CausalConv": lambda: CausalConv(WIDTH, 4),
    "CausalConv-1": lambda: CausalConv(WIDTH, 1),
    "MinimalRNN": lambda: MinimalRNN(MinLSTM, WIDTH, expansion=3),
    "Block": lambda: _block(MinGRU),
    "Block-bare": lambda: _block(MinLSTM, conv_width=0, mlp_ratio=0),
    "LanguageModel-mingru": lambda: _model(),
    "LanguageModel-minlstm": lambda: _model(mixer="minlstm", conv_width=2),
    "LanguageModel-attention": lambda: _model(mixer="attention", num_heads=3),
    "LanguageModel-mamba": lambda: _model(mixer="mamba", state_size=4),
    "LanguageModel-h3": lambda: _model(mixer="h3", state_size=4),
    "LanguageModel-hyena": lambda: _model(mixer="hyena"),
    "LanguageModel-aaren": lambda: _model(mixer="aaren"),
    "LanguageModel-lstm": lambda: _model(mixer="lstm"),
}


@pytest.fixture(params=STATEFUL)
def module(request: pytest.FixtureRequest) -> nn.Module:
    """One of every kind, with dropout that evaluation mode switches off."""
    return STATEFUL[request.param]().eval()


def _inputs(module: nn.Module) -> Tensor:
    if isinstance(module, LanguageModel):
        return torch.randint(VOCAB, (B, T))
    return torch.randn(B, T, WIDTH)


def _tensors(state: object) -> list[Tensor]:
    if isinstance(state, State):
        return list(state.flatten().values())
    return list(state) if isinstance(state, tuple) else [state]


@pytest.mark.parametrize(
    "bounds", [range(T + 1), (0, 1, 5, T), (0, 3, 4, T), (0, T - 1, T)], ids=str
)
def test_chunks_equal_the_whole_sequence(module: nn.Module, bounds: tuple[int, ...]) -> None:
    x = _inputs(module)
    whole, last = module(x, None)
    pieces, state = [], None
    for start, stop in pairwise(bounds):
        y, state = module(x[:, start:stop], state)
        pieces.append(y)
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(_tensors(state), _tensors(last), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_gradients_cross_chunk_borders(module: nn.Module) -> None:
    x = _inputs(module)
    weights = list(module.parameters())
    whole, _ = module(x, None)
    expected = torch.autograd.grad(whole.square().sum(), weights)
    first, state = module(x[:, :5], None)
    second, _ = module(x[:, 5:], state)
    loss = first.square().sum() + second.square().sum()
    for ours, theirs in zip(torch.autograd.grad(loss, weights), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_rows_do_not_mix(module: nn.Module) -> None:
    x = _inputs(module)
    y, _ = module(x, None)
    for row in range(B):
        alone, _ = module(x[row : row + 1], None)
        torch.testing.assert_close(alone[0], y[row], rtol=1e-5, atol=1e-5)


def test_the_future_is_not_seen(module: nn.Module) -> None:
    x = _inputs(module)
    changed = x.clone()
    changed[:, 8:] = _inputs(module)[:, 8:]
    assert torch.equal(module(changed[:, :8], None)[0], module(x[:, :8], None)[0])
    after, before = module(changed, None)[0], module(x, None)[0]
    torch.testing.assert_close(after[:, :8], before[:, :8], rtol=1e-6, atol=1e-6)
    assert not torch.allclose(after[:, 8:], before[:, 8:])


@pytest.mark.parametrize(
    "name", ["MinimalRNN", "Block", "Block-bare", *(n for n in STATEFUL if n[0] == "L")]
)
def test_init_state_stands_for_none(name: str) -> None:
    module = STATEFUL[name]().eval()
    x = _inputs(module)
    y, state = module(x, module.init_state(B))
    assert torch.equal(y, module(x, None)[0])
    first = module.init_state(B).flatten()
    assert set(state.flatten()) == set(first)
    if not name.endswith(("attention", "hyena")):
        shapes = {name: part.shape for name, part in first.items()}
        assert {name: part.shape for name, part in state.flatten().items()} == shapes


def test_state_size_does_not_grow() -> None:
    model = _model().eval()
    _, state = model(torch.randint(VOCAB, (1, 1)))
    size = state.num_bytes
    _, state = model(torch.randint(VOCAB, (1, 1000)), state)
    assert state.num_bytes == size == model.init_state(1).num_bytes
    # nothing larger is kept alive behind a view
    assert sum(x.untyped_storage().nbytes() for x in state.flatten().values()) == size


def test_streams_join_leave_and_fork() -> None:
    model = _model().eval()
    x = torch.randint(VOCAB, (B, 9))
    _, state = model(x)
    joined = State.concatenate([state.select([2]), state.select([0]), state.select([0])])
    tail = torch.randint(VOCAB, (1, 4)).expand(3, 4)
    expected = [model(tail[:1], model(x[row : row + 1])[1])[0] for row in (2, 0, 0)]
    torch.testing.assert_close(model(tail, joined)[0], torch.cat(expected), rtol=1e-5, atol=1e-5)


def test_state_is_saved_and_loaded_exactly(tmp_path) -> None:
    model = _model().eval()
    _, state = model(torch.randint(VOCAB, (B, 9)))
    state.save(tmp_path / "stream.safetensors")
    loaded = minrnn.State.load(tmp_path / "stream.safetensors")
    assert repr(loaded) == repr(state)
    for name, x in state.flatten().items():
        assert torch.equal(loaded.flatten()[name], x)
    assert [path.name for path in tmp_path.iterdir()] == ["stream.safetensors"]


def test_bad_state_files_are_named(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match=r"`path` must name a state file, got '.*none'"):
        State.load(tmp_path / "none")
    path = tmp_path / "stream"
    State({"h": torch.zeros(2, 3)}).save(path)
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(ValueError, match="`path` holds a damaged state file"):
        State.load(path)
    minrnn.checkpoint.write_tensors(path, {"h": torch.zeros(1)}, {})
    with pytest.raises(ValueError, match=r"`path` must hold a minrnn\.State/1 file"):
        State.load(path)


def test_wrong_states_are_named() -> None:
    with pytest.raises(ValueError, match=r"`parts` needs non-empty names without a dot, got 'a.b'"):
        State({"a.b": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"`parts` must have one batch size B, got \[1, 2\]"):
        State({"a": torch.zeros(1), "b": torch.zeros(2)})
    with pytest.raises(ValueError, match=r"`parts` must have one batch size B, got \[\]"):
        State({})
    with pytest.raises(ValueError, match="`flat` names a tensor and parts of it"):
        State.unflatten({"a": torch.zeros(1), "a.b": torch.zeros(1)})
    with pytest.raises(ValueError, match="`states` must hold at least one State, got none"):
        State.concatenate([])
    with pytest.raises(
        ValueError, match=r"number 1 has {'a': .4,.} where the first has {'a': .3,.}"
    ):
        State.concatenate([State({"a": torch.zeros(1, 3)}), State({"a": torch.zeros(1, 4)})])


def test_all_streams_may_leave() -> None:
    state = State({"h": torch.zeros(3, 2)})
    assert state.select([]).batch_size == 0
    assert state == state
    assert state != state.select([0, 1, 2])


def test_state_is_immutable() -> None:
    state = State({"h": torch.zeros(1, 2)})
    with pytest.raises(TypeError, match="does not support item assignment"):
        state["h"] = torch.ones(1, 2)
