"""Runs on disk: a folder with config.json and weights in safetensors, nothing else that is read.

    config.json                       what was asked for, and what came of it, for people and tools
    model.safetensors                 the weights with the best validation loss, and in the same
                                      file all that `load` needs: the model's shape, the tokenizer
    training_state/last.safetensors   weights, optimizer moments and counters of the last save
    training_state/shards-STEP/       those of them that processes share: a part in each file
    corpus/                           the text as ids
    metrics.jsonl                     one line a measurement
    tensorboard/, loss.png

Every file is written under a temporary name, synced and renamed; tensors carry a checksum. No
pickle is written or read.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize
from torch import Tensor, nn

from minrnn import tensor_files
from minrnn.data import tokenizers
from minrnn.data.tokenizers import Tokenizer
from minrnn.decision import DecisionConfig, DecisionModel
from minrnn.files import replacing, write_atomically
from minrnn.models import LanguageModel, ModelConfig
from minrnn.plain import match_dtypes, plain_model, plain_weights, tie_weights, tied_weights
from minrnn.state import parse_safetensors, read_safetensors

FORMAT = "minrnn.run/1"
WEIGHTS = "model.safetensors"
# of an adapter of PEFT, which lies beside the model that it belongs to or alone
ADAPTER_CONFIG = "adapter_config.json"
_CONFIG = "config.json"
# what opens a language model by `transformers.AutoModelForCausalLM`: see `minrnn.hf`
_FOR_TRANSFORMERS = {"model_type": "minrnn", "architectures": ["MinRNNForCausalLM"]}


class SaveError(OSError):
    """A file of a run could not be written; what stood there before still does."""


class Checkpoint(NamedTuple):
    """A model with what turns text into its symbols, if it was saved with one."""

    model: LanguageModel | DecisionModel
    tokenizer: Tokenizer | None


def save(
    folder: str | os.PathLike[str],
    model: nn.Module,
    tokenizer: Tokenizer | None = None,
) -> None:
    """Write a model as a run folder that `load` opens.

    Args:
        folder: made if missing; a model that is there already is replaced, at once and whole.
        model: a `LanguageModel` or `DecisionModel`, whose configuration and weights are written,
            each weight in its dtype; or one inside torch.compile, DataParallel or DDP.
        tokenizer: of a `LanguageModel`; written too, so that text can be generated.

    Raises:
        SaveError: the folder cannot be written to, or the disk is full.
        ValueError: a training has its run in `folder`, or `load` would not open what is written:
            the model is not the one that its configuration describes (other parts, adapters,
            sharded weights), or the tokenizer has not its `vocab_size`.
        TypeError: the model or the tokenizer is of another class.

    Example:
        >>> import tempfile
        >>> folder = tempfile.mkdtemp()
        >>> save(folder, LanguageModel(ModelConfig(vocab_size=5, width=8)))
        >>> load(folder).model.config.width
        8
    """
    inner = plain_model(model)
    weights = plain_weights(inner)
    kind = "model" if isinstance(inner, LanguageModel) else "decision_model"
    notes: dict[str, Any] = {kind: dataclasses.asdict(inner.config)}
    if tokenizer is not None:
        _check_tokenizer(tokenizer, inner)
        notes["tokenizer"] = tokenizer.to_json()
    tied = tied_weights(inner)
    # the weights first: they are all that `load` reads of the two
    folder = make_folder(folder)
    write_tensors(folder / WEIGHTS, weights, notes | ({"tied": tied} if tied else {}))
    write_config(folder, notes)


def _check_tokenizer(tokenizer: Tokenizer, model: LanguageModel | DecisionModel) -> None:
    if not isinstance(tokenizer, Tokenizer):
        raise TypeError(
            "`tokenizer` must be Characters, Bytes or BPE of minrnn, got "
            f"{type(tokenizer).__name__}"
        )
    if isinstance(model, DecisionModel):
        raise ValueError("`tokenizer` belongs to a LanguageModel, got a DecisionModel")
    if tokenizer.vocab_size != model.config.vocab_size:
        raise ValueError(
            f"`tokenizer` must have the model's V = {model.config.vocab_size} symbols, "
            f"got {tokenizer.vocab_size}"
        )


def make_folder(folder: str | os.PathLike[str]) -> Path:
    """Make `folder` if it is missing, for a model alone to be written to.

    Raises:
        SaveError: it cannot be made.
        ValueError: a training has its run in it.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SaveError(f"cannot write the folder {folder}: {error.strerror}") from error
    if (folder / _CONFIG).is_file() and {"text", "trajectories"} & set(read_config(folder)):
        raise ValueError(f"`folder` must not hold a training, {folder} does")
    return folder


