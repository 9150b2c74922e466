"""Layers and cells under torch.compile, torch.export and torch.jit.trace."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.export import Dim
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


# torch.jit is deprecated, and says that sizes, which we check, are constants of a trace
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@LAYERS
def test_a_trace_runs_at_every_size(layer: type) -> None:
    """torch.jit.trace works, for any T and B; torch.jit.script does not take our code."""
    module = layer(4, 5, 2, bidirectional=True)
    traced = torch.jit.trace(module, (torch.randn(7, 3, 4), torch.rand(4, 3, 5)))
    for T, B in ((7, 3), (1, 1), (12, 2)):
        x, hx = torch.randn(T, B, 4), torch.rand(4, B, 5)
        assert_close(traced(x, hx), module(x, hx))
