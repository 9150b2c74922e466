"""What a training needs to continue: weights, optimizer moments and carried states, as tensors.

    last.safetensors      tensors that every process has whole, and the notes; the save takes
                          effect when this file is renamed into place
    shards-STEP/          parameters and moments that the processes share (FSDP2): each writes its
                          own parts by `torch.distributed.checkpoint`, in files of safetensors

No process gathers more than one parameter at a time. A save is of whole tensors whatever the number
of processes, so that any number of them can continue from it, sharing them or not.
"""

import hashlib
import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import (
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.tensor import DTensor, distribute_tensor

from minrnn import checkpoint, ranks
from minrnn.ranks import Ranks
from minrnn.state import State

FILE = "last.safetensors"
_SHARDS = "shards-"
# a process writes about this many files, each of which is held twice while it is written
_FILES, _LEAST = 16, 1 << 24


class Training(NamedTuple):
    """What is saved, and restored in place."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    ranks: Ranks


def save(
    folder: Path,
    training: Training,
    carried: Sequence[State | None],
    notes: Callable[[], Mapping[str, Any]],
    step: int,
) -> None:
    """Write a save of `step` to `folder`; every process must call it.

    Args:
        folder: of the training state.
        training: what is saved.
        carried: the states after the last batch, one for each micro-batch.
        notes: called on the first process, right before the file that makes the save count.
        step: how many updates were done.

    Raises:
        SaveError: the disk is full, or cannot be written to; the save before still counts.
    """
    tensors = _tensors(training)
    shared = {name: x for name, x in tensors.items() if isinstance(x, DTensor)}
    own = {name: x for name, x in tensors.items() if name not in shared}
    # one parameter with two names is written once
    tied = {name: first for name, first in _tied(training.model).items() if name in shared}
    shared = {name: x for name, x in shared.items() if name not in tied}
    for number, state in enumerate(carried):
        if state is not None:
            for name, x in state.flatten().items():
                own[f"carried.{number}.{name}"] = training.ranks.all_rows(x)
    shards = folder / f"{_SHARDS}{step:08}"
    written = _write_shards(shards, shared, training.ranks) if shared else None

    def write() -> None:
        kept = dict(notes())
        if written is not None:
            kept["shards"] = {"folder": shards.name, "sha256": written, "tied": tied}
        checkpoint.write_tensors(folder / FILE, own, kept)
        _remove_shards(folder, shards.name if shared else None)

    ranks.on_first(write)


def save_weights(folder: Path, model: nn.Module, step: int) -> None:
    """Write the weights of the run `folder`, whole; every process must call it.

    The first process has one parameter of others at a time.
    """
    tensors = model.state_dict()
    waiting = [tensors[name] for name in sorted(tensors)]

    def next_whole(x: Tensor) -> Tensor:
        assert waiting.pop(0) is x
        return whole(x)

    def gather_rest() -> None:
        while waiting:
            next_whole(waiting[0])

    def write() -> None:
        try:
            checkpoint.save_weights(folder, tensors, step, next_whole)
        finally:
            # a disk that is full must not leave the others waiting
            gather_rest()

    if not ranks.is_first():
        gather_rest()
    ranks.on_first(write)


def restore(folder: Path, training: Training) -> dict[int, State]:
    """Put a save into a model and its optimizer; the carried states by number.

    Raises:
        ValueError: the save is damaged, or not of this model.
    """
    path = folder / FILE
    tensors, notes = checkpoint.read_tensors(path)
    model, optimizer, among = training
    if "shards" in notes:
        tensors |= _read_shards(folder, notes["shards"], training, path)
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
    ranks.on_first(lambda: _remove_shards(folder, notes.get("shards", {}).get("folder")))
    device = next(model.parameters()).device
    carried = State.unflatten(found) if (found := under("carried.", tensors)) else {}
    states = ((int(number), state) for number, state in carried.items())
    return {
        number: state.map(lambda x: x[among.rows(x.shape[0])].to(device))
        for number, state in states
        if isinstance(state, State)
    }


def under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose names begin with `prefix`, without it."""
    return {n.removeprefix(prefix): x for n, x in tensors.items() if n.startswith(prefix)}


def whole(x: Tensor) -> Tensor:
    """`x`, put together from the parts that processes have of it."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def _tensors(training: Training) -> dict[str, Tensor]:
    tensors = {f"model.{name}": x for name, x in training.model.state_dict().items()}
    for name, parameter in training.model.named_parameters():
        for moment, x in training.optimizer.state[parameter].items():
            tensors[f"optimizer.{name}.{moment}"] = x
    return tensors


def _write_shards(shards: Path, tensors: Mapping[str, Tensor], among: Ranks) -> dict[str, str]:
    """Write this process's parts of `tensors` to a new folder; the digests of all files."""

    def make() -> None:
        shutil.rmtree(shards, ignore_errors=True)
        shards.mkdir()

    ranks.on_first(make)
    files = _files(tensors)
    # this format has no pickle in it, as the default one has
    writer = HuggingFaceStorageWriter(str(shards), files, save_distributed=True)
    try:
        state_dict_saver.save(dict(tensors), storage_writer=writer)
    except CheckpointException as error:
        reasons = sorted({str(failure[0]) for failure in error.failures.values()})
        raise checkpoint.SaveError(
            f"cannot save {shards}: {'; '.join(reasons)}; the save before is whole"
        ) from error
    own = sorted(shards.glob(f"shard-{among.number + 1:05}-*.safetensors"))
    told: list[dict[str, str]] = [{} for _ in range(among.count)]
    dist.all_gather_object(told, {path.name: _sha256(path) for path in own})
    return {name: digest for one in told for name, digest in one.items()}


def _files(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """In which file each of the tensors goes, counted from 1: so that all are about as large."""
    sizes = {name: x.numel() * x.element_size() for name, x in tensors.items()}
    most = max(_LEAST, sum(sizes.values()) // _FILES)
    found: dict[str, int] = {}
    number, held = 1, 0
    for name, size in sizes.items():
        if held and held + size > most:
            number, held = number + 1, 0
        found[name], held = number, held + size
    return found


def _read_shards(
    folder: Path, saved: Mapping[str, Any], training: Training, path: Path
) -> dict[str, Tensor]:
    """The tensors of a folder of shards, each as this process has its parameter."""
    try:
        # a name is no path to somewhere else
        shards, digests = folder / Path(saved["folder"]).name, dict(saved["sha256"])
        tied = dict(saved["tied"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged: {error!r}") from error
    _check(shards, digests, training.ranks)
    reader = HuggingFaceStorageReader(str(shards))
    model = training.model
    like: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    like |= dict(model.named_buffers(remove_duplicate=False))
    found: dict[str, Tensor] = {}
    for name, stored in reader.read_metadata().state_dict_metadata.items():
        kind, _, rest = name.partition(".")
        assert isinstance(stored, TensorStorageMetadata)
        own = like.get(rest if kind == "model" else rest.rpartition(".")[0])
        if own is None or own.shape != stored.size:
            raise ValueError(
                f"{shards} does not fit its configuration: {name} must have shape "
                f"{'none' if own is None else tuple(own.shape)}, got {tuple(stored.size)}"
            )
        found[name] = torch.empty_like(own, requires_grad=False)
    with warnings.catch_warnings():
        # that this is one process
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        state_dict_loader.load(found, storage_reader=reader, no_dist=training.ranks.count == 1)
    return found | {name: found[first] for name, first in tied.items() if first in found}


def _tied(model: nn.Module) -> dict[str, str]:
    """The further names of parameters that have several, and the first of each."""
    firsts: dict[int, str] = {}
    found: dict[str, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        first = firsts.setdefault(id(parameter), name)
        if first != name:
            found[f"model.{name}"] = f"model.{first}"
    return found


def _check(shards: Path, digests: Mapping[str, str], among: Ranks) -> None:
    """Each file is as it was written; the processes share them."""
    names = sorted(digests)
    there = sorted(path.name for path in shards.glob("*.safetensors"))
    if there != names:
        raise ValueError(f"{shards} is damaged: it must have the files {names}, got {there}")
    bad = [0.0] * len(names)
    for number in range(among.number, len(names), among.count):
        bad[number] = float(_sha256(shards / names[number]) != digests[names[number]])
    for name, is_bad in zip(names, among.sums(*bad), strict=True):
        if is_bad:
            raise ValueError(f"{shards / name} is damaged: its content does not fit its checksum")


def _remove_shards(folder: Path, kept: str | None) -> None:
    """Delete the shards of other saves than the one that counts."""
    for path in folder.glob(f"{_SHARDS}*"):
        if path.name != kept:
            shutil.rmtree(path, ignore_errors=True)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def _like(x: Tensor, model: Tensor) -> Tensor:
    """`x` on the device of `model`, and shared by processes as it is."""
    x = x.to(model.device)
    if not isinstance(model, DTensor) or x.shape != model.shape or isinstance(x, DTensor):
        return x
    return distribute_tensor(x, model.device_mesh, model.placements)
