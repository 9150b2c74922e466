"""What code written for `torch.nn.RNNBase` reads of a layer and calls on it, besides the layer."""

from typing import Any

from torch import Tensor, nn

from minrnn.layers.checks import SizeError, check_input

_Sizes = tuple[int, int, int]


class RNNBaseInterface(nn.Module):
    """The attributes and methods of `nn.RNNBase`, over the weights that there are.

    No weight multiplies the state, so there is none called `weight_hh_ln` or `bias_hh_ln`.
    """

    mode: str
    """"GRU" or "LSTM": whose interface the layer has, a state or a pair of them"""
    input_size: int
    hidden_size: int
    num_layers: int
    bias: bool
    batch_first: bool
    bidirectional: bool
    proj_size: int
    weight_ih_l0: nn.Parameter

    @property
    def _num_directions(self) -> int:
        return 2 if self.bidirectional else 1

    def _suffixes(self) -> list[str]:
        """Of the weights, in the order of the states: layer by layer, forward before reverse."""
        ends = ("", "_reverse")[: self._num_directions]
        return [f"_l{layer}{end}" for layer in range(self.num_layers) for end in ends]

    @property
    def _all_weights(self) -> list[list[str]]:
        """The weights' names, a list for each layer and direction."""
        names = ["weight_ih", *["bias_ih"] * self.bias, *["weight_hr"] * bool(self.proj_size)]
        return [[f"{name}{suffix}" for name in names] for suffix in self._suffixes()]

    @property
    def all_weights(self) -> list[list[nn.Parameter]]:
        """The weights, a list for each layer and direction: weight_ih, bias_ih, weight_hr.

        The bias is there with `bias`, the projection with `proj_size`.
        """
        return [[getattr(self, name) for name in names] for names in self._all_weights]

    @property
    def _flat_weights_names(self) -> list[str]:
        return [name for names in self._all_weights for name in names]

    @property
    def _flat_weights(self) -> list[nn.Parameter]:
        return [weight for weights in self.all_weights for weight in weights]

    def flatten_parameters(self) -> None:
        """Do nothing: torch.nn.GRU has this for cuDNN, and code written for it calls it."""

    def get_expected_hidden_size(self, input: Tensor, batch_sizes: Tensor | None) -> _Sizes:
        """The shape of `hx` for a batch: (num_layers * directions, B, hidden_size)."""
        if batch_sizes is not None:
            B = int(batch_sizes[0])
        else:
            B = input.shape[0 if self.batch_first else 1]
        return self.num_layers * self._num_directions, B, self.hidden_size

    def check_input(self, input: Tensor, batch_sizes: Tensor | None) -> None:
        """Raise what a call raises for an input that does not fit."""
        dims = 3 if batch_sizes is None else 2
        if input.dim() != dims:
            shape = tuple(input.shape)
            raise SizeError(f"`input` must have {dims} dimensions, got shape {shape}")
        sizes = "S" if batch_sizes is not None else "B, T" if self.batch_first else "T, B"
        check_input(input, self.weight_ih_l0, f"({sizes}, input_size)")

    def check_hidden_size(
        self,
        hx: Tensor,
        expected_hidden_size: _Sizes,
        msg: str = "`hx` must have shape {}, got {}",
    ) -> None:
        """Raise a RuntimeError for a state of another shape."""
        if tuple(hx.shape) != tuple(expected_hidden_size):
            raise SizeError(msg.format(tuple(expected_hidden_size), tuple(hx.shape)))

    def check_forward_args(self, input: Tensor, hidden: Any, batch_sizes: Tensor | None) -> None:
        """Check the input of a batch and its state, or both states of the pair."""
        self.check_input(input, batch_sizes)
        expected = self.get_expected_hidden_size(input, batch_sizes)
        for hx in hidden if isinstance(hidden, (tuple, list)) else (hidden,):
            self.check_hidden_size(hx, expected)

    def permute_hidden(self, hx: Any, permutation: Tensor | None) -> Any:
        """The states of the sequences `permutation`, of a state or a pair."""
        if permutation is None:
            return hx
        if isinstance(hx, (tuple, list)):
            return tuple(x.index_select(1, permutation) for x in hx)
        return hx.index_select(1, permutation)
