"""Linear maps and whole models for few rows, whose result for a row does not depend on the others.

For linear maps pure torch serves every device, row by row; compiled kernels take over on the CPU.
"""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

WeightDtype = Literal["float32", "bfloat16", "int8"]
# outputs side by side in packed weights, as in cpu/rows.h
_PANEL = 32
# int8 weights of one output that are read at once
_BYTES = 4
_library = torch.library.Library("minrnn", "FRAGMENT")


class Packed(NamedTuple):
    """Weights W (N, K) as `linear_rows` reads them.

    Args:
        panels: (ceil(N / 32), K, 32, 1) in float32 or bfloat16, (ceil(N / 32), ceil(K / 4), 32, 4)
            in int8; 0 beyond N and K.
        scale: (N,), what int8 weights are multiplied by; else None.
        num_outputs: N.
        num_inputs: K.
    """

    panels: Tensor
    scale: Tensor | None
    num_outputs: int
    num_inputs: int


def pack(weight: Tensor, dtype: WeightDtype = "float32") -> Packed:
    """Lay weights out for `linear_rows`, rounded to `dtype`.

        int8:  W[n, k] = scale[n] * q[n, k],  scale[n] = max_k |W[n, k]| / 127

    Args:
        weight: (N, K), float32.
        dtype: of the weights in memory; products are summed in float32 always.

    Raises:
        ValueError: `weight` is no matrix, or `dtype` none of these.
        TypeError: `weight` is not float32.

    Example:
        >>> pack(torch.ones(40, 3)).panels.shape
        torch.Size([2, 3, 32, 1])
    """
    if weight.dim() != 2:
        raise ValueError(f"`weight` must have shape (N, K), got {tuple(weight.shape)}")
    if weight.dtype != torch.float32:
        raise TypeError(f"`weight` must be float32, got {weight.dtype}")
    if dtype not in ("float32", "bfloat16", "int8"):
        raise ValueError(f"`dtype` must be float32, bfloat16 or int8, got {dtype!r}")
    (N, K), scale = weight.shape, None
    weight = weight.detach()
    if dtype == "int8":
        scale = weight.abs().amax(dim=1).clamp_min(torch.finfo(torch.float32).tiny) / 127
        weight = (weight / scale[:, None]).round()
    steps = _BYTES if dtype == "int8" else 1
    padded = F.pad(weight, (0, -K % steps, 0, -N % _PANEL))
    # (P, 32, K / steps, steps) to (P, K / steps, 32, steps)
    panels = padded.unflatten(1, (-1, steps)).unflatten(0, (-1, _PANEL)).transpose(1, 2)
    return Packed(panels.to(getattr(torch, dtype)).contiguous(), scale, N, K)


def linear_rows(x: Tensor, weight: Packed, bias: Tensor | None = None) -> Tensor:
    """Map each row of `x` by itself.

        y = x W^T + bias

    The sum of a row is formed in one order whatever the number of rows: a row gives the same bits
    alone and among others. There is no gradient.

    Args:
        x: (..., K), float32.
        weight: what `pack` made of W (N, K).
        bias: (N,), float32.

    Returns:
        (..., N), float32.

    Raises:
        ValueError: `x` has another number of columns than W, or `bias` another size.
        TypeError: `x` or `bias` is not float32.

    Example:
        >>> x, W = torch.randn(5, 3), torch.randn(40, 3)
        >>> y = linear_rows(x, pack(W))
        >>> torch.allclose(y, x @ W.T, atol=1e-5)
        True
        >>> torch.equal(linear_rows(x[2:3], pack(W)), y[2:3])
        True
    """
    N, K = weight.num_outputs, weight.num_inputs
    if x.dim() == 0 or x.shape[-1] != K:
        raise ValueError(f"`x` must have shape (..., K), K = {K}, got {tuple(x.shape)}")
    if bias is not None and tuple(bias.shape) != (N,):
        raise ValueError(f"`bias` must have shape (N,) = ({N},), got {tuple(bias.shape)}")
    for name, tensor in (("x", x), ("bias", bias)):
        if tensor is not None and tensor.dtype != torch.float32:
            raise TypeError(f"`{name}` must be float32, got {tensor.dtype}")
    rows = x.reshape(math.prod(x.shape[:-1]), K)
    y = torch.ops.minrnn.linear_rows(rows, weight.panels, weight.scale, bias, N, K)
    return y.view(*x.shape[:-1], N)


