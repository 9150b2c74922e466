"""Small models for transformers, and the ones of ours that they must equal."""

from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM

import minrnn
from minrnn import Characters, LanguageModel, ModelConfig
from minrnn.hf import MinRNNConfig, MinRNNForCausalLM, MinRNNTokenizer

LETTERS = Characters("abcdefgh \n")
FAST = MinRNNTokenizer(LETTERS)
# of several lengths, two of them the same
PROMPTS = ["abc", "h", "gfedcba cab", "ccc"]
# mixers whose state holds every step
GROWING = ("attention", "hyena", "mamba-hyena")


def language_model(mixer: str = "mingru", **fields: object) -> LanguageModel:
    """Untrained, with larger weights than it would have: its texts vary with all before."""
    sizes = {"width": 16, "num_layers": 2, "num_heads": 2, "state_size": 4, "dropout": 0.0}
    made = LanguageModel(ModelConfig(10, mixer=mixer, **{**sizes, **fields})).eval()
    nn.init.normal_(made.embedding.weight)
    nn.init.normal_(made.head.weight)
    with torch.no_grad():
        for linear in (part for part in made.blocks.modules() if isinstance(part, nn.Linear)):
            linear.weight *= 5.0
    return made


def for_transformers(ours: LanguageModel) -> MinRNNForCausalLM:
    """The same, made from its configuration and weights."""
    model = MinRNNForCausalLM(MinRNNConfig(model=vars(ours.config))).eval()
    model.load_state_dict(ours.state_dict())
    return model


def opened(folder: Path, ours: LanguageModel) -> MinRNNForCausalLM:
    """`ours` as the Auto class opens its folder."""
    minrnn.save(folder, ours, LETTERS)
    return AutoModelForCausalLM.from_pretrained(folder)


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    """Names and values are equal, bit for bit."""
    names = first.keys() == second.keys()
    return names and all(x.equal(second[name]) for name, x in first.items())
