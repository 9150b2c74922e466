"""Episodes on disk: D4RL's flat HDF5 and Minari's folders, read and written."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from minrnn.data.minari_sets import check_size, data_folder, read_minari, write_minari
from minrnn.data.trajectories import REFERENCE_RETURNS, Trajectories, checked_reference, value_of
from minrnn.files import replacing

__all__ = ["fingerprint", "read", "write_d4rl", "write_minari"]

_KEYS = ("observations", "actions", "rewards", "terminals", "timeouts")
_ATTRIBUTES = ("env", "ref_min_score", "ref_max_score")
_SUFFIXES = (".hdf5", ".h5")


def read(
    paths: Sequence[Path],
    environment: str | None = None,
    reference: tuple[float, float] | None = None,
) -> Trajectories:
    """Read one or more sets of the same environment, one after the other.

    Args:
        paths: each a D4RL file (HDF5), a folder of such files, or a Minari set: its folder, or its
            name, e.g. mujoco/hopper/medium-v0, if it is stored where Minari keeps its own.
        environment: gymnasium's name of it, in place of what the sets say; joins sets of several
            versions of an environment.
        reference: returns of a random and of an expert policy, in place of what the sets say.

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
    if len(sizes) > 1 or (len(environments) > 1 and environment is None):
        raise ValueError(
            "`paths` must hold one environment's sets, got observations and actions of sizes "
            f"{sorted(sizes)} and the environments {sorted(environments)}"
            + ("" if len(sizes) > 1 else "; join versions of one environment by --env")
        )
    references = {d.reference for d in parts if d.reference}
    if len(references) > 1 and reference is None:
        raise ValueError(
            f"`paths` must have the same reference returns, got {sorted(references)}; "
            "give them by --reference"
        )
    environment = environment or next(iter(environments), None)
    offsets = np.cumsum([0, *(d.num_steps for d in parts[:-1])])
    return Trajectories(
        np.concatenate([d.observations for d in parts]),
        np.concatenate([d.actions for d in parts]),
        np.concatenate([d.rewards for d in parts]),
        np.concatenate([d.ends + offset for d, offset in zip(parts, offsets, strict=True)]),
        np.concatenate([d.terminated for d in parts]),
        environment,
        reference or next(iter(references), None) or value_of(REFERENCE_RETURNS, environment),
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
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file, h5py.File(file, "w") as h5:
        for name, value in columns.items():
            h5.create_dataset(name, data=value, compression="gzip", shuffle=True)
        if data.environment:
            h5.attrs["env"] = data.environment
        if data.reference:
            h5.attrs["ref_min_score"], h5.attrs["ref_max_score"] = data.reference


def _files(path: Path) -> list[Path]:
    """The sets that `path` stands for."""
    if path.is_file() or data_folder(path) is not None:
        return [path]
    if path.is_dir():
        files = sorted(p for p in path.iterdir() if p.suffix in _SUFFIXES)
        if not files:
            raise ValueError(f"{path} holds neither a Minari set nor D4RL files (.hdf5)")
        return files
    raise FileNotFoundError(f"{path} does not exist, as a file, a folder or a Minari set")


def _read(path: Path) -> Trajectories:
    folder = data_folder(path)
    try:
        return _read_d4rl(path) if folder is None else read_minari(folder)
    except (ValueError, TypeError) as error:
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
            for key in _KEYS:
                check_size(key, file[key])
            columns = {key: np.asarray(file[key][()]) for key in _KEYS}
            attributes = {name: file.attrs[name] for name in _ATTRIBUTES if name in file.attrs}
    except (OSError, RuntimeError, KeyError, TypeError) as error:
        raise ValueError(f"is damaged: {error}") from error
    lengths = {key: len(value) if value.ndim else 0 for key, value in columns.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"all keys must have one length, got {lengths}")
    if 0 in lengths.values():
        raise ValueError("its keys have no rows: it has no whole episode")
    rewards, terminals, timeouts = (_column(key, columns[key]) for key in _KEYS[2:])
    terminals, timeouts = _flags("terminals", terminals), _flags("timeouts", timeouts)
    last = np.flatnonzero(terminals | timeouts)
    if len(last) == 0:
        raise ValueError("no row of `terminals` or `timeouts` is true: it has no whole episode")
    # rows after the last end are part of an episode
    whole = int(last[-1]) + 1
    environment = _text("env", attributes.get("env")) or None
    given = [attributes.get(name) for name in _ATTRIBUTES[1:]]
    reference = None if any(value is None for value in given) else checked_reference(given)
    return Trajectories(
        columns["observations"][:whole],
        columns["actions"][:whole],
        rewards[:whole],
        last + 1,
        terminals[last],
        environment,
        reference or value_of(REFERENCE_RETURNS, environment),
    )


def _column(key: str, value: np.ndarray) -> np.ndarray:
    """One number a row, from shape (N,) or (N, 1)."""
    if value.size != len(value):
        raise ValueError(f"`{key}` must have shape (N,), got {value.shape}")
    return value.reshape(-1)


def _flags(key: str, value: np.ndarray) -> np.ndarray:
    """Numbers 0 and 1 as booleans."""
    if value.dtype.kind not in "biuf" or not ((value == 0) | (value == 1)).all():
        raise ValueError(f"`{key}` must be booleans, or 0 and 1, got {value.dtype} with others")
    return value.astype(bool)


def _text(name: str, value: Any) -> str | None:
    """An attribute of HDF5, which is a string or its bytes, alone or as an array of one."""
    if isinstance(value, np.ndarray) and value.size == 1:
        value = value.item()
    if isinstance(value, str):
        # h5py has bytes that are no text as half surrogates
        value = value.encode("utf-8", "surrogateescape")
    if value is None:
        return None
    try:
        if not isinstance(value, bytes):
            raise TypeError
        return value.decode("utf-8")
    except (TypeError, UnicodeDecodeError) as error:
        raise ValueError(f"the attribute `{name}` must be a text, got {value!r}") from error


def _h5py() -> Any:
    try:
        import h5py
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "this needs the package h5py, which is not installed: pip install 'minrnn[rl]'"
        ) from error
    return h5py
