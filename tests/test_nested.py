"""Nested tensors of jagged layout: each sequence as if it were alone, and nested outputs."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from minrnn import MinGRU, MinGRUCell, MinLSTM

LAYERS = pytest.mark.parametrize("layer", [MinGRU, MinLSTM])
LENGTHS = pytest.mark.parametrize("lengths", [(3, 5, 1), (3, 0, 5), (0, 2), (2, 0), (0, 0)])


def _nested(sequences: list[Tensor]) -> Tensor:
    return torch.nested.nested_tensor(sequences, layout=torch.jagged)


def _state(result: Any) -> Tensor:
    return result[1] if isinstance(result[1], Tensor) else result[1][0]


@LAYERS
@LENGTHS
@pytest.mark.parametrize("both", [False, True])
def test_nested_equals_each_sequence_alone(layer: type, lengths: Any, both: bool) -> None:
    module = layer(4, 5, 2, bidirectional=both, proj_size=3).double()
    xs = [torch.randn(T, 4).double().requires_grad_() for T in lengths]
    resets = [torch.rand(T) < 0.4 for T in lengths]
    hx = torch.rand(4 if both else 2, len(xs), 5).double()
    x = torch.nested.as_nested_tensor(xs, layout=torch.jagged)
    result = module(x, hx, reset=_nested(resets))
    # the same T, so that a residual can be added
    assert result[0].shape[:2] == x.shape[:2]
    alone = [module(x, hx[:, n], reset=resets[n]) for n, x in enumerate(xs)]
    assert_close(list(result[0].unbind()), [run[0] for run in alone])
    assert_close(_state(result), torch.stack([_state(run) for run in alone], dim=1))
    leaves = [*xs, *module.parameters()]
    loss = result[0].values().square().sum() + _state(result).sum()
    wanted = sum(run[0].square().sum() + _state(run).sum() for run in alone)
    options: Any = {"allow_unused": True, "materialize_grads": True}
    found = torch.autograd.grad(loss, leaves, **options)
    assert_close(found, torch.autograd.grad(wanted, leaves, **options))


@LAYERS
def test_nested_with_gaps_under_autocast_and_compiled(layer: type) -> None:
    module, padded = layer(4, 4, learn_h0=True), torch.randn(3, 6, 4)
    nn.init.uniform_(module.h_0)
    starts, lengths = torch.tensor([0, 1, 2]), torch.tensor([3, 2, 1])
    gaps = torch.nested.narrow(padded, 1, starts, lengths, layout=torch.jagged)
    xs = [padded[n, n:3] for n in range(3)]
    wanted = [module(x)[0] for x in xs]
    assert_close(list(module(gaps)[0].unbind()), wanted)
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: x + module(x)[0], backend="aot_eager", fullgraph=True)
    found = compiled(_nested(xs)).unbind()
    assert_close(list(found), [x + y for x, y in zip(xs, wanted, strict=True)])
    with torch.autocast("cpu", torch.bfloat16):
        y, state = module(_nested(xs))
    assert y.dtype == torch.bfloat16
    assert _state((y, state)).dtype == torch.float32


X = _nested([torch.randn(3, 4), torch.randn(2, 4)])
RESET = "`reset` must be nested like `input`, a bool for each step"
WRONG: dict[str, tuple[Callable[[nn.Module], Any], type[Exception], str]] = {
    "transposed": (lambda m: m(X.transpose(1, 2)), RuntimeError, r"nested as \(B, T, input_size\)"),
    "axes": (
        lambda m: m(_nested([torch.randn(3, 4, 4)])),
        RuntimeError,
        r"nested as \(B, T, input_size\), each its own T, got torch.Size\(\[1, j\d+, 4, 4\]\)",
    ),
    "features": (
        lambda m: m(_nested([torch.randn(3, 6)])),
        RuntimeError,
        r"with input_size = 4, got \(3, 6\)",
    ),
    "dtype": (lambda m: m(X.double()), TypeError, "the dtype of the weights, torch.float32"),
    "state": (lambda m: m(X, torch.zeros(1, 3, 5)), RuntimeError, r"\(1, 2, 5\), got \(1, 3, 5\)"),
    "no nested reset": (lambda m: m(X, reset=torch.zeros(2, 3) > 0), ValueError, RESET),
    "other lengths": (
        lambda m: m(X, reset=_nested([torch.zeros(2) > 0, torch.zeros(3) > 0])),
        ValueError,
        RESET,
    ),
    "reset of numbers": (
        lambda m: m(X, reset=_nested([torch.zeros(3), torch.zeros(2)])),
        TypeError,
        "`reset` must have dtype torch.bool, got torch.float32",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_nested_inputs(case: str) -> None:
    call, kind, message = WRONG[case]
    for layer in (MinGRU, MinLSTM):
        with pytest.raises(kind, match=message):
            call(layer(4, 5))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_strided_layout_and_cells_are_refused() -> None:
    strided = torch.nested.nested_tensor([torch.randn(3, 4)], layout=torch.strided)
    with pytest.raises(ValueError, match=r"nested with layout=torch\.jagged, got torch\.strided"):
        MinGRU(4, 5)(strided)
    for x in (strided, X):
        with pytest.raises(ValueError, match="`input` must not be nested"):
            MinGRUCell(4, 5)(x)
