"""Models with an adapter of PEFT: their names of weights, and the model without it."""

import copy
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.utils.import_utils import is_peft_available

from minrnn.checkpoint import ADAPTER_CONFIG
from minrnn.models import LanguageModel, ModelConfig

if TYPE_CHECKING:
    from minrnn.hf.model import MinRNNForCausalLM

# modules of PEFT around one of the model hold it by these names
_WRAPPED = ("base_layer", "original_module")


def plain_name(name: str) -> str:
    """The name that a weight of the model has without an adapter."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPED)


def check_weights(tensors: Mapping[str, Tensor], config: ModelConfig, adapted: bool) -> None:
    """Check that `tensors` are all that a model of `config` has.

    Args:
        tensors: by name.
        config: the shape of the model.
        adapted: the model has an adapter, whose tensors are allowed beside its own.

    Raises:
        ValueError: a tensor is missing, has another shape, or is not the model's.
    """
    with torch.device("meta"):
        expected = {name: x.shape for name, x in LanguageModel(config).state_dict().items()}
    found = {plain_name(name) if adapted else name: x.shape for name, x in tensors.items()}
    extra: Iterable[str] = [] if adapted else sorted(found.keys() - expected.keys())
    for name in [*expected, *extra]:
        if expected.get(name) != found.get(name):
            sizes = [None if x is None else tuple(x) for x in (expected.get(name), found.get(name))]
            raise ValueError(
                f"`state_dict` must have the weights of the configuration: {name} must have shape "
                f"{sizes[0]}, got {sizes[1]}; of a model inside a PeftModel save the PeftModel, or "
                "merge_and_unload() it first"
            )


def add_saved(
    model: "MinRNNForCausalLM", folder: Path, tensors: Mapping[str, Tensor], saved_name: str
) -> None:
    """Add the adapter of `folder` to the model that it was saved with.

    Args:
        model: with its own weights.
        folder: holds the adapter's configuration.
        tensors: the weights of both, by the names that they have in a model with the adapter.
        saved_name: the adapter.

    Raises:
        ValueError: a tensor of the adapter is missing.
    """
    from peft import PeftConfig

    options = PeftConfig.from_pretrained(str(folder))
    # `add_adapter` writes this back into the adapter's configuration
    model.name_or_path = model.config.name_or_path = options.base_model_name_or_path or ""
    model.add_adapter(options, saved_name)
    names = model.state_dict().keys()
    missing = sorted(names - tensors.keys())
    if missing:
        raise ValueError(f"{folder} does not fit its {ADAPTER_CONFIG}: it lacks {missing[0]}")
    # other adapters of the model were saved too, without their configurations
    model.load_state_dict({name: tensors[name] for name in names})
    model.eval()


def require_peft(folder: Path) -> None:
    """Check that PEFT is installed, without which an adapter would be left out.

    Raises:
        ImportError: it is not.
    """
    if not is_peft_available():
        raise ImportError(f"{folder} holds an adapter: pip install 'minrnn[peft]'")


def merged(model: "MinRNNForCausalLM") -> "MinRNNForCausalLM":
    """A copy of `model` whose weights have its active adapter added."""
    from peft import get_peft_model

    name = model.active_adapters()[0]
    base: Any = type(model)(copy.deepcopy(model.config))
    base.to(model.device, model.dtype)
    base.generation_config = copy.deepcopy(model.generation_config)
    options: Any = copy.deepcopy(model.peft_config[name])
    options.base_model_name_or_path = None
    wrapped = get_peft_model(base, options, adapter_name=name)
    # a PeftModel holds the model under this name
    weights = {f"base_model.model.{key}": x for key, x in model.state_dict().items()}
    wrapped.load_state_dict({key: weights[key] for key in wrapped.state_dict()})
    return wrapped.merge_and_unload().train(model.training)
