"""MinGRUCell and MinLSTMCell: one step, in place of torch.nn.GRUCell and torch.nn.LSTMCell."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from minrnn import ops
from minrnn.layers.checks import (
    SizeError,
    cell_state,
    check_flags,
    check_input,
    check_placement,
    check_sizes,
    check_state_kind,
    fx_module_name,
)
from minrnn.layers.forget_bias import add_forget_bias, check_forget_bias
from minrnn.layers.stack import bounds
from minrnn.layers.states import returned
from minrnn.ops.checks import check_candidate, check_tensor


class _Cell(nn.Module):
    num_gates: int

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        candidate: str = "g",
    ) -> None:
        super().__init__()
        self.__module__ = fx_module_name(self)
        check_sizes({"input_size": input_size, "hidden_size": hidden_size})
        check_flags({"bias": bias})
        check_placement(device, dtype)
        check_candidate(candidate)
        self.input_size, self.hidden_size = input_size, hidden_size
        self.bias, self.candidate = bias, candidate
        rows, made = self.num_gates * hidden_size, {"device": device, "dtype": dtype}
        self.weight_ih = nn.Parameter(torch.empty(rows, input_size, **made))
        self.bias_ih = nn.Parameter(torch.empty(rows, **made)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw weight and bias uniformly within 1 / sqrt(input_size)."""
        for parameter in (self.weight_ih, self.bias_ih):
            if parameter is not None:
                nn.init.uniform_(parameter, *bounds(self.input_size))

    def extra_repr(self) -> str:
        text = f"{self.input_size}, {self.hidden_size}" + ("" if self.bias else ", bias=False")
        return text if self.candidate == "g" else f"{text}, candidate={self.candidate!r}"

    def _recur(self, gates: Tensor, h0: Tensor | None, **layout: Any) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def _step(self, input: Tensor, hx: Tensor | None) -> Tensor:
        check_tensor("input", input)
        if input.is_nested:
            raise ValueError("`input` must not be nested: a cell takes one step of each row")
        if input.dim() not in (1, 2):
            raise ValueError(f"`input` must have 1 or 2 dimensions, got shape {tuple(input.shape)}")
        # read once: with a parametrization each reading computes it
        weight = self.weight_ih
        check_input(input, weight, "(B, input_size)" if input.dim() == 2 else "(input_size,)")
        if hx is not None:
            check_tensor("hx", hx)
            if hx.dim() not in (1, 2):
                raise ValueError(f"`hx` must have 1 or 2 dimensions, got shape {tuple(hx.shape)}")
            sizes = (*input.shape[:-1], self.hidden_size)
            if tuple(hx.shape) != sizes:
                symbols = "(B, hidden_size)" if input.dim() == 2 else "(hidden_size,)"
                raise SizeError(f"`hx` must have shape {symbols} = {sizes}, got {tuple(hx.shape)}")
            check_state_kind(hx, input)
            hx = hx if hx.dim() == 2 else hx[None]
        gates = F.linear(input, weight, self.bias_ih)
        # (B, 1, num_gates * hidden_size): a sequence of one step
        gates = gates[:, None] if input.dim() == 2 else gates[None, None]
        layout = {"time_first": False, "reset": None, "cu_seqlens": None, "reverse": False}
        h_T = returned(self._recur(gates, hx, **layout)[1], input, hx)
        return h_T if input.dim() == 2 else h_T[0]


