"""Minari's sets of episodes: a folder of metadata and data, read and written.

Minari itself makes the environment of a set from a specification in its metadata, which may name
any function of any module. Here the specification gives the environment's name and nothing else.
"""

import dataclasses
import json
import math
import os
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from minrnn.data.trajectories import REFERENCE_RETURNS, Trajectories, checked_reference, value_of
from minrnn.environments import check_spaces, making

_COLUMNS = ("observations", "actions", "rewards")


def data_folder(path: Path) -> Path | None:
    """The folder with the data of a Minari set, by its own path or by its name; None if none is."""
    stored = Path(os.environ.get("MINARI_DATASETS_PATH", Path.home() / ".minari" / "datasets"))
    for folder in (path / "data", path, stored / path / "data"):
        if (folder / "metadata.json").is_file():
            return folder
    return None


def read_minari(folder: Path) -> Trajectories:
    """Read the set whose data is in `folder`; parts of episodes, which do not end, are left out.

    Raises:
        ValueError: the set is damaged, or its observations or actions are no vectors.
        ModuleNotFoundError: minari, or what it needs for the format of the set, is not installed.
    """
    metadata = _read_metadata(folder)
    environment = _environment(metadata)
    storage, total = _storage(folder, metadata)
    columns: dict[str, list[np.ndarray]] = {name: [] for name in _COLUMNS}
    lengths, terminated = [], []
    for number, episode in enumerate(_stored(storage, total)):
        steps = _check_episode(number, episode)
        if not (episode["terminations"][-1] or episode["truncations"][-1]):
            # part of an episode, cut when the recording was
            continue
        columns["observations"].append(episode["observations"][:-1])
        columns["actions"].append(episode["actions"])
        columns["rewards"].append(episode["rewards"])
        lengths.append(steps)
        terminated.append(bool(episode["terminations"][-1]))
    if not lengths:
        raise ValueError("it has no whole episode")
    try:
        observations, actions, rewards = (np.concatenate(part) for part in columns.values())
    except ValueError as error:
        raise ValueError(f"its episodes must have vectors of one size: {error}") from error
    return Trajectories(
        observations,
        actions,
        rewards,
        np.cumsum(lengths),
        np.array(terminated),
        environment,
        _reference(metadata) or value_of(REFERENCE_RETURNS, environment),
    )


def _read_metadata(folder: Path) -> dict[str, Any]:
    metadata = json.loads((folder / "metadata.json").read_text(encoding="utf-8"))
    if not isinstance(metadata, dict):
        raise ValueError(f"metadata.json must hold an object, got {type(metadata).__name__}")
    return metadata


def _environment(metadata: dict[str, Any]) -> str | None:
    written = metadata.get("env_spec") or "{}"
    try:
        spec = json.loads(written)
        name = spec.get("id")
    except (TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"`env_spec` of its metadata must be an object, got {written}") from error
    if name is not None and not isinstance(name, str):
        raise ValueError(f"`id` of `env_spec` in its metadata must be a string, got {name!r}")
    return name


def _reference(metadata: dict[str, Any]) -> tuple[float, float] | None:
    """The reference returns; Minari writes null for those that are not known."""
    values = (metadata.get("ref_min_score"), metadata.get("ref_max_score"))
    return None if None in values else checked_reference(values)


def _storage(folder: Path, metadata: dict[str, Any]) -> tuple[Any, int]:
    """Minari's reader of the data, and how many episodes there are.

    `MinariStorage.read` makes an environment where the metadata does not say the spaces.
    """
    _import_minari()
    from minari.dataset._storages import get_minari_storage, get_storage_keys

    kind = metadata.get("data_format", "hdf5")
    if kind not in get_storage_keys():
        raise ValueError(f"`data_format` must be one of {get_storage_keys()}, got {kind!r}")
    try:
        reader = get_minari_storage(kind)
    except ImportError as error:
        raise ModuleNotFoundError(str(error)) from error
    spaces = [_space(metadata, name, kind) for name in ("observation_space", "action_space")]
    try:
        storage: Any = reader(folder, *spaces)
        found = _count(folder, kind)
    except Exception as error:
        raise _damaged(error) from error
    total = metadata.get("total_episodes")
    if isinstance(total, bool) or total != found:
        raise ValueError(
            f"`total_episodes` of its metadata must be {found}, those in its data, got {total}"
        )
    return storage, found


def _count(folder: Path, kind: str) -> int:
    if kind != "hdf5":
        return sum(path.name.isdecimal() for path in folder.iterdir() if path.is_dir())
    import h5py

    with h5py.File(folder / "main_data.hdf5", "r") as file:
        episodes = [name for name in file if str(name).startswith("episode_")]
        for episode in episodes:
            for name in (*_COLUMNS, "terminations", "truncations"):
                column: Any = file[f"{episode}/{name}"]
                if isinstance(column, h5py.Dataset):
                    check_size(f"{episode}/{name}", column)
        return len(episodes)


def check_size(name: str, column: Any) -> None:
    """Check, before a dataset of HDF5 is read, that its shape is none that damage made up.

    Raises:
        ValueError: the shape says far more numbers than are stored; memory would run out.
    """
    stored = max(1, column.id.get_storage_size())
    chunks = column.size // max(1, math.prod(column.chunks or (column.size,)))
    large = column.nbytes > 2**30 or chunks > 10**6
    # gzip makes data a thousand times smaller at most
    if large and column.nbytes > 100_000 * stored:
        raise ValueError(f"`{name}` must have {column.nbytes:,} bytes, {stored:,} are stored")


