"""The configuration of a model as transformers keeps it: that of a run, and what goes around it."""

import dataclasses
from typing import Any

from transformers import PretrainedConfig

from minrnn.checkpoint import FORMAT
from minrnn.models import ModelConfig

_MODEL = [field.name for field in dataclasses.fields(ModelConfig)]
# what the config.json of a run says of its training, which a model that is saved anew has left
_OF_A_TRAINING = ("text", "split", "tokens_sha256")


class MinRNNConfig(PretrainedConfig):
    """What `MinRNNForCausalLM` is made from; its config.json is that of a run folder.

    Args:
        model: fields of `minrnn.ModelConfig`; each can also be given by its own name.
        tokenizer: what `to_json` of a tokenizer of minrnn gives; None if there is none.
        tie_word_embeddings: let the head have the weights of the embedding.

    Raises:
        ValueError: a field is out of range, or the run is of a decision model.
        TypeError: a field is unknown or has another type.

    Example:
        >>> config = MinRNNConfig(vocab_size=65, width=32, mixer="minlstm")
        >>> config.vocab_size, config.model["mixer"], config.model["num_layers"]
        (65, 'minlstm', 3)
    """

    model_type = "minrnn"
    keys_to_ignore_at_inference = ["past_key_values"]

    format: str = FORMAT
    model: dict[str, Any] | None = None
    tokenizer: dict[str, Any] | None = None
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        if "decision_model" in kwargs:
            raise ValueError("the run must be of a language model, its config.json has no `model`")
        given = {name: kwargs.pop(name) for name in _MODEL if name in kwargs}
        # checked, and what an older version left out filled in
        fields = ModelConfig(**{**(self.model or {}), **given})
        self.model = dataclasses.asdict(fields)
        for name in _OF_A_TRAINING:
            kwargs.pop(name, None)
        super().__post_init__(**kwargs)

    @property
    def model_config(self) -> ModelConfig:
        """The shape of the model."""
        return ModelConfig(**(self.model or {}))

    @property
    def vocab_size(self) -> int:
        """Symbols, V."""
        return self.model_config.vocab_size

    @vocab_size.setter
    def vocab_size(self, size: int) -> None:
        self.model = {**(self.model or {}), "vocab_size": size}

    @property
    def hidden_size(self) -> int:
        """Features of the residual stream."""
        return self.model_config.width

    @property
    def num_hidden_layers(self) -> int:
        """Blocks."""
        return self.model_config.num_layers
