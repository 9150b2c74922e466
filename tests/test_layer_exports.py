"""Layers and cells under torch.compile, torch.export and torch.jit.trace."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.export import Dim
from torch.func import functional_call, functionalize, grad, jacrev, jvp, vjp, vmap
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence
from torch.testing import assert_close

from minrnn import MinGRU, MinGRUCell, MinLSTM, MinLSTMCell

LAYERS = pytest.mark.parametrize("layer", [MinGRU, MinLSTM])
LAYOUTS = pytest.mark.parametrize(
    ("layer", "batch_first"), [(MinGRU, False), (MinLSTM, True)], ids=["gru-time", "lstm-batch"]
)
CELLS = pytest.mark.parametrize("cell", [MinGRUCell, MinLSTMCell])


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch.compiler.reset()


@LAYOUTS
def test_compile_takes_every_length_with_one_graph_more(layer: type, batch_first: bool) -> None:
    module = layer(4, 5, 2, bidirectional=True, batch_first=batch_first)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, fullgraph=True, backend=counter)
    for T in (7, 9, 40, 3):
        x = torch.randn((3, T, 4) if batch_first else (T, 3, 4), requires_grad=True)
        hx, reset = torch.rand(4, 3, 5), torch.rand(x.shape[:2]) < 0.3
        grads = []
        for run in (compiled, module):
            result = run(x, hx, reset=reset)
            leaves = [x, *module.parameters()]
            grads.append([result[0], *torch.autograd.grad(result[0].square().sum(), leaves)])
        assert_close(grads[0], grads[1])
    # the first length, then all others; 1 and 2 have graphs of their own, as sizes of 1 do
    assert counter.frame_count == 2


@LAYERS
def test_compile_of_a_loop_over_steps(layer: type) -> None:
    module = layer(4, 5)
    counter = CompileCounterWithBackend("aot_eager")
    step = torch.compile(module, fullgraph=True, backend=counter)
    x, state = torch.randn(6, 3, 4), None
    with torch.no_grad():
        wanted = module(x)[0]
        for t in range(6):
            y, state = step(x[t : t + 1], state)
            assert_close(y[0], wanted[t])
    # without a state, then with one
    assert counter.frame_count == 2


# the default backend: torch's own compiler still calls torch.jit
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_compile_of_a_cell() -> None:
    cell = MinGRUCell(4, 5)
    x, h = torch.randn(3, 4), torch.rand(3, 5)
    assert_close(torch.compile(cell, fullgraph=True)(x, h), cell(x, h))


@LAYOUTS
def test_export_with_any_batch_and_length(layer: type, batch_first: bool) -> None:
    module = layer(4, 5, 2, bidirectional=True, batch_first=batch_first)
    B, T = Dim("B"), Dim("T")
    shapes = ({0: B, 1: T} if batch_first else {0: T, 1: B}, {1: B})
    x = torch.randn((3, 7, 4) if batch_first else (7, 3, 4))
    program = torch.export.export(module, (x, torch.rand(4, 3, 5)), dynamic_shapes=shapes)
    name = "mingru_fused" if layer is MinGRU else "minlstm_fused"
    calls = [node.target for node in program.graph.nodes]
    assert calls.count(getattr(torch.ops.minrnn, name).default) == 4
    exported = program.module()
    for B_, T_ in ((1, 1), (2, 1), (1, 30), (4, 9)):
        x = torch.randn((B_, T_, 4) if batch_first else (T_, B_, 4))
        hx = torch.rand(4, B_, 5)
        assert_close(exported(x, hx), module(x, hx))


@CELLS
def test_export_of_a_step(cell: type) -> None:
    module = cell(4, 5)
    B = Dim("B")
    inputs = (torch.randn(3, 4), torch.rand(3, 5))
    program = torch.export.export(module, inputs, dynamic_shapes=({0: B}, {0: B}))
    for B_ in (1, 2, 8):
        x, h = torch.randn(B_, 4), torch.rand(B_, 5)
        assert_close(program.module()(x, h), module(x, h))


def _transforms(module: nn.Module) -> dict[str, tuple[Callable[..., Any], bool]]:
    """Functions of x (T, B, 4) and the weights, and whether torch.func runs them eagerly."""

    def loss(x: Tensor, weights: dict[str, Tensor]) -> Tensor:
        return functional_call(module, weights, (x,))[0].square().sum()

    def alone(x: Tensor, weights: dict[str, Tensor]) -> Tensor:
        return loss(x.unsqueeze(-2), weights)

    def penalty(x: Tensor, weights: dict[str, Tensor]) -> Tensor:
        return grad(loss)(x, weights).square().sum()

    return {
        "grad": (grad(loss, argnums=(0, 1)), True),
        "per sample": (vmap(grad(alone, argnums=1), in_dims=(-2, None)), True),
        "jacrev": (jacrev(lambda x, weights: functional_call(module, weights, (x,))[0][0]), True),
        "second": (grad(penalty), True),
        "vjp": (lambda x, weights: vjp(loss, x, weights)[1](torch.ones(())), True),
        "jvp": (lambda x, weights: jvp(lambda x: loss(x, weights), (x,), (x,)), False),
    }


# forward mode loads torch's decompositions, which still call torch.jit
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize("transform", ["grad", "per sample", "jacrev", "second", "vjp", "jvp"])
@pytest.mark.parametrize("kind", [MinGRU, MinLSTM, MinGRUCell, MinLSTMCell])
def test_transforms_compile_in_one_graph(kind: Any, transform: str) -> None:
    is_layer = kind in (MinGRU, MinLSTM)
    module = kind(4, 5)
    weights = {name: x.detach() for name, x in module.named_parameters()}
    x = torch.randn(*([3] if is_layer else []), 2, 4)
    call, eager = _transforms(module)[transform]
    compiled = torch.compile(call, fullgraph=True, backend="eager")
    actual = compiled(x, weights)
    if eager:
        assert_close(actual, call(x, weights))
    else:
        # the slope along x of a function of x is that of the gradient
        slope = _transforms(module)["grad"][0](x, weights)[0]
        assert_close(actual[1], (slope * x).sum())


@LAYERS
def test_functionalize_around_and_inside_of_grad(layer: type) -> None:
    module, x = layer(4, 5, bidirectional=True), torch.randn(6, 3, 4)

    def loss(x: Tensor) -> Tensor:
        return module(x)[0].square().sum()

    assert_close(functionalize(lambda x: module(x)[0])(x), module(x)[0])
    wanted = grad(loss)(x)
    assert_close(functionalize(grad(loss))(x), wanted)
    assert_close(grad(functionalize(loss))(x), wanted)


# torch.jit is deprecated, and says that sizes, which we check, are constants of a trace
TRACES = (
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
)


def _traced(test: Callable[..., None]) -> Callable[..., None]:
    for mark in TRACES:
        test = mark(test)
    return test


@_traced
@LAYERS
def test_a_trace_runs_at_every_size(layer: type) -> None:
    """torch.jit.trace works, for any T and B; torch.jit.script does not take our code."""
    module = layer(4, 5, 2, bidirectional=True)
    traced = torch.jit.trace(module, (torch.randn(7, 3, 4), torch.rand(4, 3, 5)))
    for T, B in ((7, 3), (1, 1), (12, 2)):
        x, hx = torch.randn(T, B, 4), torch.rand(4, B, 5)
        assert_close(traced(x, hx), module(x, hx))


@_traced
@pytest.mark.parametrize("kind", [MinLSTM, MinLSTMCell])
def test_a_trace_takes_the_pair_of_states(kind: type) -> None:
    module = kind(4, 5)
    sizes = (1,) if kind is MinLSTM else ()
    x, state = torch.randn(*sizes, 3, 4), torch.rand(*sizes, 3, 5)
    traced = torch.jit.trace(module, (x, (state, state.clone())))
    for B in (3, 1, 8):
        x, state = torch.randn(*sizes, B, 4), torch.rand(*sizes, B, 5)
        pair = (state, torch.zeros_like(state)) if B == 8 else (state, state.clone())
        assert_close(traced(x, pair), module(x, pair))


class Packing(nn.Module):
    """Rows of these lengths are packed, run with their resets, and padded again."""

    def __init__(self, rnn: nn.Module, enforce_sorted: bool) -> None:
        super().__init__()
        self.rnn, self.enforce_sorted = rnn, enforce_sorted

    def pack(self, x: Tensor, lengths: Tensor) -> PackedSequence:
        return pack_padded_sequence(x, lengths, enforce_sorted=self.enforce_sorted)

    def forward(self, x: Tensor, lengths: Tensor, *hx: Tensor) -> tuple[Tensor, Tensor]:
        # PackedSequence has no comparison of its own
        reset = self.pack(x[..., 0], lengths)
        reset = PackedSequence(reset.data > 1, *reset[1:])
        y, state = self.rnn(self.pack(x, lengths), *hx, reset=reset)
        return pad_packed_sequence(y)[0], state if isinstance(state, Tensor) else state[0]


@_traced
@LAYERS
@pytest.mark.parametrize("enforce_sorted", [True, False])
@pytest.mark.parametrize("first", ["zeros", "hx", "learned"])
def test_a_trace_that_packs_runs_at_every_batch(
    layer: type, enforce_sorted: bool, first: str, tmp_path: Path
) -> None:
    learned = first == "learned"
    rnn = layer(4, 5, 2, bidirectional=True, learn_h0=learned)
    if learned:
        nn.init.normal_(rnn.h_0)
    module = Packing(rnn, enforce_sorted)

    def inputs(*lengths: int) -> tuple[Tensor, ...]:
        B, order = len(lengths), sorted(lengths, reverse=True) if enforce_sorted else lengths
        hx = [torch.rand(4, B, 5)] if first == "hx" else []
        return torch.randn(max(lengths), B, 4), torch.tensor(order), *hx

    torch.jit.save(torch.jit.trace(module, inputs(7, 5, 2, 5)), tmp_path / "trace.pt")
    traced = torch.jit.load(tmp_path / "trace.pt")
    for lengths in ((7, 5, 2, 5), (3, 9), (1, 6, 4, 3, 5), (1,), (2, 2, 2)):
        given = inputs(*lengths)
        assert_close(traced(*given), module(*given))
    x, lengths, *hx = inputs(4, 6)
    x.requires_grad_()
    grads = [torch.autograd.grad(m(x, lengths, *hx)[0].sum(), x)[0] for m in (traced, module)]
    assert_close(*grads)
