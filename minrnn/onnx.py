"""The operators in ONNX: what `torch.onnx.export` needs for a model that holds our layers.

Not imported by `minrnn`; needs the extra `onnx`. Letters are those of `minrnn/ops/__init__.py`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import onnx_ir as ir
import torch
from onnxscript import evaluator, opset18
from torch.onnx._internal.exporter._torchlib._torchlib_registry import onnx_impl

_Pair = tuple[Any, Any]
# its signatures hold for constants, not for the values of a graph
op: Any = opset18


def translations() -> dict[Callable[..., Any], Callable[..., Any] | Sequence[Callable[..., Any]]]:
    """The `custom_translation_table` of `torch.onnx.export` for all of `torch.ops.minrnn`.

        a, b from the gates, elementwise
        Scan over t: h_t = a_t * h_{t-1} + b_t

    The state is float32 (float64 for float64). B and T may be dynamic, and 0; `reset` and both
    directions are kept. Once this module is imported, torch.onnx.export finds the translations
    without the table, too.

    Returns:
        for each operator, what writes it in ONNX: all that layers, cells and functions run.

    Raises:
        NotImplementedError: on export, sequences lie end to end: a PackedSequence, `cu_seqlens`.

    Example:
        >>> from minrnn import MinGRU
        >>> sorted(str(op) for op in translations())[0]
        'minrnn.mingru.default'
        >>> program = torch.onnx.export(
        ...     MinGRU(4, 8, batch_first=True).eval(),
        ...     (torch.randn(2, 5, 4),),
        ...     dynamic_shapes={"input": {0: torch.export.Dim("B"), 1: torch.export.Dim("T")}},
        ...     custom_translation_table=translations(),
        ...     verbose=False,
        ... )
        >>> len(program.model.graph.outputs)
        2
    """
    ops = torch.ops.minrnn
    return {
        ops.scan.default: _scan,
        ops.mingru.default: _mingru,
        ops.minlstm.default: _minlstm,
        ops.mingru_fused.default: _mingru_fused,
        ops.minlstm_fused.default: _minlstm_fused,
    }


# Arguments as in the operators' schemas; the last three are reset, cu_seqlens, reverse.


def _scan(a: Any, b: Any, h0: Any, *layout: Any) -> _Pair:
    return _recur(a, _widen(a), _widen(b), h0, False, *layout)


def _mingru(k: Any, v: Any, h0: Any, candidate: str, *layout: Any) -> _Pair:
    return _recur(k, *_gru(_widen(k), _widen(v), candidate), h0, False, *layout)


def _mingru_fused(gates: Any, h0: Any, candidate: str, time_first: bool, *layout: Any) -> _Pair:
    k, v = op.Split(_widen(gates), axis=-1, num_outputs=2)
    return _recur(gates, *_gru(k, v, candidate), h0, time_first, *layout)


def _minlstm(f: Any, i: Any, v: Any, h0: Any, *args: Any) -> _Pair:
    candidate, normalized, *layout = args
    a, b = _lstm(_widen(f), _widen(i), _widen(v), candidate, normalized)
    return _recur(f, a, b, h0, False, *layout)


def _minlstm_fused(gates: Any, h0: Any, candidate: str, normalized: bool, *args: Any) -> _Pair:
    f, i, v = op.Split(_widen(gates), axis=-1, num_outputs=3)
    return _recur(gates, *_lstm(f, i, v, candidate, normalized), h0, *args)


def _gru(k: Any, v: Any, candidate: str) -> _Pair:
    """a and b from the gates."""
    return op.Sigmoid(op.Neg(k)), op.Mul(op.Sigmoid(k), _candidate(v, candidate))


def _lstm(f: Any, i: Any, v: Any, candidate: str, normalized: bool) -> _Pair:
    a, open_gate = op.Sigmoid(f), op.Sigmoid(i)
    if normalized:
        # log(i' / f'): the quotient of two sigmoids would be 0/0 where both underflow
        d = op.Sub(_softplus(op.Neg(f)), _softplus(op.Neg(i)))
        a, open_gate = op.Sigmoid(op.Neg(d)), op.Sigmoid(d)
    return a, op.Mul(open_gate, _candidate(v, candidate))


def _softplus(x: Any) -> Any:
    # onnxruntime has no Softplus for float64
    rest = op.Log(op.Add(op.Exp(op.Neg(op.Abs(x))), op.CastLike(1.0, x)))
    return op.Add(op.Relu(x), rest)


def _state_dtype(gates: Any) -> ir.DataType:
    return ir.DataType.DOUBLE if gates.dtype == ir.DataType.DOUBLE else ir.DataType.FLOAT


def _widen(gates: Any) -> Any:
    return op.Cast(gates, to=int(_state_dtype(gates)))


def _candidate(v: Any, candidate: str) -> Any:
    if candidate == "g":
        above = op.Add(v, op.CastLike(0.5, v))
        return op.Where(op.GreaterOrEqual(v, op.CastLike(0.0, v)), above, op.Sigmoid(v))
    return op.Tanh(v) if candidate == "tanh" else v


def _recur(gates: Any, a: Any, b: Any, h0: Any, time_first: bool, *layout: Any) -> _Pair:
    """h in the dtype of `gates`, and h_T, from one Scan over a and b, if they hold anything."""
    reset, cu_seqlens, reverse = layout
    if cu_seqlens is not None:
        raise NotImplementedError("ONNX has no packed sequences: export with a padded input")
    dtype, time = _state_dtype(gates), 0 if time_first else 1
    # (B, D)
    if h0 is None:
        sizes = op.Concat(op.Shape(b, start=1 - time, end=2 - time), op.Shape(b, start=2), axis=0)
        h0 = op.ConstantOfShape(sizes)
    steps = [a, b]
    if reset is not None:
        # (B, T, 1) or (T, B, 1)
        steps.append(op.Unsqueeze(reset, op.Constant(value_ints=[-1])))
    attributes = {
        "body": _step(dtype, len(steps)),
        "num_scan_inputs": len(steps),
        "scan_input_axes": [time] * len(steps),
        "scan_input_directions": [int(reverse)] * len(steps),
        "scan_output_axes": [time],
        "scan_output_directions": [int(reverse)],
    }
    h0 = op.Cast(h0, to=int(dtype))
    scan = ir.node("Scan", [h0, *steps], attributes, num_outputs=2)
    recorder: Any = evaluator.default()
    if not all(isinstance(size, int) and size > 0 for size in gates.shape):
        scan = _unless_empty(scan, h0, b)
    # opset18.Scan would be given one output: the recorder cannot know their number
    recorder.nodes.append(scan)
    h_T, h = scan.outputs
    return op.CastLike(h, gates), h_T


def _unless_empty(scan: ir.Node, h0: Any, b: Any) -> ir.Node:
    """`scan`, or h0 and b themselves where b has no element, as no step leaves them.

    onnxruntime refuses a Scan of no steps; one along the second axis ends its process.
    """
    same = [ir.node("Identity", [x]) for x in (h0, b)]
    branches = {
        "then_branch": ir.Graph([], [n.outputs[0] for n in same], nodes=same, name="empty"),
        "else_branch": ir.Graph([], scan.outputs, nodes=[scan], name="steps"),
    }
    for branch in branches.values():
        for x, name, like in zip(branch.outputs, ("h_T", "h"), (h0, b), strict=True):
            x.name, x.type = f"{branch.name}_{name}", like.type
    is_empty = op.Equal(op.Size(b), op.Constant(value_int=0))
    return ir.node("If", [is_empty], branches, num_outputs=2)


def _step(dtype: ir.DataType, num_inputs: int) -> ir.Graph:
    """The body of the Scan: the state before, a, b (and reset) -> the state after, and as h."""
    kinds = [dtype, dtype, dtype, ir.DataType.BOOL][: num_inputs + 1]
    names = ["before", "a", "b", "reset"]
    before, a, b, *reset = (
        ir.Value(name=name, type=ir.TensorType(kind), shape=ir.Shape([None, None]))
        for name, kind in zip(names, kinds, strict=False)
    )
    inputs, nodes = [before, a, b, *reset], []

    def add(kind: str, *args: ir.Value, **attributes: Any) -> ir.Value:
        nodes.append(ir.node(kind, args, attributes))
        out = nodes[-1].outputs[0]
        out.name, out.type = f"step_{len(nodes)}", ir.TensorType(dtype)
        return out

    if reset:
        zero = add("Constant", value=ir.tensor([0.0], dtype=dtype))
        before = add("Where", reset[0], zero, before)
    after = add("Add", add("Mul", a, before), b)
    h = add("Identity", after)
    for out in (after, h):
        out.shape = ir.Shape([None, None])
    return ir.Graph(inputs, [after, h], nodes=nodes, name="step")


for _operator, _translation in translations().items():
    onnx_impl(_operator, no_compile=True)(_translation)
