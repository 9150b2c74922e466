"""What torch asks of an operator: all derivatives, traces, any strides; and the fused ones."""

from collections.abc import Sequence
from itertools import product

import pytest
import torch
from cases import (
    CASES,
    FUSED,
    GATES,
    SMALL_CASES,
    TOLERANCES,
    TRACED_CASES,
    Case,
    assert_close,
    expected,
    make_inputs,
    operator,
    run,
)
from torch import Tensor, float32, float64
from torch.autograd import gradcheck, gradgradcheck
from torch.library import opcheck

from minrnn import ops
from minrnn.info import kernels

OPS = torch.ops.minrnn
NAMES = (*GATES, *FUSED)


def _assert_same(first: Sequence[Tensor], second: Sequence[Tensor]) -> None:
    """Bit for bit by the compiled kernels; how pure torch rounds depends on strides."""
    limit = 0.0 if kernels()["CPU"]["mingru_fused"] == "compiled" else TOLERANCES[float32]
    for x, y in zip(first, second, strict=True):
        torch.testing.assert_close(x, y, rtol=limit, atol=limit)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("name", FUSED)
def test_fused_operator_matches_reference(backend, name, case):
    inputs = make_inputs(name, case)
    assert_close(run(operator(name), inputs), expected(name, inputs))


@pytest.mark.parametrize("name", FUSED)
def test_fused_function_is_the_operator_over_cut_gates(backend, name):
    plain = FUSED[name]
    inputs = make_inputs(name, Case(float32, 2, 40, 5, "as the layers call it", reset=True))
    gates = torch.cat(list(inputs.gates.values()), dim=2)
    options = ["g"] if plain == "mingru" else ["g", True]
    layout = {"time_first": False, "cu_seqlens": None, "reverse": False}
    fused = getattr(ops, name)(gates, inputs.h0, *options, reset=inputs.options["reset"], **layout)
    whole = getattr(ops, plain)(*inputs.gates.values(), inputs.h0, reset=inputs.options["reset"])
    _assert_same(fused, whole)


