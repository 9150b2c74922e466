"""MinGRU and MinLSTM: the layers that stand in for torch.nn.GRU and torch.nn.LSTM."""

from typing import Any, overload

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from minrnn import ops
from minrnn.layers.checks import cell_state, check_flags
from minrnn.layers.forget_bias import add_forget_bias, check_forget_bias
from minrnn.layers.stack import Stack

_Pair = tuple[Tensor, Tensor]


class MinGRU(Stack):
    """A minGRU in place of `torch.nn.GRU`: the same constructor, call and shapes.

        k, v = split(W x_t + bias)
        h_t from `minrnn.mingru`
        y_t = h_t, or P h_t with `proj_size`

    Feng et al. 2024, arXiv:2410.01201, section 3.1. Weights of layer n: `weight_ih_ln`
    (2 * hidden_size, its input's features) and `bias_ih_ln`, the rows of k above those of v;
    `weight_hr_ln` (proj_size, hidden_size) is P. Those of the other direction end in `_reverse`.

    Args:
        input_size: features of x.
        hidden_size: channels of the state, D.
        num_layers: layers, each on the output of the one before.
        bias: learn a bias for k and v.
        batch_first: x and y are (B, T, ...) instead of (T, B, ...). The state is not affected.
        dropout: probability of dropping an entry of y between two layers, while training. The state
            is never dropped.
        bidirectional: a second direction with weights of its own, from the last step to the first;
            y has both, side by side.
        proj_size: features of y after a down-projection; 0 for none. The state keeps hidden_size.
        device, dtype: of the weights.
        candidate: "g", "identity" or "tanh", as in `minrnn.mingru`.
        learn_h0: learn the state before the first step, `h_0`
            (num_layers * directions, hidden_size), used where a call is given no state.

    Raises:
        ValueError: a size is out of range or `candidate` is unknown; on a call, a shape, dtype or
            device does not fit (also a RuntimeError where nn.GRU raises that).
        TypeError: an argument is of another type.

    Example:
        >>> gru = MinGRU(8, 16, num_layers=2, batch_first=True, bidirectional=True)
        >>> x = torch.randn(3, 10, 8)
        >>> y, h_n = gru(x)
        >>> y.shape, h_n.shape
        (torch.Size([3, 10, 32]), torch.Size([4, 3, 16]))
        >>> gru = MinGRU(8, 16, batch_first=True)
        >>> _, h_n = gru(x)
        >>> _, half = gru(x[:, :4])                     # the same in two pieces
        >>> torch.allclose(gru(x[:, 4:], half)[1], h_n, atol=1e-6)
        True
    """

    mode = "GRU"
    num_gates = 2

    @overload
    def forward(
        self, input: Tensor, hx: Tensor | None = None, *, reset: Tensor | None = None
    ) -> tuple[Tensor, Tensor]: ...
    @overload
    def forward(
        self,
        input: PackedSequence,
        hx: Tensor | None = None,
        *,
        reset: PackedSequence | None = None,
    ) -> tuple[PackedSequence, Tensor]: ...
    # `reset` by position, too: exporters pass defaults so
    def forward(self, input: Any, hx: Tensor | None = None, reset: Any = None) -> Any:
        """Run over T >= 0 steps, from `hx` or from zeros (`h_0` with `learn_h0`).

        Args:
            input: (T, B, input_size), or (B, T, input_size) if `batch_first`; (T, input_size)
                without a batch; or a PackedSequence, or a nested (B, T, input_size) of jagged
                layout, each sequence of its own length, for which no padding is computed.
            hx: (num_layers * directions, B, hidden_size), the states before the first step; without
                B for an input without a batch.
            reset: bool, of the shape of `input` without features, packed or nested like it: True
                lets a step start from zeros, and nothing passes it in either direction.

        Returns:
            output: `input` with hidden_size (or proj_size) * directions features, in the dtype of
                the weights, or of autocast.
            h_n: like `hx`, the states after the last step, in its dtype; without one, in that of
                the weights. Under autocast float32.
        """
        return self._run(input, hx, reset)

    def _recur(self, gates: Tensor, h0: Tensor | None, **layout: Any) -> _Pair:
        return ops.mingru_fused(gates, h0, self.candidate, **layout)

    def _operator(self) -> tuple[Any, ...]:
        return "mingru_fused", self.candidate


