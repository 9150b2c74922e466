"""The operators under `torch.func`: grad, vmap, and what is made of them.

Operators registered with a Python gradient do not take part in torch's function transforms; a
`torch.autograd.Function` with `setup_context` does. So there is one for each operator, used while
a transform is active and at no other time. Its gradient is the formula in pure torch, which rests
on `scan` and can be transformed again; its batching rule lays the new axis along the batch, or
along the sequences that `cu_seqlens` bounds. Where torch.compile traces a transform, it traces the
operator in pure torch.
"""

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_UNTRANSLATED = (
    "does not know minrnn's operators: `import minrnn.onnx` and export with dynamo=True, "
    "custom_translation_table=minrnn.onnx.translations()"
)
functions: dict[str, type[torch.autograd.Function]] = {}
formulas: dict[str, Callable[..., tuple[Tensor, ...]]] = {}


def call(name: str, *args: Any) -> Any:
    """`torch.ops.minrnn.name`, whatever transform is active."""
    if torch.jit.is_tracing() and torch.onnx.is_in_onnx_export():
        raise NotImplementedError(f"torch.onnx.export with dynamo=False {_UNTRANSLATED}")
    if not torch._C._are_functorch_transforms_active():
        return getattr(torch.ops.minrnn, name)(*args)
    if torch.compiler.is_compiling() or _functionalizes():
        # neither knows the gradient and the batching rule of a function
        return formulas[name](*args)
    return functions[name].apply(*args)


def _functionalizes() -> bool:
    """`torch.func.functionalize` is one of the active transforms."""
    functionalize = torch._C._functorch.TransformType.Functionalize
    levels = torch._C._functorch.get_interpreter_stack() or []
    return any(level.key() == functionalize for level in levels)


def check_export() -> None:
    """torch.onnx.export, if it runs, knows the operators: see `minrnn.onnx`."""
    if torch.onnx.is_in_onnx_export() and "minrnn.onnx" not in sys.modules:
        raise NotImplementedError(f"torch.onnx.export {_UNTRANSLATED}")


def define(
    name: str,
    formula: Callable[..., tuple[Tensor, ...]],
    num_gates: int,
    setup: Callable[..., None],
    gradient: Callable[..., tuple[Tensor | None, ...]],
    time_first: Callable[[tuple[Any, ...]], bool],
) -> None:
    """Make the function of an operator.

    Args:
        name: of the operator.
        formula: the operator in pure torch, which every transform can trace.
        num_gates: how many tensors (B, T, ...) it begins with.
        setup: saves what the gradient needs, as for `torch.library.register_autograd`.
        gradient: of every argument, from (ctx, dh, dh_T), likewise; can be transformed itself.
        time_first: of the arguments: do they have time before batch?
    """

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(*args: Any) -> Any:
            return getattr(torch.ops.minrnn, name)(*args)

        setup_context = staticmethod(setup)

        backward = staticmethod(gradient)

        @staticmethod
        def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> Any:
            wide = [_first(x, dim, info.batch_size) for x, dim in zip(args, in_dims, strict=True)]
            second = time_first(args) != (args[-2] is not None)
            h, h_T = call(name, *_merge(wide, num_gates, second))
            axis = 1 if second else 0
            sizes = (info.batch_size, -1)
            return (h.unflatten(axis, sizes), h_T.unflatten(0, sizes)), (axis, 0)

    functions[name], formulas[name] = Function, formula


def _first(x: Any, dim: int | None, size: int) -> Any:
    """A tensor with the new axis, of this size, in front."""
    if not isinstance(x, Tensor):
        return x
    return x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)


def _merge(args: list[Any], num_gates: int, second: bool) -> list[Any]:
    """Arguments with an axis E in front, as those of one call without it.

    E is laid along the batch, or along time where `cu_seqlens` bounds sequences: that is the
    `second` axis of the gates, or else the first.
    """
    rows, h0 = args[:num_gates], args[num_gates]
    *options, reset, cu_seqlens, reverse = args[num_gates + 1 :]

    def flat(x: Tensor) -> Tensor:
        # (E, B, T, ...) -> (B, E * T, ...), or (E * B, T, ...); or T before B
        return x.transpose(0, 1).flatten(1, 2) if second else x.flatten(0, 1)

    if cu_seqlens is not None:
        E, T = rows[0].shape[0], rows[0].shape[2 if second else 1]
        shift = torch.arange(E, device=cu_seqlens.device, dtype=cu_seqlens.dtype)[:, None] * T
        starts = (cu_seqlens[:, :-1] + shift).flatten()
        cu_seqlens = torch.cat([starts, (cu_seqlens[-1:, -1] + shift[-1])])
    reset = None if reset is None else flat(reset)
    h0 = None if h0 is None else h0.flatten(0, 1)
    return [*[flat(x) for x in rows], h0, *options, reset, cu_seqlens, reverse]
