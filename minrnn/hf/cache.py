"""What `generate` hands from one step to the next: the State of each row of a batch."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from minrnn.state import State, row_numbers


class Part(NamedTuple):
    """Rows of a batch whose states are of one shape."""

    rows: list[int]
    state: State


class StateCache:
    """The states of the rows of a batch, in the place of transformers' cache of keys and values.

    Where a state has a fixed size there is one part, and its memory does not grow. Attention's and
    Hyena's hold every step: rows that were padded differently have states of different lengths,
    and are parts of their own.

    Args:
        parts: each row of the batch once; those of one shape become one.
        length: steps that the batch has read, padding included.
    """

    # asked for by `generate`
    is_compileable = False
    is_croppable = False

    def __init__(self, parts: Sequence[Part], length: int) -> None:
        alike: dict[tuple[tuple[str, torch.Size], ...], list[Part]] = {}
        for part in parts:
            shapes = tuple((name, x.shape[1:]) for name, x in part.state.flatten().items())
            alike.setdefault(shapes, []).append(part)
        self.parts = [_joined(group) for group in alike.values()]
        self.length = length

    @property
    def batch_size(self) -> int:
        """The number of rows, B."""
        return sum(len(part.rows) for part in self.parts)

    @property
    def num_bytes(self) -> int:
        """The memory that all states take."""
        return sum(part.state.num_bytes for part in self.parts)

    @property
    def state(self) -> State:
        """The states of all rows, in order.

        Raises:
            ValueError: they are of several shapes.
        """
        if len(self.parts) > 1:
            raise ValueError(f"`state` must be of one shape, the rows have {len(self.parts)}")
        return self.select(range(self.batch_size)).parts[0].state

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Steps that the batch has read, padding included."""
        return self.length

    def select(self, rows: Sequence[int] | Tensor) -> "StateCache":
        """The rows `rows`, in that order: numbers or a mask, as in `State.select`."""
        rows = row_numbers(rows, self.batch_size).tolist()
        parts = []
        for part in self.parts:
            places = {row: place for place, row in enumerate(part.rows)}
            taken = [number for number, row in enumerate(rows) if row in places]
            if taken:
                state = part.state.select([places[rows[number]] for number in taken])
                parts.append(Part(taken, state))
        return StateCache(parts, self.length)


def _joined(group: list[Part]) -> Part:
    if len(group) == 1:
        return group[0]
    rows = [row for part in group for row in part.rows]
    return Part(rows, State.concatenate([part.state for part in group]))