class MinLSTM(Stack):
    """A minLSTM in place of `torch.nn.LSTM`: the same constructor, call and shapes.

        f, i, v = split(W x_t + bias)
        h_t from `minrnn.minlstm`
        y_t = h_t, or P h_t with `proj_size`

    Feng et al. 2024, arXiv:2410.01201, section 3.2. There is no output gate, so the cell is the
    state: h = c. Weights as in `MinGRU`, with three groups of rows: f, i, v.

    Args:
        input_size: features of x.
        hidden_size: channels of the state, D.
        num_layers, bias, batch_first, dropout, bidirectional, proj_size: as in `MinGRU`.
        device, dtype, candidate, learn_h0: as in `MinGRU`.
        normalized: divide both gates by their sum, as in `minrnn.minlstm`.
        forget_bias: b, how long the layer remembers at the start: f' = sigmoid(b) beside W x = 0, a
            memory of about 1 / (1 - sigmoid(b)) = 1 + exp(b) steps; 0 gives 2, 4 gives 56. b is
            added to the biases of f and, with `normalized`, subtracted from those of i: f' would
            else stay below 2/3.

    Raises:
        ValueError: as in `MinGRU`; or `forget_bias` is given without a bias.
        TypeError: an argument is of another type.

    Example:
        >>> lstm = MinLSTM(8, 16)
        >>> y, (h_n, c_n) = lstm(torch.randn(10, 3, 8))
        >>> y.shape, torch.equal(h_n, c_n)
        (torch.Size([10, 3, 16]), True)
    """

    mode = "LSTM"
    num_gates = 3

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        candidate: str = "g",
        learn_h0: bool = False,
        normalized: bool = True,
        forget_bias: float = 0.0,
    ) -> None:
        check_flags({"bias": bias, "normalized": normalized})
        check_forget_bias(forget_bias, bias)
        # before the weights are drawn, which asks for them
        self.normalized, self.forget_bias = normalized, forget_bias
        super().__init__(
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            dropout,
            bidirectional,
            proj_size,
            device,
            dtype,
            candidate=candidate,
            learn_h0=learn_h0,
        )

    def reset_parameters(self) -> None:
        """As in `MinGRU`; then `forget_bias` moves the rows of f, and of i if `normalized`."""
        super().reset_parameters()
        if self.forget_bias:
            for suffix in self._suffixes():
                bias = getattr(self, f"bias_ih{suffix}")
                add_forget_bias(bias, self.forget_bias, self.normalized)

    def extra_repr(self) -> str:
        text = super().extra_repr()
        text += "" if self.normalized else ", normalized=False"
        return text + (f", forget_bias={self.forget_bias}" if self.forget_bias else "")

    @overload
    def forward(
        self, input: Tensor, hx: Tensor | _Pair | None = None, *, reset: Tensor | None = None
    ) -> tuple[Tensor, _Pair]: ...
    @overload
    def forward(
        self,
        input: PackedSequence,
        hx: Tensor | _Pair | None = None,
        *,
        reset: PackedSequence | None = None,
    ) -> tuple[PackedSequence, _Pair]: ...
    def forward(self, input: Any, hx: Any = None, reset: Any = None) -> Any:
        """Run over T >= 0 steps, from `hx` or from zeros (`h_0` with `learn_h0`).

        Args:
            input: (T, B, input_size), or (B, T, input_size) if `batch_first`; (T, input_size)
                without a batch; or a PackedSequence, or a nested (B, T, input_size) of jagged
                layout, each sequence of its own length, for which no padding is computed.
            hx: (num_layers * directions, B, hidden_size), the states before the first step; or a
                pair (h_0, c_0) of such, as nn.LSTM takes it, which must stand for one state: where
                their entries differ, one of the two is zero, and the other one counts.
            reset: as in `MinGRU`.

        Returns:
            output: as in `MinGRU`.
            (h_n, c_n): the states after the last step, twice: equal tensors, each as h_n of
                `MinGRU`.

        Raises:
            ValueError: entries of h_0 and c_0 differ and neither is zero. While compiling, tracing
                or exporting, under `torch.func` and in CUDA graphs they become NaN instead.
        """
        output, h_n = self._run(input, cell_state(hx, self.proj_size), reset)
        return output, (h_n, h_n.clone())

    def get_expected_cell_size(
        self, input: Tensor, batch_sizes: Tensor | None
    ) -> tuple[int, int, int]:
        """The shape of c_0, which is that of h_0."""
        return self.get_expected_hidden_size(input, batch_sizes)

    def _recur(self, gates: Tensor, h0: Tensor | None, **layout: Any) -> _Pair:
        return ops.minlstm_fused(gates, h0, self.candidate, self.normalized, **layout)

    def _operator(self) -> tuple[Any, ...]:
        return "minlstm_fused", self.candidate, self.normalized
