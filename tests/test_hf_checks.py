"""What `minrnn.hf` shares with the core: rows of states, dtypes of saved weights."""

import pytest
import torch

from minrnn.hf.cache import Part, StateCache
from minrnn.state import State


def test_hf_cache_selects_rows_as_a_state_does() -> None:
    ends = torch.tensor([[0, 0], [2, 0]])
    parts = [([1], State({"h": torch.ones(1, 1)})), ([0, 2], State({"h": ends}))]
    made = StateCache([Part(*part) for part in parts], 4)
    mask = made.select(torch.tensor([True, False, True]))
    assert mask.state.tensor("h").tolist() == [[0, 0], [2, 0]]
    with pytest.raises(ValueError, match=r"`rows` must be in \[0, B\) = \[0, 3\), got -1"):
        made.select(torch.tensor([0, -1]))
