"""`torch.ops.minrnn`: schemas, shapes and gradients of the operators.

Each operator is `minrnn::name` and `minrnn::name_backward`. Pure torch serves every device; a
compiled kernel takes over where there is one, and torch's dispatcher picks it. `mingru` and
`minlstm` come a second time as `name_fused`: their gates side by side in one tensor, (B, T, n * D)
or (T, B, n * D), as one projection gives them, and their gradient likewise, so that nothing is
cut, joined or transposed by a copy. The arguments of all: gates (Tensor ...), h0, options, reset,
cu_seqlens, reverse.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minrnn.ops import gpu, native, torch_kernels, transforms
from minrnn.ops.direct import check_call

_Kernel = Callable[..., tuple[Tensor, ...]]


@dataclass(frozen=True)
class _Operator:
    name: str
    gates: str
    """the tensors before h0"""
    saved: str
    """which of them the gradient reads, besides h0 and h: scan's b only adds"""
    options: str
    forward: _Kernel
    backward: _Kernel
    fused: int = 1
    """how many gates lie side by side in a tensor"""

    @property
    def num_gates(self) -> int:
        return len(self.gates.split())

    @property
    def num_saved(self) -> int:
        return len(self.saved.split())


def _fused(name: str, options: str, num: int) -> _Operator:
    """Gates side by side, and time first if the last option says so: (T, B, num * D)."""
    forward = getattr(torch_kernels, name)
    backward = getattr(torch_kernels, f"{name}_backward")

    def run(gates: Tensor, h0: Tensor | None, *args: Any) -> tuple[Tensor, ...]:
        *options, time_first, reset, cu_seqlens, reverse = args
        gates, reset = (_swap(x, time_first) for x in (gates, reset))
        h, h_T = forward(*gates.chunk(num, dim=-1), h0, *options, reset, cu_seqlens, reverse)
        return _swap(h, time_first), h_T

    def run_backward(
        dh: Tensor, dh_T: Tensor, gates: Tensor, h0: Tensor | None, h: Tensor, *args: Any
    ) -> tuple[Tensor, ...]:
        *options, time_first, reset, cu_seqlens, reverse = args
        dh, gates, h, reset = (_swap(x, time_first) for x in (dh, gates, h, reset))
        layout = (reset, cu_seqlens, reverse)
        *grads, dh0 = backward(dh, dh_T, *gates.chunk(num, dim=-1), h0, h, *options, *layout)
        return _swap(torch.cat(grads, dim=-1), time_first), dh0

    options = f"{options}bool time_first, "
    return _Operator(f"{name}_fused", "gates", "gates", options, run, run_backward, num)


def _swap(x: Any, time_first: bool) -> Any:
    return x if x is None or not time_first else x.transpose(0, 1)


_GRU, _LSTM = "str candidate, ", "str candidate, bool normalized, "
OPERATORS = (
    _Operator("scan", "a b", "a", "", torch_kernels.scan, torch_kernels.scan_backward),
    _Operator("mingru", "k v", "k v", _GRU, torch_kernels.mingru, torch_kernels.mingru_backward),
    _Operator(
        "minlstm", "f i v", "f i v", _LSTM, torch_kernels.minlstm, torch_kernels.minlstm_backward
    ),
    _fused("mingru", _GRU, 2),
    _fused("minlstm", _LSTM, 3),
)

_library = torch.library.Library("minrnn", "DEF")


def _define(op: _Operator) -> None:
    options = f"{op.options}Tensor? reset, Tensor? cu_seqlens, bool reverse"
    tag = torch.Tag.pt2_compliant_tag
    _library.define(
        f"{op.name}({_tensors(op.gates)}, Tensor? h0, {options}) -> (Tensor, Tensor)", tags=(tag,)
    )
    grads = ", ".join(["Tensor"] * (op.num_gates + 1))
    _library.define(
        f"{op.name}_backward(Tensor dh, Tensor dh_T, {_tensors(op.saved)}, Tensor? h0, Tensor h,"
        f" {options}) -> ({grads})",
        tags=(tag,),
    )
    for name, kernel in ((op.name, op.forward), (f"{op.name}_backward", op.backward)):
        _library.impl(name, _pure_torch(name, kernel), "CompositeExplicitAutograd")
    _register_shapes(op)
    _register_gradient(op)
    register_second_gradient(f"{op.name}_backward", op.backward)


def _tensors(names: str) -> str:
    return ", ".join(f"Tensor {name}" for name in names.split())


