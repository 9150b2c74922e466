"""The plain model inside torch's wrappers, and the check that its configuration describes it."""

from collections import defaultdict
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from minrnn.decision import DecisionModel
from minrnn.models import LanguageModel

Plain = LanguageModel | DecisionModel
# what torch.compile keeps a module under, and puts before the names of its weights
_COMPILED = "_orig_mod"
# attributes that a call reads and that somebody may have set since
_OPTIONS = ("candidate", "normalized", "eps")


def plain_model(model: nn.Module) -> Plain:
    """Return the model inside the wrappers of torch.compile, DataParallel and DDP.

    Args:
        model: a `LanguageModel` or `DecisionModel`, or a wrapper around one.

    Raises:
        TypeError: it is a model of another class, e.g. of transformers or peft.
    """
    inner = model
    while not isinstance(inner, Plain):
        found = getattr(inner, _COMPILED, None)
        if isinstance(inner, nn.DataParallel | nn.parallel.DistributedDataParallel):
            found = inner.module
        if not isinstance(found, nn.Module):
            raise TypeError(
                "`model` must be a LanguageModel or DecisionModel, or torch's wrapper of one, got "
                f"{type(model).__name__}{_remedy(inner)}"
            )
        inner = found
    return inner


def _remedy(model: nn.Module) -> str:
    if hasattr(model, "merge_and_unload"):
        return "; merge its adapters first: model.merge_and_unload()"
    if hasattr(model, "save_pretrained"):
        return "; model.save_pretrained(folder) writes what `minrnn.load` opens"
    return ""


def plain_weights(model: Plain) -> dict[str, Tensor]:
    """Return the weights by the names that they have in a model without wrappers.

    Raises:
        ValueError: a model of the same configuration has other parts or weights, or the weights
            are on several processes or on no device.
    """
    kind = LanguageModel if isinstance(model, LanguageModel) else DecisionModel
    if type(model).forward is not kind.forward:
        raise ValueError(f"`model` must compute what {kind.__name__} does, its forward is another")
    weights = {_plain_name(name): x for name, x in model.state_dict().items()}
    for name, x in weights.items():
        if hasattr(x, "device_mesh"):
            raise ValueError(
                f"`model` must be whole in this process, {name} is sharded: gather it into a model "
                "of the same configuration by torch.distributed.checkpoint.state_dict"
            )
        if isinstance(x, Tensor) and x.device.type == "meta":
            raise ValueError(f"`model` must have weights, {name} is on the device meta")
    with torch.device("meta"):
        expected = kind(model.config)  # pyright: ignore[reportArgumentType]
    _check_same(dict(_facts(expected)), dict(_facts(model)))
    return weights


def _facts(model: nn.Module) -> Iterator[tuple[str, object]]:
    """The shape of each weight; the class of each part that has weights, and what it computes."""
    for name, x in model.state_dict().items():
        # quantized parts keep other things there
        yield _plain_name(name), tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
    for name, module in model.named_modules(remove_duplicate=False):
        inner = getattr(module, _COMPILED, module)
        if name and next(module.parameters(), None) is not None:
            name = _plain_name(name).removesuffix(f".{_COMPILED}")
            yield name, type(inner).__name__
            yield from (
                (f"{name}.{key}", vars(inner)[key]) for key in _OPTIONS if key in vars(inner)
            )


def _check_same(expected: dict[str, object], found: dict[str, object]) -> None:
    if expected == found:
        return
    name = next(n for n in expected | found if expected.get(n) != found.get(n))
    raise ValueError(
        "`model` must be as its configuration says, or nothing opens what is saved: "
        f"{name} must be {expected.get(name, 'absent')}, got {found.get(name, 'nothing')}"
    )


def _plain_name(name: str) -> str:
    # parts of a model may be compiled by themselves
    return name.replace(f"{_COMPILED}.", "")


def tied_weights(model: nn.Module) -> list[list[str]]:
    """Return the names of each weight that has several."""
    names: defaultdict[int, list[str]] = defaultdict(list)
    for name, x in model.named_parameters(remove_duplicate=False):
        names[id(x)].append(_plain_name(name))
    return [same for same in names.values() if len(same) > 1]


def tie_weights(model: nn.Module, tied: list[list[str]]) -> None:
    """Make one weight of those that `tied_weights` named together."""
    for first, *others in tied:
        weight = model.get_parameter(first)
        for name in others:
            module, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(module), leaf, weight)


@torch.no_grad()
def match_dtypes(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Give each weight and buffer of `model` the dtype of the tensor of its name."""
    own = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name, x in own.items():
        if name in tensors:
            x.data = x.data.to(tensors[name].dtype)
