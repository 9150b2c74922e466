"""MinGRU and MinLSTM: the layers that stand in for torch.nn.GRU and torch.nn.LSTM."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from minrnn import ops
from minrnn.ops.checks import check_candidate, check_shape, check_tensor


class _MinimalRNN(nn.Module):
    """What both layers share: one fused projection, one operator, a down-projection if wanted."""

    num_gates: int

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        *,
        bias: bool,
        batch_first: bool,
        proj_size: int,
        candidate: str,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        for name, size in {"input_size": input_size, "hidden_size": hidden_size}.items():
            if size < 1:
                raise ValueError(f"`{name}` must be >= 1, got {size}")
        if proj_size < 0:
            raise ValueError(f"`proj_size` must be >= 0, got {proj_size}")
        check_candidate(candidate)
        self.input_size, self.hidden_size, self.proj_size = input_size, hidden_size, proj_size
        self.bias, self.batch_first, self.candidate = bias, batch_first, candidate
        rows = self.num_gates * hidden_size

        def weight(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(*shape, device=device, dtype=dtype))

        self.weight_ih_l0 = weight(rows, input_size)
        self.bias_ih_l0 = weight(rows) if bias else None
        self.weight_hr_l0 = weight(proj_size, hidden_size) if proj_size else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw each weight uniformly within 1 / sqrt(its fan-in); the fused bias likewise."""
        nn.init.uniform_(self.weight_ih_l0, *_bounds(self.input_size))
        if self.bias_ih_l0 is not None:
            nn.init.uniform_(self.bias_ih_l0, *_bounds(self.input_size))
        if self.weight_hr_l0 is not None:
            nn.init.uniform_(self.weight_hr_l0, *_bounds(self.hidden_size))

    def extra_repr(self) -> str:
        text = f"{self.input_size}, {self.hidden_size}"
        for name, default in (("bias", True), ("batch_first", False), ("proj_size", 0)):
            if getattr(self, name) != default:
                text += f", {name}={getattr(self, name)}"
        return text if self.candidate == "g" else f"{text}, candidate={self.candidate!r}"

    def _recur(
        self, gates: Tensor, h0: Tensor | None, reset: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The operator over the fused pre-activations (B, T, num_gates * hidden_size)."""
        raise NotImplementedError

    def _run(self, input: Tensor, hx: Tensor | None, reset: Tensor | None) -> tuple[Tensor, Tensor]:
        self._check(input, hx, reset)
        x = input if self.batch_first else input.transpose(0, 1)
        gates = F.linear(x, self.weight_ih_l0, self.bias_ih_l0)
        if reset is not None and not self.batch_first:
            reset = reset.transpose(0, 1)
        h, h_T = self._recur(gates, None if hx is None else hx[0], reset)
        output = h if self.weight_hr_l0 is None else F.linear(h, self.weight_hr_l0)
        return (output if self.batch_first else output.transpose(0, 1)), h_T[None]

    def _check(self, input: Tensor, hx: Tensor | None, reset: Tensor | None) -> None:
        check_tensor("input", input)
        symbols = "(B, T, input_size)" if self.batch_first else "(T, B, input_size)"
        if input.dim() != 3:
            raise ValueError(f"`input` must have shape {symbols}, got {tuple(input.shape)}")
        if input.shape[2] != self.input_size:
            raise ValueError(
                f"`input` must have shape {symbols} with input_size = {self.input_size}, "
                f"got {tuple(input.shape)}"
            )
        if hx is not None:
            check_tensor("hx", hx)
            B = input.shape[0 if self.batch_first else 1]
            check_shape("hx", hx, "(1, B, hidden_size)", (1, B, self.hidden_size))
        if reset is not None:
            check_tensor("reset", reset)
            symbols = "(B, T)" if self.batch_first else "(T, B)"
            check_shape("reset", reset, symbols, tuple(input.shape[:2]))


class MinGRU(_MinimalRNN):
    """A minGRU layer with the shapes of `torch.nn.GRU`.

        k, v = split(W x_t + bias)
        h_t from `minrnn.mingru`
        y_t = h_t, or P h_t with `proj_size`

    Feng et al. 2024, arXiv:2410.01201, section 3.1. Weights: `weight_ih_l0`
    (2 * hidden_size, input_size) and `bias_ih_l0`, the rows of k above those of v;
    `weight_hr_l0` (proj_size, hidden_size) is P.

    Args:
        input_size: features of x.
        hidden_size: channels of the state, D.
        bias: learn a bias for k and v.
        batch_first: x and y are (B, T, ...) instead of (T, B, ...). The state is not affected.
        proj_size: features of y after a down-projection; 0 for none. The state keeps hidden_size.
        candidate: "g", "identity" or "tanh", as in `minrnn.mingru`.
        device, dtype: of the weights.

    Raises:
        ValueError: a size is out of range or `candidate` is unknown; on a call, a shape does not
            fit.

    Example:
        >>> gru = MinGRU(8, 16, batch_first=True)
        >>> x = torch.randn(3, 10, 8)
        >>> y, h_n = gru(x)
        >>> y.shape, h_n.shape
        (torch.Size([3, 10, 16]), torch.Size([1, 3, 16]))
        >>> _, half = gru(x[:, :4])                     # the same in two pieces
        >>> torch.allclose(gru(x[:, 4:], half)[1], h_n, atol=1e-6)
        True
    """

    num_gates = 2

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        *,
        bias: bool = True,
        batch_first: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        proj_size: int = 0,
        candidate: str = "g",
    ) -> None:
        super().__init__(
            input_size,
            hidden_size,
            bias=bias,
            batch_first=batch_first,
            proj_size=proj_size,
            candidate=candidate,
            device=device,
            dtype=dtype,
        )

    def forward(
        self, input: Tensor, hx: Tensor | None = None, *, reset: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Run over T >= 0 steps, from `hx` or from zeros.

        Args:
            input: (T, B, input_size), or (B, T, input_size) if `batch_first`.
            hx: (1, B, hidden_size), the state before the first step.
            reset: (T, B) bool, or (B, T) if `batch_first`: True lets a step start from zeros.

        Returns:
            output: (T, B, hidden_size) or (T, B, proj_size); (B, T, ...) if `batch_first`.
            h_n: (1, B, hidden_size), float32 (float64 for float64), the last state.
        """
        return self._run(input, hx, reset)

    def _recur(
        self, gates: Tensor, h0: Tensor | None, reset: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        return ops.mingru_fused(gates, h0, self.candidate, reset)


class MinLSTM(_MinimalRNN):
    """A minLSTM layer with the shapes of `torch.nn.LSTM`.

        f, i, v = split(W x_t + bias)
        h_t from `minrnn.minlstm`
        y_t = h_t, or P h_t with `proj_size`

    Feng et al. 2024, arXiv:2410.01201, section 3.2. There is no output gate, so the cell is the
    state: h = c. Weights as in `MinGRU`, with three groups of rows: f, i, v.

    Args:
        input_size: features of x.
        hidden_size: channels of the state, D.
        bias: learn a bias for f, i and v.
        batch_first: x and y are (B, T, ...) instead of (T, B, ...). The state is not affected.
        proj_size: features of y after a down-projection; 0 for none. The state keeps hidden_size.
        candidate: "g", "identity" or "tanh", as in `minrnn.mingru`.
        normalized: divide both gates by their sum, as in `minrnn.minlstm`.
        forget_bias: added to the forget gate's bias at the start; > 0 remembers longer.
        device, dtype: of the weights.

    Raises:
        ValueError: a size is out of range, `candidate` is unknown, or `forget_bias` is given
            without a bias; on a call, a shape does not fit.

    Example:
        >>> lstm = MinLSTM(8, 16)
        >>> y, (h_n, c_n) = lstm(torch.randn(10, 3, 8))
        >>> y.shape, h_n is c_n
        (torch.Size([10, 3, 16]), True)
    """

    num_gates = 3

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        *,
        bias: bool = True,
        batch_first: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        proj_size: int = 0,
        candidate: str = "g",
        normalized: bool = True,
        forget_bias: float = 0.0,
    ) -> None:
        if forget_bias and not bias:
            raise ValueError(f"`forget_bias` = {forget_bias} needs `bias` = True, got False")
        self.normalized, self.forget_bias = normalized, forget_bias
        super().__init__(
            input_size,
            hidden_size,
            bias=bias,
            batch_first=batch_first,
            proj_size=proj_size,
            candidate=candidate,
            device=device,
            dtype=dtype,
        )

    def reset_parameters(self) -> None:
        """As in `MinGRU`; `forget_bias` is then added to the rows of f."""
        super().reset_parameters()
        if self.bias_ih_l0 is not None:
            with torch.no_grad():
                self.bias_ih_l0[: self.hidden_size] += self.forget_bias

    def extra_repr(self) -> str:
        text = super().extra_repr()
        text += "" if self.normalized else ", normalized=False"
        return text + (f", forget_bias={self.forget_bias}" if self.forget_bias else "")

    def forward(
        self,
        input: Tensor,
        hx: Tensor | tuple[Tensor, Tensor] | None = None,
        *,
        reset: Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Run over T >= 0 steps, from `hx` or from zeros.

        Args:
            input: (T, B, input_size), or (B, T, input_size) if `batch_first`.
            hx: (1, B, hidden_size), the state before the first step; of a pair (h_0, c_0), as
                `nn.LSTM` takes it, c_0 is used.
            reset: (T, B) bool, or (B, T) if `batch_first`: True lets a step start from zeros.

        Returns:
            output: (T, B, hidden_size) or (T, B, proj_size); (B, T, ...) if `batch_first`.
            (h_n, c_n): the last state (1, B, hidden_size), float32 (float64 for float64), twice
                the same tensor.
        """
        if isinstance(hx, (tuple, list)):
            if len(hx) != 2:
                raise ValueError(
                    f"`hx` must be a tensor or the pair (h_0, c_0), got {len(hx)} parts"
                )
            hx = hx[1]
        output, h_n = self._run(input, hx, reset)
        return output, (h_n, h_n)

    def _recur(
        self, gates: Tensor, h0: Tensor | None, reset: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        return ops.minlstm_fused(gates, h0, self.candidate, self.normalized, reset)


def _bounds(fan_in: int) -> tuple[float, float]:
    bound = 1 / math.sqrt(fan_in)
    return -bound, bound
