"""A training on trajectories as a folder."""

import dataclasses
import math
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from minrnn import checkpoint, generators, ranks
from minrnn.data import trajectory_files
from minrnn.data.trajectories import (
    REFERENCE_RETURNS,
    TARGET_RETURNS,
    Trajectories,
    checked_reference,
    normalized,
    value_of,
)
from minrnn.decision import DecisionConfig, DecisionModel
from minrnn.environments import action_bounds, check_spaces, making
from minrnn.progress import Progress
from minrnn.recipes import RlConfig
from minrnn.runs.folder import new_folder, restarted_in
from minrnn.runs.settings import check_model
from minrnn.tasks import DecisionTask
from minrnn.train import Result, train
from minrnn.train_config import TrainConfig


class Facts(NamedTuple):
    """What a run keeps of its data and environment."""

    environment: str
    reference: tuple[float, float] | None
    best_return: float
    actions: tuple[np.ndarray, np.ndarray]
    """lowest and highest, (A,) float32 each"""

    def score(self, value: float, environment: str) -> float | None:
        """D4RL's score of a return in `environment`; None without reference returns of it."""
        same = environment.partition("-")[0] == self.environment.partition("-")[0]
        known = self.reference if same else value_of(REFERENCE_RETURNS, environment)
        return normalized(value, known)


def start(config: RlConfig) -> Path:
    """Make a run folder: what was asked for. `go_on` trains.

    Raises:
        ValueError: the folder holds something already, the data is damaged, it does not fit the
            environment, or no model can be built so; nothing is left behind.
        FileNotFoundError: there are no such files.
        SaveError: the folder cannot be made.
        ModuleNotFoundError: a package of the extra `rl` is not installed.
    """
    return ranks.on_first(lambda: _start(config))


def _start(config: RlConfig) -> Path:
    default = Path("runs", "rl")
    restarted = restarted_in(config.out, default)
    if restarted is not None:
        return restarted
    if not config.data:
        raise ValueError("`data` must name at least one set of episodes, got none")
    out, numbered = config.out or default, config.out is None
    with new_folder(out, ("config.json",), numbered=numbered) as folder:
        data = _read(config)
        if data.environment is None:
            raise ValueError("the data does not say its environment; give it by --env")
        # a name that the data says must not import a module
        with making(data.environment, imports=bool(config.env)) as environment:
            check_spaces(environment, (data.observations.shape[1], data.actions.shape[1]))
            low, high = action_bounds(environment)
        _report_outside(data, low, high)
        model = _model_config(config.model, data)
        check_model(DecisionModel, model, config.train, config.context)
        facts = {
            "trajectories": _to_json(config),
            "decision_model": dataclasses.asdict(model),
            "environment": data.environment,
            "reference": data.reference,
            "best_return": float(data.returns.max()),
            "actions": [low.tolist(), high.tolist()],
            "data_sha256": trajectory_files.fingerprint(data),
        }
        checkpoint.write_config(folder, facts)
    return folder


def _report_outside(data: Trajectories, low: np.ndarray, high: np.ndarray) -> None:
    number, excess = data.outside(low, high)
    if number:
        print(
            f"{number:,} of {data.num_steps:,} actions lie outside the bounds of "
            f"{data.environment}, by up to {excess:g}; they are clipped to the bounds",
            file=sys.stderr,
        )


def _model_config(asked: DecisionConfig, data: Trajectories) -> DecisionConfig:
    """`asked` with the sizes and the scale of the data."""
    sizes = {
        "observation_size": data.observations.shape[1],
        "action_size": data.actions.shape[1],
    }
    for name, size in sizes.items():
        if getattr(asked, name) not in (0, size):
            raise ValueError(
                f"`{name}` must be that of the data, {size}, or 0, got {getattr(asked, name)}"
            )
    scale = data.return_scale if asked.return_scale is None else asked.return_scale
    return dataclasses.replace(asked, **sizes, return_scale=scale)