def _space(metadata: dict[str, Any], name: str, kind: str) -> Any:
    from gymnasium.spaces import Box
    from minari.serialization import deserialize_space

    if name in metadata:
        try:
            return deserialize_space(metadata[name])
        except Exception as error:
            raise ValueError(f"`{name}` of its metadata is no space: {_first(error)}") from error
    if kind != "hdf5":
        raise ValueError(f"`{name}` must be in its metadata, it is missing")
    # HDF5 knows the shapes; any box makes the reader return plain arrays
    return Box(-np.inf, np.inf, (1,))


def _stored(storage: Any, total: int) -> Iterator[dict[str, Any]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield from storage.get_episodes(range(total))
        # minari asserts, and h5py and pyarrow raise whatever they meet
        except Exception as error:
            raise _damaged(error) from error


def _damaged(error: Exception) -> ValueError:
    return ValueError(f"is damaged: {_first(error)}")


def _first(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


def _check_episode(number: int, episode: dict[str, Any]) -> int:
    """How many steps an episode has; its parts must be as long as that."""
    for name in ("observations", "actions"):
        value = episode[name]
        if not isinstance(value, np.ndarray) or value.ndim != 2:
            raise ValueError(f"`{name}` must be vectors, got {_what(value)}")
    episode["rewards"] = np.asarray(episode["rewards"]).reshape(-1)
    steps = len(episode["rewards"])
    if steps < 1:
        raise ValueError(f"episode {number} must have at least one step, got none")
    names = ("observations", "actions", "terminations", "truncations")
    lengths = tuple(len(episode[name]) for name in names)
    if lengths != (steps + 1, steps, steps, steps):
        raise ValueError(
            f"episode {number} must have one observation more than actions and rewards, and as "
            f"many terminations and truncations as rewards, {steps}, got {lengths}"
        )
    return steps


def _what(value: Any) -> str:
    if isinstance(value, np.ndarray):
        return f"shape {value.shape} with the steps"
    return f"a {type(value).__name__}"


def write_minari(data: Trajectories, folder: Path, *, imports: bool = False) -> None:
    """Write a Minari set, with the reference returns in its metadata.

    Minari keeps the observation after the last action, which neither D4RL nor `Trajectories` has;
    the last observation stands there a second time, and the description says so.

    Args:
        data: its environment must be known to gymnasium, and have spaces of its sizes.
        folder: a new one; its last part names the set. Inside Minari's own folder of sets, it can
            be loaded by its name.
        imports: whether the environment of `data` may import a module, because a person named it;
            see `minrnn.environments.making`.

    Raises:
        ValueError: `folder` exists, its name is none of a Minari set, or the environment is not
            known or has other spaces.
    """
    _import_minari()
    import gymnasium
    import minari
    from minari.data_collector import EpisodeBuffer
    from minari.dataset.minari_dataset import parse_dataset_id
    from minari.dataset.minari_storage import MinariStorage

    # minari looks for its files below a relative path a second time
    folder = folder.absolute()
    if folder.exists():
        raise ValueError(f"`folder` must be a new one, {folder} exists")
    if not data.environment:
        raise ValueError("the set does not say its environment; give it by --env")
    try:
        parse_dataset_id(folder.name)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"the folder must have the name of a Minari set, like medium-v0, got {folder.name}"
        ) from error
    with making(data.environment, imports=imports) as environment:
        check_spaces(environment, (data.observations.shape[1], data.actions.shape[1]))
        spaces = environment.observation_space, environment.action_space
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as scratch:
        made = Path(scratch) / "set"
        made.mkdir()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # the module, if one was named, is imported by now
            spec = gymnasium.spec(data.environment.rpartition(":")[2])
            storage = MinariStorage.new(made / "data", *spaces, env_spec=_as_text(spec))
            storage.update_episodes(_episodes(data, EpisodeBuffer))
        storage.update_metadata(_metadata(data, folder.name, minari.__version__))
        made.rename(folder)


def _as_text(spec: Any) -> Any:
    """`spec` as JSON can have it: a class is named by its module."""
    entry = spec.entry_point
    if not callable(entry):
        return spec
    named = f"{getattr(entry, '__module__', '')}:{getattr(entry, '__qualname__', '')}"
    return dataclasses.replace(spec, entry_point=named)


def _metadata(data: Trajectories, name: str, version: str) -> dict[str, Any]:
    says = "Converted from D4RL's layout: the observation after an episode's last action is not "
    facts: dict[str, Any] = {
        "dataset_id": name,
        "minari_version": version,
        "description": says + "known, the one before it stands there again.",
    }
    if data.reference:
        facts["ref_min_score"], facts["ref_max_score"] = data.reference
        facts["num_episodes_average_score"] = 100
    return facts


def _episodes(data: Trajectories, kind: Any) -> Iterator[Any]:
    for number, (start, end) in enumerate(zip(data.starts, data.ends, strict=True)):
        rows = slice(start, end)
        last = np.arange(start, end) == end - 1
        ended = bool(data.terminated[number])
        yield kind(
            observations=np.concatenate(
                [data.observations[rows], data.observations[end - 1 : end]]
            ),
            actions=data.actions[rows],
            rewards=data.rewards[rows],
            terminations=last & ended,
            truncations=last & (not ended),
        )


def _import_minari() -> None:
    try:
        import minari  # noqa: F401
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "this needs the package minari, which is not installed: pip install 'minrnn[rl]'"
        ) from error
