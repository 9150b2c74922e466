"""Episodes on disk: D4RL's flat HDF5 and Minari's folders, read and written."""

import hashlib
import json
import os
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from minrnn.data.trajectories import REFERENCE_RETURNS, Trajectories, value_of
from minrnn.files import replacing

_KEYS = ("observations", "actions", "rewards", "terminals", "timeouts")
_SUFFIXES = (".hdf5", ".h5")


def read(paths: Sequence[Path]) -> Trajectories:
    """Read one or more sets of the same environment, one behind the other.

    Args:
        paths: each a D4RL file (HDF5), a folder of such files, or a Minari set: its folder, or its
            name, e.g. mujoco/hopper/medium-v0, if it is stored where Minari keeps its own.

    Raises:
        FileNotFoundError: there is no such file or folder.
        ValueError: a file is none of these, lacks a part, holds numbers that are not finite or
            parts of unequal lengths, or the sets do not fit one another.
        ModuleNotFoundError: h5py, or minari for its sets, is not installed.
    """
    if not paths:
        raise ValueError("`paths` must name at least one set, got none")
    parts = [_read(file) for path in paths for file in _files(path)]
    sizes = {(d.observations.shape[1], d.actions.shape[1]) for d in parts}
    environments = {d.environment for d in parts if d.environment}
    if len(sizes) > 1 or len(environments) > 1:
        raise ValueError(
            "`paths` must hold one environment's sets, got observations and actions of sizes "
            f"{sorted(sizes)} and the environments {sorted(environments)}"
        )
    if len(parts) == 1:
        return parts[0]
    offsets = np.cumsum([0, *(d.num_steps for d in parts[:-1])])
    return Trajectories(
        np.concatenate([d.observations for d in parts]),
        np.concatenate([d.actions for d in parts]),
        np.concatenate([d.rewards for d in parts]),
        np.concatenate([d.ends + offset for d, offset in zip(parts, offsets, strict=True)]),
        np.concatenate([d.terminated for d in parts]),
        next(iter(environments), None),
        next((d.reference for d in parts if d.reference), None),
    )


def fingerprint(data: Trajectories) -> str:
    """A sum over all that is learnt from, whatever file it came from."""
    digest = hashlib.sha256()
    for name in (*_KEYS[:3], "ends", "terminated"):
        value = np.ascontiguousarray(getattr(data, name))
        digest.update(f"{name} {value.dtype} {value.shape}".encode())
        digest.update(value.data)
    return digest.hexdigest()


def write_d4rl(data: Trajectories, path: Path) -> None:
    """Write one flat HDF5 file as D4RL's, atomically; the reference returns are attributes.

    Raises:
        OSError: it cannot be written; what stood at `path` still does.
    """
    h5py = _h5py()
    last = np.zeros(data.num_steps, dtype=bool)
    last[data.ends - 1] = True
    terminals = last.copy()
    terminals[data.ends - 1] = data.terminated
    columns = {name: getattr(data, name) for name in _KEYS[:3]}
    columns |= {"terminals": terminals, "timeouts": last & ~terminals}
    with replacing(path) as file, h5py.File(file, "w") as h5:
        for name, value in columns.items():
            h5.create_dataset(name, data=value, compression="gzip", shuffle=True)
        if data.environment:
            h5.attrs["env"] = data.environment
        if data.reference:
            h5.attrs["ref_min_score"], h5.attrs["ref_max_score"] = data.reference


def write_minari(data: Trajectories, folder: Path) -> None:
    """Write a Minari set, with the reference returns in its metadata.

    Minari keeps the observation after the last action, which neither D4RL nor `Trajectories` has;
    the last observation stands there a second time, and the description says so.

    Args:
        data: its environment must be known to gymnasium.
        folder: a new one; its last part names the set. Inside Minari's own folder of sets, it can
            be loaded by its name.

    Raises:
        ValueError: `folder` exists, its name is none of a Minari set, or the environment is not
            known.
    """
    minari = _minari()
    import gymnasium
    from minari.data_collector import EpisodeBuffer
    from minari.dataset.minari_storage import MinariStorage

    if folder.exists():
        raise ValueError(f"`folder` must be a new one, {folder} exists")
    if not data.environment:
        raise ValueError("the set does not say its environment; give it by --env")
    try:
        minari.dataset.minari_dataset.parse_dataset_id(folder.name)
        spec = gymnasium.spec(data.environment)
    except (gymnasium.error.Error, TypeError, ValueError) as error:
        raise ValueError(f"{folder.name}: {error}; a name is like medium-v0") from error
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as scratch:
        made = Path(scratch) / "set"
        made.mkdir()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            storage = MinariStorage.new(made / "data", env_spec=spec)
            storage.update_episodes(_episodes(data, EpisodeBuffer))
        storage.update_metadata(_metadata(data, folder.name, minari.__version__))
        made.rename(folder)


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


def _files(path: Path) -> list[Path]:
    """The sets that `path` stands for."""
    if path.is_file() or _minari_data(path) is not None:
        return [path]
    if path.is_dir():
        files = sorted(p for p in path.iterdir() if p.suffix in _SUFFIXES)
        if not files:
            raise ValueError(f"{path} holds neither a Minari set nor D4RL files (.hdf5)")
        return files
    raise FileNotFoundError(f"{path} does not exist, as a file, a folder or a Minari set")