def can_run_model(device: torch.device) -> bool:
    """Whether `run_model` has its kernel: on the CPU, where the library is built."""
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    return device.type == "cpu" and has_kernel("minrnn::run_model", "CPU")


def run_model(
    ids: Tensor,
    embedding: Tensor,
    weights: Sequence[Tensor],
    states: Sequence[Tensor],
    sizes: Sequence[int],
    candidate: str,
    normalized: bool,
) -> tuple[Tensor, list[Tensor]]:
    """Run a language model of minimal cells in one call; there is no gradient.

    Its formula is `minrnn.models.LanguageModel`'s; `minrnn.packing` calls it.

    Args:
        ids: (B, T) int64.
        embedding: (V, width).
        weights: for each block the convolution (conv_width, width), its bias, its pointwise matrix,
            the norm, the matrices of gates and of the projection, the norm, the matrices of the
            feed-forward part; then the last norm and the head. A matrix is three tensors: panels,
            scale, bias. What a model does without has no elements.
        states: for each block h (B, D) and the convolution's last inputs.
        sizes: D, the number of gates, conv_width (0: none), inner width of the feed-forward part
            (0: none).
        candidate: of the cell.
        normalized: of minLSTM.

    Returns:
        logits (B, T, V) and the states behind `ids`.
    """
    return torch.ops.minrnn.run_model(ids, embedding, weights, states, sizes, candidate, normalized)


def _row_by_row(
    x: Tensor,
    panels: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    num_outputs: int,
    num_inputs: int,
) -> Tensor:
    _check_call(x, panels, scale, bias, num_outputs, num_inputs)
    # (P, K / steps, 32, steps) to (N, K)
    weight = panels.transpose(1, 2).flatten(2).flatten(0, 1)[:num_outputs, :num_inputs].to(x.dtype)
    if scale is not None:
        weight = weight * scale[:, None]
    y = torch.empty(len(x), num_outputs, dtype=x.dtype, device=x.device)
    for row, to in zip(x, y, strict=True):
        to.copy_(F.linear(row, weight, bias))
    return y


def _check_call(
    x: Tensor, panels: Tensor, scale: Tensor | None, bias: Tensor | None, N: int, K: int
) -> None:
    """What the compiled kernel checks of a direct call."""
    steps = _BYTES if panels.dtype == torch.int8 else 1
    floats = [x, *(vector for vector in (scale, bias) if vector is not None)]
    if panels.dtype not in (torch.float32, torch.bfloat16, torch.int8) or any(
        tensor.dtype != torch.float32 for tensor in floats
    ):
        raise TypeError("`x`, `scale` and `bias` must be float32, weights also bfloat16 or int8")
    wanted = (-(-N // _PANEL), -(-K // steps), _PANEL, steps)
    if N < 1 or x.dim() != 2 or x.shape[1] != K or tuple(panels.shape) != wanted:
        raise ValueError(
            f"`x` must have shape (M, {K}) and `panels` {wanted}, "
            f"got {tuple(x.shape)}, {tuple(panels.shape)}"
        )
    if (scale is None) == (panels.dtype == torch.int8):
        raise ValueError("int8 weights need a `scale`, and others have none")
    for name, vector in (("scale", scale), ("bias", bias)):
        if vector is not None and tuple(vector.shape) != (N,):
            raise ValueError(f"`{name}` must have shape (N,) = ({N},), got {tuple(vector.shape)}")


_library.define(
    "linear_rows(Tensor x, Tensor panels, Tensor? scale, Tensor? bias, int num_outputs,"
    " int num_inputs) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.impl("linear_rows", _row_by_row, "CompositeExplicitAutograd")
_library.define(
    "run_model(Tensor ids, Tensor embedding, Tensor[] weights, Tensor[] states, int[] sizes,"
    " str candidate, bool normalized) -> (Tensor, Tensor[])"
)


@torch.library.register_fake("minrnn::linear_rows", lib=_library)
def _shape(
    x: Tensor,
    panels: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    num_outputs: int,
    num_inputs: int,
) -> Tensor:
    _check_call(x, panels, scale, bias, num_outputs, num_inputs)
    return x.new_empty(x.shape[0], num_outputs)
