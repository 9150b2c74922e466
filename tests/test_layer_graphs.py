"""Layers and cells are leaves of the graphs that torch.fx traces symbolically, as torch's are."""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence
from torch.testing import assert_close

from minrnn import MinGRU, MinGRUCell, MinLSTM, MinLSTMCell

KINDS = pytest.mark.parametrize("kind", [MinGRU, MinLSTM, MinGRUCell, MinLSTMCell])


@fx.wrap
def _pack(x: Tensor, lengths: Tensor) -> PackedSequence:
    return pack_padded_sequence(x, lengths, enforce_sorted=False)


@fx.wrap
def _pad(packed: PackedSequence) -> Tensor:
    return pad_packed_sequence(packed)[0]


def _input(kind: type) -> Tensor:
    return torch.randn(*([6] if kind in (MinGRU, MinLSTM) else []), 3, 4)


def _shifted(module: nn.Module, args: Any) -> Any:
    """A pre-hook: the input plus 1."""
    return args[0] + 1, *args[1:]


class Nested(nn.Module):
    """One module called twice, at some depth, first without a state and then with what came out."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.inner = nn.ModuleDict({"rnn": module})

    def forward(self, x: Tensor) -> Any:
        result = self.inner["rnn"](x)
        state = result if isinstance(self.inner["rnn"], MinGRUCell | MinLSTMCell) else result[1]
        return self.inner["rnn"](x * 2, state)


@KINDS
def test_calls_are_nodes_of_a_graph(kind: Any) -> None:
    module, x = Nested(kind(4, 5)), _input(kind)
    # must run once in a call, not in the trace too
    module.inner["rnn"].register_forward_pre_hook(_shifted)
    wanted = module(x)
    graph = fx.symbolic_trace(module)
    targets = [node.target for node in graph.graph.nodes if node.op == "call_module"]
    assert targets == ["inner.rnn"] * 2
    graph.recompile()
    for twin in (graph, copy.deepcopy(graph), pickle.loads(pickle.dumps(graph))):
        assert_close(twin(x), wanted)
    assert_close(fx.Interpreter(graph).run(x), wanted)
    assert_close(fx.symbolic_trace(nn.Sequential(graph, nn.Identity()))(x), wanted)


@KINDS
def test_weights_get_their_gradients_through_a_graph(kind: Any) -> None:
    module, x = nn.Sequential(kind(4, 5)), _input(kind)
    weights = list(module.parameters())
    grads = []
    for call in (fx.symbolic_trace(module), module):
        y = call(x)
        y = y if isinstance(y, Tensor) else y[0]
        grads.append(torch.autograd.grad(y.square().sum(), weights))
    assert_close(grads[0], grads[1])


class Packed(nn.Module):
    """Packs, runs and pads."""

    def __init__(self, rnn: nn.Module) -> None:
        super().__init__()
        self.rnn = rnn

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        return _pad(self.rnn(_pack(x, lengths), reset=None)[0])


@pytest.mark.parametrize("layer", [MinGRU, MinLSTM])
def test_packed_input_in_a_graph(layer: type) -> None:
    module = Packed(layer(4, 5, bidirectional=True))
    graph = fx.symbolic_trace(module)
    for lengths in ((3, 6), (1, 4, 2)):
        x, counts = torch.randn(6, len(lengths), 4), torch.tensor(lengths)
        assert_close(graph(x, counts), module(x, counts))


@KINDS
def test_the_class_keeps_its_name(kind: Any) -> None:
    assert kind.__module__.startswith("minrnn.layers.")
    assert pickle.loads(pickle.dumps(kind(4, 5))).__class__ is kind
