"""What `minrnn.hf` shares with the core: rows of states, dtypes of saved weights."""

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

import minrnn
from minrnn.hf.cache import Part, StateCache
from minrnn.state import State
from tests.hf_models import LETTERS, for_transformers, language_model


def test_hf_cache_selects_rows_as_a_state_does() -> None:
    ends = torch.tensor([[0, 0], [2, 0]])
    parts = [([1], State({"h": torch.ones(1, 1)})), ([0, 2], State({"h": ends}))]
    made = StateCache([Part(*part) for part in parts], 4)
    mask = made.select(torch.tensor([True, False, True]))
    assert mask.state.tensor("h").tolist() == [[0, 0], [2, 0]]
    with pytest.raises(ValueError, match=r"`rows` must be in \[0, B\) = \[0, 3\), got -1"):
        made.select(torch.tensor([0, -1]))


def test_each_weight_keeps_its_dtype(tmp_path) -> None:
    ours = language_model()
    for part in ours.blocks.modules():
        if isinstance(part, nn.Linear):
            part.bfloat16()
    ours.norm.double()
    minrnn.save(tmp_path, ours, LETTERS)
    opened = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    for name, x in ours.state_dict().items():
        assert opened[name].dtype == x.dtype
        assert opened[name].equal(x)
    asked = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float16)
    assert {x.dtype for x in asked.parameters()} == {torch.float16}


def test_a_model_of_transformers_is_not_saved_as_ours(tmp_path) -> None:
    model = for_transformers(language_model())
    with pytest.raises(TypeError, match=r"got MinRNNForCausalLM; model\.save_pretrained\(folder\)"):
        minrnn.save(tmp_path / "run", model)
    assert not (tmp_path / "run").exists()
    model.config.tie_word_embeddings = True
    model.tie_weights()
    model.save_pretrained(tmp_path / "run")
    loaded = minrnn.load(tmp_path / "run").model
    assert loaded.head.weight is loaded.embedding.weight
    assert loaded.head.weight.equal(model.embedding.weight)
