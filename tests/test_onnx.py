"""Layers and cells as ONNX models, run by onnxruntime: values of torch at any B and T."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.testing import assert_close

from minrnn import MinGRU, MinGRUCell, MinLSTM, MinLSTMCell, mingru, minlstm, scan
from minrnn.onnx import translations
from tests.training import python


def _flat(result: Any) -> list[Tensor]:
    """The tensors of a result, in order."""
    return [result] if isinstance(result, Tensor) else [x for part in result for x in _flat(part)]


def _onnx(module: nn.Module, inputs: tuple[Tensor, ...], shapes: Any, path: Path) -> Any:
    """The module in onnxruntime, as a function of tensors."""
    program = torch.onnx.export(
        module.eval(),
        inputs,
        dynamic_shapes=shapes,
        custom_translation_table=translations(),
        verbose=False,
    )
    assert program is not None
    program.save(path / "model.onnx")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(path / "model.onnx", options)

    def run(*tensors: Tensor) -> list[Tensor]:
        names = [value.name for value in session.get_inputs()]
        feed = {name: x.numpy() for name, x in zip(names, tensors, strict=True)}
        return [torch.from_numpy(np.asarray(y)) for y in session.run(None, feed)]

    return run


def _check(run: Any, module: nn.Module, *inputs: Tensor) -> None:
    with torch.no_grad():
        wanted = _flat(module(*inputs))
    tolerance = {torch.float64: 1e-12, torch.float16: 2e-3}.get(wanted[0].dtype, 1e-5)
    for actual, want in zip(run(*inputs), wanted, strict=True):
        assert_close(actual, want, rtol=tolerance, atol=tolerance)


class WithReset(nn.Module):
    """A layer with its `reset` as a second input."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, reset: Tensor) -> Any:
        return self.layer(x, reset=reset)


@pytest.mark.parametrize(
    ("layer", "batch_first"), [(MinGRU, False), (MinLSTM, True)], ids=["gru-time", "lstm-batch"]
)
def test_any_batch_and_length(layer: type, batch_first: bool, tmp_path: Path) -> None:
    module = layer(4, 5, 2, bidirectional=True, batch_first=batch_first, proj_size=3)
    B, T = Dim("B"), Dim("T")
    shapes = ({0: B, 1: T} if batch_first else {0: T, 1: B}, {1: B})
    x = torch.randn((3, 7, 4) if batch_first else (7, 3, 4))
    run = _onnx(module, (x, torch.rand(4, 3, 5)), shapes, tmp_path)
    for B_, T_ in ((1, 1), (2, 5), (1, 64), (4, 9)):
        x = torch.randn((B_, T_, 4) if batch_first else (T_, B_, 4))
        _check(run, module, x, torch.rand(4, B_, 5))


EMPTY = """
import sys, numpy, onnxruntime
session = onnxruntime.InferenceSession(sys.argv[1])
h_0 = numpy.ones((2, 3, 5), dtype="f")
for B, T in ((3, 0), (0, 2), (0, 0), (3, 2)):
    x = numpy.zeros((B, T, 4) if sys.argv[2] == "True" else (T, B, 4), dtype="f")
    y, h_n = session.run(None, dict(zip(("x", "h_0"), (x, h_0[:, :B]))))[:2]
    assert y.shape == (*x.shape[:2], 10), y.shape
    assert h_n.shape == (2, B, 5), h_n.shape
    assert (h_n == 1).all() == (not B * T), h_n
print("done")
"""


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("layer", [MinGRU, MinLSTM])
def test_no_steps_and_no_rows(layer: type, batch_first: bool, tmp_path: Path) -> None:
    """In a process of its own: what onnxruntime divides by zero, it does not report."""
    module, B, T = layer(4, 5, bidirectional=True, batch_first=batch_first), Dim("B"), Dim("T")
    torch.onnx.export(
        module.eval(),
        (torch.randn(3, 7, 4), torch.rand(2, 3 if batch_first else 7, 5)),
        tmp_path / "model.onnx",
        input_names=["x", "h_0"],
        dynamic_shapes=({0: B, 1: T} if batch_first else {0: T, 1: B}, {1: B}),
        custom_translation_table=translations(),
        verbose=False,
    )
    onnx.checker.check_model(tmp_path / "model.onnx", full_check=True)
    assert python(EMPTY, tmp_path / "model.onnx", batch_first).stdout == "done\n"


