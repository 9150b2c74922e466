"""Tensors made inside lie where the inputs do, whatever the default device and dtype are."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_sequence

import minrnn
from minrnn import gradients
from minrnn.acting import StreamActor, WindowActor
from minrnn.decision import DecisionConfig, DecisionModel
from minrnn.losses import next_symbol
from minrnn.ops import reference
from minrnn.packing import pack_model
from minrnn.sampling import Uniforms, draw

V = 7
MIXERS = ("mingru", "minlstm", "gru", "none", "attention", "aaren", "mamba", "s4d", "hyena")


@pytest.fixture(params=["meta", "float64"])
def other_default(request: pytest.FixtureRequest) -> Iterator[Callable[[], None]]:
    """Sets another default than the CPU or float32, until the test ends."""

    def set_default() -> None:
        if request.param == "meta":
            torch.set_default_device("meta")
        else:
            torch.set_default_dtype(torch.float64)

    yield set_default
    torch.set_default_device(None)
    torch.set_default_dtype(torch.float32)


def _tensors(result: Any) -> list[Tensor]:
    """All tensors of a result, in order."""
    if isinstance(result, Tensor):
        return [result]
    if isinstance(result, minrnn.State):
        return list(result.flatten().values())
    parts = result if isinstance(result, tuple | list) else ()
    return [x for part in parts for x in _tensors(part)]


def _check(run: Callable[[], Any], set_default: Callable[[], None]) -> None:
    wanted = run()
    set_default()
    actual = run()
    for x, want in zip(_tensors(actual), _tensors(wanted), strict=True):
        assert (x.device, x.dtype) == (want.device, want.dtype)
        # not assert_close, which makes tensors of its own
        assert bool(((x == want) | ((x - want).abs() <= 1e-6)).all())


@pytest.mark.parametrize("layer", [minrnn.MinGRU, minrnn.MinLSTM])
@pytest.mark.parametrize("enforce_sorted", [True, False])
def test_packed_input(layer: type, enforce_sorted: bool, other_default: Any) -> None:
    module = layer(4, 5, 2, bidirectional=True)
    rows = [torch.randn(T, 4) for T in ((6, 3, 1) if enforce_sorted else (3, 6, 1))]
    packed = pack_sequence(rows, enforce_sorted)
    reset = PackedSequence(packed.data[:, 0] > 1, *packed[1:])
    _check(lambda: tuple(module(packed, reset=reset)), other_default)


def test_operators_and_reference(other_default: Any) -> None:
    k, v, h0 = torch.randn(1, 5, 3), torch.randn(1, 5, 3), torch.rand(2, 3)
    cu_seqlens, reset = torch.tensor([0, 2, 5]), torch.tensor([[False, True, False, False, True]])
    rows = {"reset": reset, "cu_seqlens": cu_seqlens}

    def run() -> Any:
        results = [op(k, v, h0, **rows) for op in (minrnn.mingru, reference.mingru, minrnn.scan)]
        call = torch.func.vmap(lambda k: minrnn.mingru(k, v, h0, **rows))
        return results, call(torch.stack([k, v]))

    _check(run, other_default)


@pytest.mark.parametrize("mixer", MIXERS)
def test_models_and_their_gradients(mixer: Any, other_default: Any) -> None:
    config = minrnn.ModelConfig(V, width=8, num_layers=1, mixer=mixer, num_heads=2, dropout=0.0)
    model, ids = minrnn.LanguageModel(config), torch.randint(V, (3, 13))
    batch = minrnn.Batch(ids[:, :-1], ids[:, 1:], ids[:, 1:] > 1)

    def run() -> Any:
        y, state = model(ids[:, :4])
        after = model(ids[:2, 4:], state.select([2, 0]))
        loss, _ = gradients.backward(model, next_symbol, batch)
        chunked = gradients.backward(model, next_symbol, batch, chunk=5) if mixer == "gru" else ()
        return y, after, loss, chunked, model.init_state(2)

    _check(run, other_default)


def test_drawing_and_streaming(other_default: Any, tmp_path: Path) -> None:
    config = minrnn.ModelConfig(V, width=16, num_layers=1)
    minrnn.save(tmp_path, minrnn.LanguageModel(config), minrnn.Characters("abcdefg"))
    logits, seeded = torch.randn(3, V), minrnn.Sampling(1.0, 3, seed=1)
    samplings = [minrnn.Sampling(0.0), seeded, minrnn.Sampling(2.0, 0, 0.9)]

    def run() -> Any:
        model, tokenizer = minrnn.load(tmp_path)
        text = list(minrnn.generate(model, tokenizer, "abc", length=5, sampling=seeded))
        stream = minrnn.Stream(pack_model(model), seeded)
        stream.prime([1, 2])
        ids = [stream.step() for _ in range(3)]
        drawn = draw(logits, samplings, [Uniforms(n) for n in range(3)])
        assert runs.setdefault("text", text) == text
        assert runs.setdefault("ids", ids) == ids
        return drawn, stream.state

    runs: dict[str, list[Any]] = {}
    _check(run, other_default)


def test_acting(other_default: Any) -> None:
    blocks = minrnn.ModelConfig(width=8, num_layers=1, conv_width=0)
    model = DecisionModel(DecisionConfig(3, 2, 10, blocks=blocks)).eval()
    steps = torch.rand(2, 4, 2 + 1 + 3 + 1)

    def run() -> Any:
        actions = []
        for actor in (WindowActor(model, 3), StreamActor(model)):
            actions += [actor.act(steps[0]), actor.act(steps[1])]
            actor.select([2, 0])
            actions.append(actor.act(steps[0, :2]))
        return actions

    _check(run, other_default)
