"""What MinGRU and MinLSTM share: weights, layers, directions, states; shapes of nn.RNNBase."""

import math
import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence

from minrnn import distributed
from minrnn.layers import nested
from minrnn.layers.checks import (
    SizeError,
    check_input,
    check_options,
    check_packed,
    check_placement,
    check_state_kind,
    fx_module_name,
)
from minrnn.layers.packed import EndToEnd, num_sequences
from minrnn.layers.rnn_base import RNNBaseInterface
from minrnn.layers.states import returned, writable
from minrnn.ops.checks import check_candidate, check_tensor


class Stack(RNNBaseInterface):
    """Layers of one recurrence, each one fused projection and one operator for each direction."""

    num_gates: int
    # a state, which decay would pull to zero: see `minrnn.launching.exempt`
    no_weight_decay = ("h_0",)
    # of the first layer; the names of all end in a suffix of _suffixes()
    weight_ih_l0: nn.Parameter
    bias_ih_l0: nn.Parameter | None
    weight_hr_l0: nn.Parameter | None

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
    ) -> None:
        super().__init__()
        self.__module__ = fx_module_name(self)
        sizes = {"input_size": input_size, "hidden_size": hidden_size, "num_layers": num_layers}
        flags = {"bias": bias, "batch_first": batch_first, "bidirectional": bidirectional}
        check_options(sizes, flags | {"learn_h0": learn_h0}, dropout, proj_size)
        check_placement(device, dtype)
        if dropout and num_layers == 1:
            warnings.warn(
                f"`dropout` acts between layers: {dropout} does nothing with `num_layers` = 1",
                # at the line that makes the layer
                stacklevel=2 if type(self).__init__ is Stack.__init__ else 3,
            )
        check_candidate(candidate)
        self.input_size, self.hidden_size, self.num_layers = input_size, hidden_size, num_layers
        self.bias, self.batch_first, self.dropout = bias, batch_first, float(dropout)
        self.bidirectional, self.proj_size, self.candidate = bidirectional, proj_size, candidate
        self.learn_h0 = learn_h0
        # processes that share the time of a sequence: see `minrnn.distributed.split_time`
        self.time_group: dist.ProcessGroup | None = None
        self._build(device, dtype)
        self.reset_parameters()

    def _build(self, device: torch.device | str | None, dtype: torch.dtype | None) -> None:
        def weight(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(*shape, device=device, dtype=dtype))

        out = self.proj_size or self.hidden_size
        for n, suffix in enumerate(self._suffixes()):
            first = n < self._num_directions
            rows, columns = self.num_gates * self.hidden_size, out * self._num_directions
            self.register_parameter(
                f"weight_ih{suffix}", weight(rows, self.input_size if first else columns)
            )
            self.register_parameter(f"bias_ih{suffix}", weight(rows) if self.bias else None)
            projection = weight(self.proj_size, self.hidden_size) if self.proj_size else None
            self.register_parameter(f"weight_hr{suffix}", projection)
        states = self.num_layers * self._num_directions
        self.h_0 = weight(states, self.hidden_size) if self.learn_h0 else None

    def reset_parameters(self) -> None:
        """Draw each weight uniformly within 1 / sqrt(its fan-in), biases likewise; h_0 is zero."""
        for suffix in self._suffixes():
            weight = getattr(self, f"weight_ih{suffix}")
            bias = getattr(self, f"bias_ih{suffix}")
            projection = getattr(self, f"weight_hr{suffix}")
            for parameter in (weight, bias):
                if parameter is not None:
                    nn.init.uniform_(parameter, *bounds(weight.shape[1]))
            if projection is not None:
                nn.init.uniform_(projection, *bounds(self.hidden_size))
        if self.h_0 is not None:
            nn.init.zeros_(self.h_0)

    def extra_repr(self) -> str:
        text = f"{self.input_size}, {self.hidden_size}"
        defaults: dict[str, Any] = {"num_layers": 1, "bias": True, "batch_first": False}
        defaults |= {"dropout": 0.0, "bidirectional": False, "proj_size": 0, "candidate": "g"}
        for name, default in (defaults | {"learn_h0": False}).items():
            if getattr(self, name) != default:
                text += f", {name}={getattr(self, name)!r}"
        return text

    def _recur(
        self,
        gates: Tensor,
        h0: Tensor | None,
        *,
        time_first: bool,
        reset: Tensor | None,
        cu_seqlens: Tensor | None,
        reverse: bool,
    ) -> tuple[Tensor, Tensor]:
        """The operator over the fused pre-activations (..., num_gates * hidden_size)."""
        raise NotImplementedError

    def _recur_split(
        self,
        gates: Tensor,
        h0: Tensor | None,
        *,
        time_first: bool,
        reset: Tensor | None,
        cu_seqlens: Tensor | None,
        reverse: bool,
    ) -> tuple[Tensor, Tensor]:
        """`_recur` over this process's part of the time."""
        assert self.time_group is not None
        # packed inputs are refused
        assert cu_seqlens is None
        name, *options = self._operator()
        return distributed.split(
            name, (gates,), h0, (*options, time_first), reset, reverse, self.time_group
        )

    def _operator(self) -> tuple[Any, ...]:
        """The name of the fused operator, and its options."""
        raise NotImplementedError

    def _run(
        self, input: Tensor | PackedSequence, hx: Tensor | None, reset: Any
    ) -> tuple[Any, Tensor]:
        if isinstance(input, PackedSequence):
            return self._run_packed(input, hx, reset)
        check_tensor("input", input)
        if input.is_nested:
            return self._run_nested(input, hx, reset)
        if input.dim() not in (2, 3):
            raise ValueError(f"`input` must have 2 or 3 dimensions, got shape {tuple(input.shape)}")
        sizes = "T" if input.dim() == 2 else "B, T" if self.batch_first else "T, B"
        weights = self._weights()
        check_input(input, weights[0][0], f"({sizes}, input_size)")
        unbatched, batch_axis = input.dim() == 2, 0 if self.batch_first else 1
        if reset is not None:
            self._check_reset(reset, input.shape[:-1])
        if unbatched:
            # (T, input_size) as a batch of one
            input = input.unsqueeze(batch_axis)
            reset = None if reset is None else reset.unsqueeze(batch_axis)
        h0 = self._first_states(hx, input, input.shape[batch_axis], unbatched)
        y, h_n = self._layers(weights, input, h0, reset, None, not self.batch_first)
        y, h_n = writable(y), returned(h_n, input, hx)
        return (y.squeeze(batch_axis), h_n.squeeze(1)) if unbatched else (y, h_n)

    def _run_packed(
        self, input: PackedSequence, hx: Tensor | None, reset: PackedSequence | None
    ) -> tuple[PackedSequence, Tensor]:
        if self.time_group is not None:
            raise ValueError("`input` must not be packed where processes share its time")
        data, batch_sizes, sorted_indices, unsorted_indices = input
        check_packed(data, batch_sizes)
        weights = self._weights()
        check_input(data, weights[0][0], "(S, input_size)")
        h0 = self._first_states(hx, data, num_sequences(batch_sizes), unbatched=False)
        if hx is not None and h0 is not None and sorted_indices is not None:
            # the longest first, as the steps are
            h0 = h0.index_select(1, sorted_indices)
        layout = EndToEnd.of(batch_sizes, data.device)
        starts = None
        if reset is not None:
            packed = isinstance(reset, PackedSequence) and reset.data.shape == data.shape[:1]
            if not packed or not torch.equal(reset.batch_sizes, batch_sizes):
                raise ValueError("`reset` must be packed like `input`, a bool for each step")
            starts = layout.lay_out(reset.data)
        y, h_n = self._layers(weights, layout.lay_out(data), h0, starts, layout.cu_seqlens, False)
        h_n = returned(h_n, data, hx)
        if unsorted_indices is not None:
            h_n = h_n.index_select(1, unsorted_indices)
        return PackedSequence(layout.pack(y), batch_sizes, sorted_indices, unsorted_indices), h_n

    def _run_nested(self, input: Tensor, hx: Tensor | None, reset: Any) -> tuple[Tensor, Tensor]:
        if self.time_group is not None:
            raise ValueError("`input` must not be nested where processes share its time")
        data, cu_seqlens = nested.end_to_end(input)
        weights = self._weights()
        check_input(data, weights[0][0], "(B, T, input_size)")
        h0 = self._first_states(hx, data, input.shape[0], unbatched=False)
        starts = None if reset is None else nested.resets(reset, cu_seqlens)[None]
        if not len(data):
            # nothing to start
            starts = None
        y, h_n = self._layers(weights, data[None], h0, starts, cu_seqlens, False)
        return nested.nest(writable(y)[0], cu_seqlens), returned(h_n, data, hx)

    def _weights(self) -> list[tuple[Tensor, Tensor | None, Tensor | None]]:
        """Weight, bias and projection of each layer and direction.

        Read once in a call: with a parametrization each reading computes them.
        """
        names = ("weight_ih", "bias_ih", "weight_hr")
        return [
            tuple(getattr(self, f"{name}{suffix}") for name in names) for suffix in self._suffixes()
        ]

    def _layers(
        self,
        weights: list[tuple[Tensor, Tensor | None, Tensor | None]],
        x: Tensor,
        h0: Tensor | None,
        reset: Tensor | None,
        cu_seqlens: Tensor | None,
        time_first: bool,
    ) -> tuple[Tensor, Tensor]:
        """All layers over x (B, T, ...) or (T, B, ...): the last output, and all last states."""
        resets = [reset, None]
        if reset is not None and self.bidirectional:
            resets[1] = self._reset_backwards(reset, cu_seqlens, 0 if time_first else 1)
        recur = self._recur if self.time_group is None else self._recur_split
        states: list[Tensor] = []
        for layer in range(self.num_layers):
            outputs = []
            for direction in range(self._num_directions):
                n = layer * self._num_directions + direction
                weight, bias, projection = weights[n]
                h, h_T = recur(
                    F.linear(x, weight, bias),
                    None if h0 is None else h0[n],
                    time_first=time_first,
                    reset=resets[direction],
                    cu_seqlens=cu_seqlens,
                    reverse=direction == 1,
                )
                outputs.append(h if projection is None else F.linear(h, projection))
                states.append(h_T)
            x = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)
            if self.dropout and layer + 1 < self.num_layers:
                x = F.dropout(x, self.dropout, self.training)
        return x, torch.stack(states)

    def _reset_backwards(self, reset: Tensor, cu_seqlens: Tensor | None, time_axis: int) -> Tensor:
        """Where the reverse direction starts from zeros: at the step before each reset.

        Then nothing passes a border in either direction, and each part is as if it stood alone.
        """
        # slices, which T = 0 leaves empty: a trace keeps no branch
        first, rest = (reset[:1], reset[1:]) if time_axis == 0 else (reset[:, :1], reset[:, 1:])
        after = torch.zeros_like(first)
        if self.time_group is not None and len(first):
            after = distributed.first_of_next(first, self.time_group)
        back = torch.cat([rest, after], dim=time_axis)
        # the step after a sequence's last is not its own
        return back if cu_seqlens is None else back.index_fill(1, cu_seqlens[1:] - 1, 0)

    def _first_states(
        self, hx: Tensor | None, input: Tensor, B: int, unbatched: bool
    ) -> Tensor | None:
        """(num_layers * directions, B, hidden_size), or None for zeros."""
        if hx is None:
            return None if self.h_0 is None else self.h_0[:, None].expand(-1, B, -1)
        check_tensor("hx", hx)
        count = self.num_layers * self._num_directions
        sizes = (count, self.hidden_size) if unbatched else (count, B, self.hidden_size)
        if tuple(hx.shape) != sizes:
            batch = "" if unbatched else "B, "
            symbols = f"(num_layers * directions, {batch}hidden_size)"
            raise SizeError(f"`hx` must have shape {symbols} = {sizes}, got {tuple(hx.shape)}")
        check_state_kind(hx, input)
        return hx.unsqueeze(1) if unbatched else hx

    def _check_reset(self, reset: Any, sizes: torch.Size) -> None:
        check_tensor("reset", reset)
        symbols = "(T,)" if len(sizes) == 1 else "(B, T)" if self.batch_first else "(T, B)"
        if reset.shape != sizes:
            sizes_text = f"{symbols} = {tuple(sizes)}"
            raise ValueError(f"`reset` must have shape {sizes_text}, got {tuple(reset.shape)}")


def bounds(fan_in: int) -> tuple[float, float]:
    """Of the uniform distribution that weights are drawn from."""
    bound = 1 / math.sqrt(fan_in)
    return -bound, bound