@pytest.mark.parametrize("module", [MinGRU(4, 5), MinLSTMCell(4, 5)], ids=["layer", "cell"])
def test_the_export_finds_the_translations_by_itself(module: nn.Module, tmp_path: Path) -> None:
    x = torch.randn(*([7] if isinstance(module, MinGRU) else []), 3, 4)
    program = torch.onnx.export(module.eval(), (x,), verbose=False)
    assert program is not None
    # of sizes that are known and not 0, no branch is left
    assert [node.op_type for node in program.model.graph].count("If") == 0
    program.save(tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    actual = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert_close(torch.from_numpy(actual[0]), _flat(module(x))[0].detach(), rtol=1e-5, atol=1e-6)


UNTRANSLATED = """
import torch, minrnn
x = torch.randn(7, 3, 4)
for module, x in ((minrnn.MinLSTM(4, 5), x), (minrnn.MinGRUCell(4, 5), x[0])):
    for model, dynamo in ((module, True), (torch.export.export(module, (x,)), True), (module, False)):
        try:
            torch.onnx.export(model, (x,), "model.onnx", dynamo=dynamo, verbose=False)
        except Exception as error:
            print("does not know minrnn's operators: `import minrnn.onnx` and" in str(error))
"""


def test_an_export_that_lacks_the_translations_names_them(tmp_path: Path) -> None:
    """The new exporter, of a module and of a program, and that of before: no file, and what to do."""
    assert python(UNTRANSLATED, cwd=tmp_path).stdout == "True\n" * 6
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("cell", [MinGRUCell, MinLSTMCell])
def test_a_step_with_its_state(cell: type, tmp_path: Path) -> None:
    module, B = cell(4, 5, candidate="tanh"), Dim("B")
    inputs = (torch.randn(3, 4), torch.rand(3, 5))
    run = _onnx(module, inputs, ({0: B}, {0: B}), tmp_path)
    h = torch.rand(2, 5)
    for _ in range(3):
        x = torch.randn(2, 4)
        _check(run, module, x, h)
        h = run(x, h)[-1]


@pytest.mark.parametrize(
    ("layer", "options"),
    [
        (MinGRU, {"candidate": "identity", "dtype": torch.float64}),
        (MinLSTM, {"normalized": False, "dtype": torch.float64, "batch_first": True}),
        (MinLSTM, {"dtype": torch.float64}),
        (MinLSTM, {"dtype": torch.float16}),
    ],
    ids=["identity", "unnormalized", "float64", "float16"],
)
def test_resets_and_dtypes(layer: type, options: dict[str, Any], tmp_path: Path) -> None:
    module, T = WithReset(layer(4, 5, bidirectional=True, **options)), Dim("T")
    dtype, axis = options["dtype"], 1 if "batch_first" in options else 0
    x, reset = torch.randn(7, 7, 4, dtype=dtype), torch.rand(7, 7) < 0.3
    run = _onnx(module, (x, reset), ({axis: T}, {axis: T}), tmp_path)
    _check(run, module, x, reset)
    # trap 8: gates far out; and nothing passes a reset, not even NaN
    # but not in float16, whose pre-activations would be rounded to quarters
    x = torch.cat([x, x], dim=axis) * (1 if dtype == torch.float16 else 300)
    reset = torch.cat([reset, reset], dim=axis)
    x.select(axis, 2)[:] = torch.nan
    for t in (2, 3):
        reset.select(axis, t)[:] = True
    y = module(x, reset)[0]
    assert y.select(axis, 3).isfinite().all()
    _check_with_nan(run, module, x, reset)


def _check_with_nan(run: Any, module: nn.Module, *inputs: Tensor) -> None:
    actual, wanted = run(*inputs)[0], module(*inputs)[0].detach()
    tolerance = 2e-3 if wanted.dtype == torch.float16 else 1e-10
    assert_close(actual, wanted, rtol=tolerance, atol=tolerance, equal_nan=True)


class Functions(nn.Module):
    """The three public functions, one after the other."""

    def forward(self, x: Tensor, h0: Tensor) -> tuple[Tensor, ...]:
        k, v = x.chunk(2, dim=2)
        h, _ = mingru(k, v, h0, reverse=True)
        h, _ = minlstm(h, k, v, candidate="tanh")
        return scan(torch.sigmoid(k), h, h0)


def test_public_functions(tmp_path: Path) -> None:
    B, T = Dim("B"), Dim("T")
    run = _onnx(
        Functions(), (torch.randn(3, 7, 8), torch.rand(3, 4)), ({0: B, 1: T}, {0: B}), tmp_path
    )
    _check(run, Functions(), torch.randn(2, 20, 8), torch.rand(2, 4))


class EndToEnd(nn.Module):
    """Two sequences in one row."""

    def forward(self, x: Tensor) -> Tensor:
        return mingru(x, x, cu_seqlens=torch.tensor([0, 2, 5]))[0]


def test_sequences_end_to_end_are_refused() -> None:
    with pytest.raises(torch.onnx.OnnxExporterError, match="ONNX has no packed sequences"):
        torch.onnx.export(
            EndToEnd().eval(),
            (torch.randn(1, 5, 4),),
            custom_translation_table=translations(),
            verbose=False,
        )


def test_state_of_a_layer_is_taken_on(tmp_path: Path) -> None:
    module, T = MinLSTM(4, 5, 2), Dim("T")
    inputs = (torch.randn(7, 3, 4), torch.rand(2, 3, 5))
    run = _onnx(module, inputs, ({0: T}, None), tmp_path)
    x, state, ys = torch.randn(6, 3, 4), torch.zeros(2, 3, 5), []
    for steps in (x[:1], x[1:4], x[4:]):
        y, state, _ = run(steps, state)
        ys.append(y)
    assert_close(torch.cat(ys), module(x)[0].detach(), rtol=1e-5, atol=1e-6)