LAYOUTS = {
    "slice": lambda x: x.repeat(1, 1, 3).chunk(3, dim=2)[1],
    "time_first": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "every_other_step": lambda x: x.repeat_interleave(2, dim=1)[:, ::2],
    "channels_apart": lambda x: torch.stack([x, x], dim=3)[..., 0],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("D", [3, 64])
@pytest.mark.parametrize("name", FUSED)
def test_fused_gates_may_have_any_strides(backend, name, D, layout):
    num = len(GATES[FUSED[name]])
    gates = torch.randn(3, 200, num * D)
    options = ("g", False) if num == 2 else ("g", True, False)
    found = []
    for x in (gates, LAYOUTS[layout](gates)):
        leaf = x.detach().requires_grad_()
        h, h_T = getattr(OPS, name)(leaf, None, *options, None, None, False)
        loss = (h * torch.linspace(-1, 1, h.numel()).view_as(h)).sum() + h_T.sum()
        found.append([h, h_T, *torch.autograd.grad(loss, leaf)])
    _assert_same(*found)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("name", FUSED)
def test_time_first_is_the_same_transposed(backend, name, reverse):
    options = ("g",) if name == "mingru_fused" else ("g", True)
    gates = torch.randn(3, 50, len(GATES[FUSED[name]]) * 4)
    h0, reset = torch.randn(3, 4), torch.rand(3, 50) < 0.1
    found = []
    for time_first in (False, True):
        x, starts = (t.transpose(0, 1).contiguous() if time_first else t for t in (gates, reset))
        leaves = [x.requires_grad_(), h0.clone().requires_grad_()]
        h, h_T = getattr(OPS, name)(*leaves, *options, time_first, starts, None, reverse)
        assert h.is_contiguous()
        grad, dh0 = torch.autograd.grad(h.square().sum() + h_T.sum(), leaves)
        h, grad = (t.transpose(0, 1) if time_first else t for t in (h, grad))
        found.append([h, h_T, grad, dh0])
    _assert_same(*found)


# trap 17
@pytest.mark.parametrize("case", SMALL_CASES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_first_and_second_derivatives(backend, name, case):
    inputs = make_inputs(name, case)
    num_gates = len(inputs.gates)

    def op(*floating):
        h0 = floating[num_gates] if case.h0 else None
        return operator(name)(*floating[:num_gates], h0, **inputs.options)

    given = [*inputs.gates.values(), *([inputs.h0] if case.h0 else [])]
    leaves = [x.detach().requires_grad_() for x in given]
    assert gradcheck(op, leaves)
    assert gradgradcheck(op, leaves)


# trap 17
def test_third_derivative(backend):
    k, v = torch.randn(2, 1, 3, 1, dtype=float64).requires_grad_().unbind()

    def slope(k, v):
        h, h_T = backend.ops.mingru(k, v)
        return torch.autograd.grad(h.square().sum() + h_T.sum(), (k, v), create_graph=True)

    assert gradgradcheck(slope, (k, v))


# fused gates are always dense here
@pytest.mark.parametrize(
    ("name", "case"),
    [*product(GATES, TRACED_CASES), *product(FUSED, TRACED_CASES[-1:])],
    ids=str,
)
def test_operators_keep_the_rules_of_torch_library(name, case):
    inputs = make_inputs(name, case)
    gates = [x.detach().requires_grad_() for x in inputs.gates.values()]
    if name in FUSED:
        gates = [torch.cat(gates, dim=2).detach().requires_grad_()]
    states = (inputs.h0.to(case.dtype), inputs.dh, inputs.dh_T)
    h0, dh, dh_T = (x.detach().requires_grad_() for x in states)
    options = {"reset": None, "cu_seqlens": None} | inputs.options
    if name in FUSED:
        options["time_first"] = False
    order = ("candidate", "normalized", "time_first", "reset", "cu_seqlens", "reverse")
    options = [options[key] for key in order if key in options]
    opcheck(getattr(OPS, name), (*gates, h0, *options))
    saved = (*(gates[:1] if name == "scan" else gates), h0, torch.randn_like(dh).requires_grad_())
    opcheck(getattr(OPS, f"{name}_backward"), (dh, dh_T, *saved, *options))


# torch's own compiler still calls torch.jit
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize("case", ["time_first", "packed"])
def test_compile_takes_the_whole_graph(backend, case):
    packed = case == "packed"
    options = {"B": 1, "cu_seqlens": (0, 2, 5)} if packed else {"layout": case, "reset": True}
    sizes = {"B": 2, "T": 5, "D": 3, "reason": "traced"}
    inputs = make_inputs("mingru", Case(float32, **sizes | options))
    compiled = torch.compile(backend.ops.mingru, fullgraph=True)
    actual = run(lambda *args, **options: compiled(*args, **options), inputs)
    assert_close(actual, expected("mingru", inputs))


# torch's own compiler still calls torch.jit
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize("name", FUSED)
def test_compile_takes_fused_gates(backend, name):
    options = ("g",) if name == "mingru_fused" else ("g", False)
    reset = torch.rand(5, 2) < 0.3
    x = torch.randn(5, 2, 6 * 3)[:, :, 6 : 6 + 6]
    found = []
    for op in (
        getattr(backend.ops, name),
        torch.compile(getattr(backend.ops, name), fullgraph=True),
    ):
        leaf = x.detach().requires_grad_()
        h, h_T = op(
            leaf, None, *options, time_first=True, reset=reset, cu_seqlens=None, reverse=False
        )
        found.append([h, h_T, *torch.autograd.grad(h.square().sum() + h_T.sum(), leaf)])
    for actual, wanted in zip(*found, strict=True):
        assert torch.equal(actual, wanted)


def test_export_keeps_the_operator(backend):
    class Model(torch.nn.Module):
        def forward(self, x: Tensor, h0: Tensor) -> tuple[Tensor, Tensor]:
            return backend.ops.minlstm(*x.chunk(3, dim=2), h0)

    x, h0 = torch.randn(2, 5, 9), torch.randn(2, 3)
    program = torch.export.export(Model(), (x, h0))
    assert torch.ops.minrnn.minlstm.default in [node.target for node in program.graph.nodes]
    for actual, wanted in zip(program.module()(x, h0), Model()(x, h0), strict=True):
        assert torch.equal(actual, wanted)


@pytest.mark.parametrize("bounded", [False, True], ids=["batch", "cu_seqlens"])
@pytest.mark.parametrize("time_first", [False, True])
def test_vmap_is_a_loop_over_calls(time_first: bool, bounded: bool) -> None:
    V, B, T, D = 3, 1 if bounded else 2, 7, 4
    sizes = (T, B) if time_first else (B, T)
    gates = torch.randn(V, *sizes, 2 * D, dtype=torch.float64)
    h0 = torch.randn(V, 3 if bounded else B, D, dtype=torch.float64)
    reset = torch.rand(V, *sizes) < 0.2
    cu_seqlens = torch.tensor([0, 2, 2, T]) if bounded else None

    def run(gates: Tensor, h0: Tensor, reset: Tensor) -> tuple[Tensor, Tensor]:
        layout = {"time_first": time_first, "cu_seqlens": cu_seqlens, "reverse": False}
        return ops.mingru_fused(gates, h0, "g", reset=reset, **layout)

    def loss(gates: Tensor, h0: Tensor, reset: Tensor) -> Tensor:
        h, h_T = run(gates, h0, reset)
        return h.square().sum() + h_T.pow(3).sum()

    for function in (run, torch.func.grad(loss, argnums=(0, 1))):
        together = torch.func.vmap(function)(gates, h0, reset)
        for n in range(V):
            wanted = function(gates[n], h0[n], reset[n])
            torch.testing.assert_close(tuple(x[n] for x in together), wanted)