class MinGRUCell(_Cell):
    """One step of a `MinGRU`, in place of `torch.nn.GRUCell`.

        k, v = split(W x + bias)
        h' = (1 - sigmoid(k)) * h + sigmoid(k) * candidate(v)

    Feng et al. 2024, arXiv:2410.01201, section 3.1. Weights: `weight_ih` (2 * hidden_size,
    input_size) and `bias_ih`, the rows of k above those of v.

    Args:
        input_size: features of x.
        hidden_size: channels of the state.
        bias: learn a bias for k and v.
        device, dtype: of the weights.
        candidate: "g", "identity" or "tanh", as in `minrnn.mingru`.

    Raises:
        ValueError: a size is out of range or `candidate` is unknown; on a call, a shape does not
            fit (also a RuntimeError where nn.GRUCell raises that).
        TypeError: an argument is of another type.

    Example:
        >>> from minrnn import MinGRU
        >>> cell, layer = MinGRUCell(8, 16), MinGRU(8, 16)
        >>> names = {"weight_ih": "weight_ih_l0", "bias_ih": "bias_ih_l0"}
        >>> _ = cell.load_state_dict({a: layer.state_dict()[b] for a, b in names.items()})
        >>> x = torch.randn(2, 3, 8)
        >>> torch.allclose(cell(x[1], cell(x[0])), layer(x)[1][0])
        True
    """

    num_gates = 2

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """The state after one step.

        Args:
            input: (B, input_size), or (input_size,).
            hx: (B, hidden_size), or (hidden_size,): the state before; None stands for zeros.

        Returns:
            (B, hidden_size) or (hidden_size,), in the dtype of `hx`, or of `input` without one;
                float32 under autocast.
        """
        return self._step(input, hx)

    def _recur(self, gates: Tensor, h0: Tensor | None, **layout: Any) -> tuple[Tensor, Tensor]:
        return ops.mingru_fused(gates, h0, self.candidate, **layout)


class MinLSTMCell(_Cell):
    """One step of a `MinLSTM`, in place of `torch.nn.LSTMCell`.

        f, i, v = split(W x + bias)
        h' = f' * h + i' * candidate(v)

    Feng et al. 2024, arXiv:2410.01201, section 3.2; f' and i' as in `minrnn.minlstm`. Weights as in
    `MinGRUCell`, with three groups of rows: f, i, v.

    Args:
        input_size: features of x.
        hidden_size: channels of the state.
        bias: learn a bias for f, i and v.
        device, dtype: of the weights.
        candidate: "g", "identity" or "tanh", as in `minrnn.mingru`.
        normalized, forget_bias: as in `MinLSTM`.

    Raises:
        ValueError: as in `MinGRUCell`; or `forget_bias` is given without a bias.
        TypeError: an argument is of another type.

    Example:
        >>> h, c = MinLSTMCell(8, 16)(torch.randn(3, 8))
        >>> h.shape, torch.equal(h, c)
        (torch.Size([3, 16]), True)
    """

    num_gates = 3

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        candidate: str = "g",
        normalized: bool = True,
        forget_bias: float = 0.0,
    ) -> None:
        check_flags({"bias": bias, "normalized": normalized})
        check_forget_bias(forget_bias, bias)
        # before the weights are drawn, which asks for them
        self.normalized, self.forget_bias = normalized, forget_bias
        super().__init__(input_size, hidden_size, bias, device, dtype, candidate=candidate)

    def reset_parameters(self) -> None:
        """As in `MinGRUCell`; then `forget_bias` moves the rows of f, and of i if `normalized`."""
        super().reset_parameters()
        if self.bias_ih is not None and self.forget_bias:
            add_forget_bias(self.bias_ih, self.forget_bias, self.normalized)

    def forward(
        self, input: Tensor, hx: Tensor | tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """The state after one step, twice: h = c.

        Args:
            input: (B, input_size), or (input_size,).
            hx: (B, hidden_size), or (hidden_size,): the state before, or a pair (h_0, c_0), as in
                `MinLSTM`. None stands for zeros.

        Returns:
            (h, c): equal tensors, (B, hidden_size) or (hidden_size,); dtype as in `MinGRUCell`.

        Raises:
            ValueError: entries of h_0 and c_0 differ and neither is zero.
        """
        h = self._step(input, cell_state(hx))
        return h, h.clone()

    def extra_repr(self) -> str:
        text = super().extra_repr() + ("" if self.normalized else ", normalized=False")
        return text + (f", forget_bias={self.forget_bias}" if self.forget_bias else "")

    def _recur(self, gates: Tensor, h0: Tensor | None, **layout: Any) -> tuple[Tensor, Tensor]:
        return ops.minlstm_fused(gates, h0, self.candidate, self.normalized, **layout)