def go_on(folder: Path) -> Result:
    """Train the run in `folder` from wherever it stands to its end.

    Raises:
        FileNotFoundError: it is no run folder, or its data is gone.
        ValueError: the data has changed, or a file of the run is damaged.
    """
    config, saved = read(folder), checkpoint.read_config(folder)
    low, high = facts(folder).actions
    data = _read(config)

    def check() -> None:
        if saved.get("data_sha256") != trajectory_files.fingerprint(data):
            raise ValueError(f"the data of {folder} has changed since its training began")

    ranks.on_first(check)
    data = data.clipped(low, high)
    with generators.kept():
        torch.manual_seed(config.train.seed)
        model = checkpoint.build_model(folder / "config.json", saved)
    assert isinstance(model, DecisionModel)
    _scale(model, data, low, high)
    tokens = config.train.batch_size * config.context
    with Progress(config.train.steps, tokens, shown=ranks.is_first()) as progress:
        task = DecisionTask(data, config.context, config.observation_noise)
        return train(model, task, config.train, folder, progress.report)


def facts(folder: Path) -> Facts:
    """What the run in `folder` keeps of its data.

    Raises:
        FileNotFoundError: it is no run folder.
        ValueError: it is damaged.
    """
    saved = checkpoint.read_config(folder)
    try:
        environment, reference = saved["environment"], saved["reference"]
        if not isinstance(environment, str):
            raise TypeError(f"`environment` must be a string, got {environment!r}")
        best = float(saved["best_return"])
        low, high = (np.asarray(bound, dtype=np.float32) for bound in saved["actions"])
        size = (saved["decision_model"]["action_size"],)
        if not (math.isfinite(best) and low.shape == high.shape == size and (low <= high).all()):
            raise ValueError("`best_return` must be finite, `actions` the bounds of each number")
        known = None if reference is None else checked_reference(reference)
        return Facts(environment, known, best, (low, high))
    except (TypeError, KeyError, ValueError) as error:
        raise ValueError(f"{folder / 'config.json'} is damaged: {error}") from error


def read(folder: Path) -> RlConfig:
    """What the run in `folder` was asked for.

    Raises:
        FileNotFoundError: it is no run folder.
        ValueError: it is no run over trajectories, or damaged.
    """
    saved = checkpoint.read_config(folder)
    if "trajectories" not in saved:
        raise ValueError(f"{folder} holds no training on trajectories")
    try:
        fields = dict(saved["trajectories"])
        fields["data"] = tuple(map(Path, fields["data"]))
        fields["out"] = None if fields["out"] is None else Path(fields["out"])
        if fields["reference"] is not None:
            fields["reference"] = tuple(map(float, fields["reference"]))
        fields["model"] = checkpoint.read_decision_config(fields["model"])
        fields["train"] = TrainConfig.saved(fields["train"])
        return RlConfig(**fields)
    except (TypeError, KeyError, ValueError) as error:
        raise ValueError(f"{folder / 'config.json'} is damaged: {error}") from error


def target(folder: Path, environment: str, asked: float | None = None) -> float:
    """The return to ask for: `asked`, that of the run or of the environment, or the highest."""
    known = (asked, read(folder).target, value_of(TARGET_RETURNS, environment))
    return next((value for value in known if value is not None), facts(folder).best_return)


def _read(config: RlConfig) -> Trajectories:
    data = trajectory_files.read(config.data, config.env, config.reference)
    return data if config.best == 1 else data.best(config.best)


def _scale(model: DecisionModel, data: Trajectories, low: np.ndarray, high: np.ndarray) -> None:
    """Let the model see standardised observations and act from `low` to `high`."""
    mean, std = map(torch.from_numpy, data.moments)
    # a number of an action that cannot vary has no reach to divide by
    reach = np.where(high > low, (high - low) / 2, 1)
    model.observation_mean.copy_(mean)
    model.observation_std.copy_(std)
    model.action_middle.copy_(torch.from_numpy((low + high) / 2))
    model.action_reach.copy_(torch.from_numpy(reach))


def _to_json(config: RlConfig) -> dict[str, Any]:
    fields = dataclasses.asdict(config)
    out = None if config.out is None else str(config.out.resolve())
    # a set that is named, not found by a path, keeps its name
    paths = [str(path.resolve() if path.exists() else path) for path in config.data]
    return fields | {"data": paths, "out": out}