def _minari_data(path: Path) -> Path | None:
    """The folder with the data of a Minari set, by its own path or by its name."""
    stored = Path(os.environ.get("MINARI_DATASETS_PATH", Path.home() / ".minari" / "datasets"))
    for folder in (path / "data", path, stored / path / "data"):
        if (folder / "metadata.json").is_file():
            return folder
    return None


def _read(path: Path) -> Trajectories:
    folder = _minari_data(path)
    try:
        return _read_d4rl(path) if folder is None else _read_minari(folder)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _read_d4rl(path: Path) -> Trajectories:
    h5py = _h5py()
    if not h5py.is_hdf5(path):
        raise ValueError("must be an HDF5 file with D4RL's keys, it is no HDF5 file")
    try:
        with h5py.File(path, "r") as file:
            missing = [key for key in _KEYS if not isinstance(file.get(key), h5py.Dataset)]
            if missing:
                raise ValueError(f"must have the keys {_KEYS}, {missing} are missing")
            columns = {key: file[key][()] for key in _KEYS}
            attributes = dict(file.attrs)
    except (OSError, RuntimeError) as error:
        raise ValueError(f"is damaged: {error}") from error
    lengths = {key: len(value) if np.ndim(value) else 0 for key, value in columns.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"all keys must have one length, got {lengths}")
    terminals = columns["terminals"].reshape(-1).astype(bool)
    last = np.flatnonzero(terminals | columns["timeouts"].reshape(-1).astype(bool))
    if len(last) == 0:
        raise ValueError("no row of `terminals` or `timeouts` is true: it has no whole episode")
    # what stands behind the last end is part of an episode
    whole = int(last[-1]) + 1
    environment = attributes.get("env")
    environment = None if environment is None else str(environment)
    reference = None
    if "ref_min_score" in attributes and "ref_max_score" in attributes:
        reference = (float(attributes["ref_min_score"]), float(attributes["ref_max_score"]))
    return Trajectories(
        columns["observations"][:whole].astype(np.float32),
        columns["actions"][:whole].astype(np.float32),
        columns["rewards"][:whole].reshape(-1).astype(np.float32),
        last + 1,
        terminals[last],
        environment,
        reference or value_of(REFERENCE_RETURNS, environment),
    )


def _read_minari(folder: Path) -> Trajectories:
    _minari()
    from minari.dataset.minari_storage import MinariStorage

    metadata = json.loads((folder / "metadata.json").read_text(encoding="utf-8"))
    spec = json.loads(metadata.get("env_spec") or "{}")
    environment = spec.get("id")
    reference = value_of(REFERENCE_RETURNS, environment)
    if "ref_min_score" in metadata and "ref_max_score" in metadata:
        reference = (float(metadata["ref_min_score"]), float(metadata["ref_max_score"]))
    columns: dict[str, list[np.ndarray]] = {name: [] for name in _KEYS[:3]}
    lengths, terminated = [], []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        storage = MinariStorage.read(folder)
        for episode in storage.get_episodes(range(int(storage.total_episodes))):
            observations, actions = episode["observations"], episode["actions"]
            for name, value in (("observations", observations), ("actions", actions)):
                if not isinstance(value, np.ndarray) or value.ndim != 2:
                    raise ValueError(f"`{name}` must be vectors, got {_what(value)}")
            steps = len(episode["rewards"])
            if (len(observations), len(actions)) != (steps + 1, steps):
                raise ValueError(
                    f"episode {len(lengths)} must have one observation more than actions and "
                    f"rewards, got {len(observations)}, {len(actions)} and {steps}"
                )
            if not (episode["terminations"][-1] or episode["truncations"][-1]):
                # part of an episode, cut when the recording was
                continue
            columns["observations"].append(observations[:-1])
            columns["actions"].append(actions)
            columns["rewards"].append(np.asarray(episode["rewards"]))
            lengths.append(steps)
            terminated.append(bool(episode["terminations"][-1]))
    if not lengths:
        raise ValueError("it has no whole episode")
    observations, actions, rewards = (
        np.concatenate(part).astype(np.float32) for part in columns.values()
    )
    ends = np.cumsum(lengths)
    return Trajectories(
        observations, actions, rewards, ends, np.array(terminated), environment, reference
    )


def _what(value: Any) -> str:
    if isinstance(value, np.ndarray):
        return f"shape {value.shape} with the steps"
    return f"a {type(value).__name__}"


def with_reference(
    data: Trajectories, environment: str | None, reference: tuple[float, float] | None
) -> Trajectories:
    """`data` with what its files do not say: the environment, the reference returns."""
    environment = environment or data.environment
    reference = reference or data.reference or value_of(REFERENCE_RETURNS, environment)
    return replace(data, environment=environment, reference=reference)


def _h5py() -> Any:
    try:
        import h5py
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(_needs("h5py")) from error
    return h5py


def _minari() -> Any:
    try:
        import minari
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(_needs("minari")) from error
    return minari


def _needs(name: str) -> str:
    return f"this needs the package {name}, which is not installed: pip install 'minrnn[rl]'"