def _pure_torch(name: str, kernel: _Kernel) -> _Kernel:
    """`kernel` with contiguous results, whatever the strides of its inputs: what the fake says."""

    def run(*args: Any) -> tuple[Tensor, ...]:
        is_on_cpu = args[0].device.type == "cpu"
        if is_on_cpu:
            native.warn_of_pure_torch()
        check_call(name, args, read_bounds=is_on_cpu)
        return tuple(x.contiguous() for x in kernel(*args))

    return run


def _register_shapes(op: _Operator) -> None:
    def forward(*args: Any) -> tuple[Tensor, Tensor]:
        transforms.check_export()
        check_call(op.name, args, read_bounds=False)
        gate, cu_seqlens = args[0], args[-2]
        D = gate.shape[2] // op.fused
        B = gate.shape[1 if op.fused > 1 and args[-4] else 0]
        rows = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
        state_dtype = torch.float64 if gate.dtype == torch.float64 else torch.float32
        return gate.new_empty(*gate.shape[:2], D), gate.new_empty(rows, D, dtype=state_dtype)

    def backward(dh: Tensor, dh_T: Tensor, *args: Any) -> tuple[Tensor, ...]:
        check_call(f"{op.name}_backward", (dh, dh_T, *args), read_bounds=False)
        gate, h0 = args[0], args[op.num_saved]
        grads = [gate.new_empty(gate.shape) for _ in range(op.num_gates)]
        state_dtype = torch.float64 if gate.dtype == torch.float64 else torch.float32
        return *grads, dh_T.new_empty(dh_T.shape, dtype=state_dtype if h0 is None else h0.dtype)

    torch.library.register_fake(f"minrnn::{op.name}", forward, lib=_library)
    torch.library.register_fake(f"minrnn::{op.name}_backward", backward, lib=_library)


def _register_gradient(op: _Operator) -> None:
    """The gradient of `minrnn::name` is one call of `minrnn::name_backward`."""
    backward_op = getattr(torch.ops.minrnn, f"{op.name}_backward")

    def setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        h0, *options, reset, cu_seqlens, ctx.reverse = inputs[op.num_gates :]
        ctx.options = options
        ctx.save_for_backward(*inputs[: op.num_saved], h0, output[0], reset, cu_seqlens)

    torch.library.register_autograd(
        f"minrnn::{op.name}", _gradient(backward_op), setup_context=setup, lib=_library
    )

    def time_first(args: tuple[Any, ...]) -> bool:
        return op.fused > 1 and args[-4]

    transforms.define(op.name, op.forward, op.num_gates, setup, _gradient(op.backward), time_first)


def _gradient(backward: _Kernel) -> Callable[..., tuple[Tensor | None, ...]]:
    """Of every argument of an operator, from what was saved for it; options have none."""

    def run(ctx: Any, dh: Tensor, dh_T: Tensor) -> tuple[Tensor | None, ...]:
        *saved, h0, h, reset, cu_seqlens = ctx.saved_tensors
        layout = (reset, cu_seqlens, ctx.reverse)
        *grads, dh0 = backward(dh, dh_T, *saved, h0, h, *ctx.options, *layout)
        return *grads, None if h0 is None else dh0, *[None] * (len(ctx.options) + 3)

    return run


def register_second_gradient(name: str, formula: _Kernel) -> None:
    """The gradient of `minrnn::name_backward` is taken of its formula in pure torch."""

    def setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        floating = [isinstance(x, Tensor) and x.is_floating_point() for x in inputs]
        ctx.floating = floating
        ctx.others = [None if keep else x for x, keep in zip(inputs, floating, strict=True)]
        ctx.save_for_backward(*[x for x, keep in zip(inputs, floating, strict=True) if keep])

    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        again = torch.is_grad_enabled()
        with torch.enable_grad():
            # views, so that differentiation stops at these inputs and not at what they came from
            views = [x.view_as(x) if again else x.detach() for x in ctx.saved_tensors]
            inputs = [x if x.requires_grad else x.requires_grad_() for x in views]
            given = iter(inputs)
            pairs = zip(ctx.others, ctx.floating, strict=True)
            outputs = formula(*[next(given) if keep else x for x, keep in pairs])
            found = torch.autograd.grad(
                outputs, inputs, grads, create_graph=again, allow_unused=True
            )
        left = iter(found)
        return tuple(next(left) if keep else None for keep in ctx.floating)

    torch.library.register_autograd(f"minrnn::{name}", backward, setup_context=setup, lib=_library)


for _operator in OPERATORS:
    _define(_operator)

# every operator, forward and backward
NAMES = tuple(f"{op.name}{suffix}" for op in OPERATORS for suffix in ("", "_backward"))

if gpu.is_installed():
    gpu.register(_library, NAMES, "CUDA")

native.load(Path(__file__).parent)