def load(folder: str | os.PathLike[str]) -> Checkpoint:
    """Open a run folder: the model in evaluation mode, on the CPU, and its tokenizer.

    Each weight has the dtype that it was saved in.

    Args:
        folder: what `save` or a training wrote.

    Returns:
        The pair (model, tokenizer); the tokenizer is None if none was saved.

    Raises:
        FileNotFoundError: the folder is none, or has no weights yet.
        ValueError: a file in it is truncated or altered, or it holds an adapter of PEFT.
    """
    folder = Path(folder)
    if (folder / ADAPTER_CONFIG).is_file():
        raise ValueError(
            f"`folder` must hold a model, {folder} holds an adapter of PEFT, which belongs to one: "
            "save AutoModelForCausalLM.from_pretrained(folder).merged() and load that"
        )
    weights = folder / WEIGHTS
    if not weights.is_file():
        read_config(folder)
        raise FileNotFoundError(f"the run {folder} has no weights yet ({WEIGHTS} is missing)")
    tensors, notes = read_tensors(weights)
    with torch.device("cpu"):
        model = build_model(weights, notes)
    match_dtypes(model, tensors)
    load_weights(model, tensors, weights)
    tie_weights(model, notes.get("tied", []))
    tokenizer = None
    if "tokenizer" in notes:
        tokenizer = tokenizers.from_json(notes["tokenizer"])
        vocab_size = model.config.vocab_size if isinstance(model, LanguageModel) else 0
        if tokenizer.vocab_size != vocab_size:
            raise ValueError(
                f"{weights} is damaged: its tokenizer has {tokenizer.vocab_size} symbols, "
                f"its model {vocab_size}"
            )
    return Checkpoint(model.eval(), tokenizer)


def save_weights(
    folder: Path,
    weights: Mapping[str, Tensor],
    step: int,
    read: Callable[[Tensor], Tensor] = lambda x: x,
) -> None:
    """Write the weights of the run `folder` as they were at `step`; `read` as in `write_tensors`.

    With them goes what its `config.json` says of the model and the tokenizer.
    """
    config = read_config(folder)
    kept = ("model", "decision_model", "tokenizer")
    notes = {name: config[name] for name in kept if name in config}
    notes["step"] = step
    write_tensors(folder / WEIGHTS, weights, notes, read)


def load_weights(model: nn.Module, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Put `tensors`, read from `path`, into `model`.

    Raises:
        ValueError: names or shapes are not the model's.
    """
    expected = {name: tuple(x.shape) for name, x in model.state_dict().items()}
    found = {name: tuple(x.shape) for name, x in tensors.items()}
    if expected != found:
        name = next(n for n in expected | found if expected.get(n) != found.get(n))
        raise ValueError(
            f"{path} does not fit its configuration: {name} must have shape "
            f"{expected.get(name, 'none')}, got {found.get(name, 'none')}"
        )
    model.load_state_dict(dict(tensors))


def build_model(path: Path, config: Mapping[str, Any]) -> LanguageModel | DecisionModel:
    """The model that `config`, read from `path`, describes, its weights as initialised.

    Raises:
        ValueError: the configuration is altered.
    """
    try:
        if "decision_model" in config:
            return DecisionModel(read_decision_config(config["decision_model"]))
        return LanguageModel(ModelConfig(**config["model"]))
    except (TypeError, ValueError, KeyError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def read_decision_config(fields: Mapping[str, Any]) -> DecisionConfig:
    """A `DecisionConfig` from its fields as JSON keeps them."""
    return DecisionConfig(**{**fields, "blocks": ModelConfig(**fields["blocks"])})


def write_config(folder: Path, config: Mapping[str, Any]) -> None:
    """Write `config.json`, of a model whose weights are written: an adapter there is another's."""
    for name in (ADAPTER_CONFIG, "adapter_model.safetensors"):
        (folder / name).unlink(missing_ok=True)
    known = {"format": FORMAT} | (_FOR_TRANSFORMERS if "model" in config else {})
    content = json.dumps(known | dict(config), ensure_ascii=False, indent=1)
    # half surrogates, e.g. in names of files that are not UTF-8, as JSON's escapes
    _write(folder / _CONFIG, (content + "\n").encode("utf-8", "backslashreplace"))


def read_config(folder: Path) -> dict[str, Any]:
    """Read `config.json`.

    Raises:
        FileNotFoundError: `folder` is no run folder.
        ValueError: the file is damaged.
    """
    path = folder / _CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"{folder} is not a run folder: it has no {_CONFIG}")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise ValueError(f"{folder} is not a run folder: {path} has no format {FORMAT!r}")
    return config


