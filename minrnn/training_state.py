"""What a training needs to go on: weights, optimizer moments and carried states, as tensors.

They are written whole, whatever the number of processes and however they share the parameters,
so that a training can be gone on with by any number of them.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from minrnn import checkpoint
from minrnn.ranks import Ranks
from minrnn.state import State


def take(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    carried: Sequence[State | None],
    ranks: Ranks,
) -> dict[str, Tensor]:
    """All tensors by name, the same on every process; every process must call it."""
    tensors = {f"model.{name}": x for name, x in weights(model).items()}
    for name, parameter in model.named_parameters():
        for moment, x in optimizer.state[parameter].items():
            tensors[f"optimizer.{name}.{moment}"] = whole(x)
    for number, state in enumerate(carried):
        if state is not None:
            for name, x in state.flatten().items():
                tensors[f"carried.{number}.{name}"] = ranks.all_rows(x)
    return tensors


def weights(model: nn.Module) -> dict[str, Tensor]:
    """The weights by name, whole; every process must call it."""
    return {name: whole(x) for name, x in model.state_dict().items()}


def put(
    tensors: Mapping[str, Tensor],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    ranks: Ranks,
    path: Path,
) -> dict[int, State]:
    """Put what `take` gave into a model and its optimizer; the carried states by number.

    Raises:
        ValueError: `tensors`, read from `path`, are not of this model.
    """
    saved = under("model.", tensors)
    own = model.state_dict()
    like = {n: _like(x, own[n]) if n in own else x for n, x in saved.items()}
    checkpoint.load_weights(model, like, path)
    for name, parameter in model.named_parameters():
        moments = under(f"optimizer.{name}.", tensors)
        optimizer.state[parameter] = {
            # the number of updates is kept on the CPU
            moment: x if moment == "step" else _like(x, parameter)
            for moment, x in moments.items()
        }
    device = next(model.parameters()).device
    carried = State.unflatten(found) if (found := under("carried.", tensors)) else {}
    states = ((int(number), state) for number, state in carried.items())
    return {
        number: state.map(lambda x: x[ranks.rows(x.shape[0])].to(device))
        for number, state in states
        if isinstance(state, State)
    }


def under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose names begin with `prefix`, without it."""
    return {n.removeprefix(prefix): x for n, x in tensors.items() if n.startswith(prefix)}


def whole(x: Tensor) -> Tensor:
    """`x`, put together from the parts that processes have of it."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def _like(x: Tensor, model: Tensor) -> Tensor:
    """`x` on the device of `model`, and shared by processes as it is."""
    x = x.to(model.device)
    if not isinstance(model, DTensor) or x.shape != model.shape:
        return x
    return distribute_tensor(x, model.device_mesh, model.placements)