def write_tensors(
    path: Path,
    tensors: Mapping[str, Tensor],
    notes: Mapping[str, Any],
    read: Callable[[Tensor], Tensor] = lambda x: x,
) -> None:
    """Write tensors and a few JSON values, with a checksum over both.

    Args:
        path: the file.
        tensors: by name; written one after the other, so that no second copy of all is held.
        notes: the values.
        read: called on each of `tensors` in the order of their names; what it returns is written.

    Raises:
        SaveError: the folder cannot be written to, or the disk is full; the old file stays.
    """
    metadata = {"format": FORMAT, "notes": json.dumps(notes, sort_keys=True)}
    digest = hashlib.sha256(metadata["notes"].encode("utf-8"))
    with _saving(path), replacing(path) as file:
        tensor_files.write(file, tensors, metadata, digest, read)


def to_bytes(tensors: Mapping[str, Tensor], notes: Mapping[str, Any]) -> bytes:
    """What `write_tensors` writes; `from_bytes` reads it."""
    plain: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, x in tensors.items():
        # names that share memory, e.g. of tied weights, are written each by itself
        x = x.detach().cpu().contiguous()
        plain[name] = x.clone() if x.untyped_storage().data_ptr() in storages else x
        storages.add(x.untyped_storage().data_ptr())
    metadata = {"format": FORMAT, "notes": json.dumps(notes, sort_keys=True)}
    metadata["sha256"] = _digest(plain, metadata["notes"])
    return serialize(plain, metadata=metadata)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `write_tensors` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is truncated, altered, or another kind of file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    try:
        tensors, metadata = read_safetensors(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or truncated: {error}") from error
    return tensors, _checked_notes(str(path), tensors, metadata)


def read_notes(path: Path) -> dict[str, Any]:
    """The JSON values that `write_tensors` wrote; of the tensors nothing is read or checked.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is truncated, or another kind of file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
        if metadata.get("format") != FORMAT:
            raise ValueError(f"it must have format {FORMAT!r}, got {metadata.get('format')!r}")
        return json.loads(metadata["notes"])
    except (SafetensorError, KeyError, ValueError) as error:
        raise ValueError(f"{path} is damaged or truncated: {error}") from error


def from_bytes(content: bytes, name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `to_bytes` made.

    Args:
        content: the bytes.
        name: what a message calls them.

    Raises:
        ValueError: they are truncated, altered, or something else.
    """
    try:
        tensors, metadata = parse_safetensors(content)
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"{name} is damaged or truncated: {error}") from error
    return tensors, _checked_notes(name, tensors, metadata)


def _checked_notes(
    name: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> dict[str, Any]:
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{name} must have format {FORMAT!r}, got {metadata.get('format')!r}")
    if _digest(tensors, metadata.get("notes", "")) != metadata.get("sha256"):
        raise ValueError(f"{name} is damaged: its content does not fit its checksum")
    return json.loads(metadata["notes"])


def _write(path: Path, content: bytes) -> None:
    with _saving(path):
        write_atomically(path, content)


@contextlib.contextmanager
def _saving(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        kept = "the file that was there is whole" if path.exists() else "nothing was written"
        raise SaveError(f"cannot save {path}: {error.strerror or error}; {kept}") from error


def _digest(tensors: Mapping[str, Tensor], notes: str) -> str:
    digest = hashlib.sha256(notes.encode("utf-8"))
    for name in sorted(tensors):
        tensor_files.update(digest, name, tensors[name])
    return digest.hexdigest()
