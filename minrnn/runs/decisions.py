"""A training on trajectories as a folder."""

import dataclasses
from pathlib import Path
from typing import Any

import torch

from minrnn import acting, checkpoint, ranks
from minrnn.data import trajectory_files
from minrnn.data.trajectories import TARGET_RETURNS, Trajectories, value_of
from minrnn.decision import DecisionModel
from minrnn.progress import Progress
from minrnn.recipes import RlConfig
from minrnn.runs.folder import new_folder, restarted_in
from minrnn.runs.settings import check_model
from minrnn.tasks import DecisionTask
from minrnn.train import Result, train
from minrnn.train_config import TrainConfig


def start(config: RlConfig) -> Path:
    """Make a run folder: what was asked for. `go_on` trains.

    Raises:
        ValueError: the folder holds something already, the data is damaged, or it does not fit
            the environment; nothing is left behind.
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
        with acting.making(data.environment) as environment:
            acting.check_spaces(environment, (data.observations.shape[1], data.actions.shape[1]))
            low, high = environment.action_space.low, environment.action_space.high
        sizes = {"observation_size": data.observations.shape[1], "action_size": low.shape[0]}
        model = dataclasses.replace(config.model, **sizes)
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


def go_on(folder: Path) -> Result:
    """Train the run in `folder` from wherever it stands to its end.

    Raises:
        FileNotFoundError: it is no run folder, or its data is gone.
        ValueError: the data has changed, or a file of the run is damaged.
    """
    config, saved = read(folder), checkpoint.read_config(folder)
    data = _read(config)
    if saved.get("data_sha256") != trajectory_files.fingerprint(data):
        raise ValueError(f"the data of {folder} has changed since its training began")
    torch.manual_seed(config.train.seed)
    model = checkpoint.build_model(folder / "config.json", saved)
    assert isinstance(model, DecisionModel)
    _scale(model, data, saved["actions"])
    tokens = config.train.batch_size * config.context
    with Progress(config.train.steps, tokens, shown=ranks.is_first()) as progress:
        task = DecisionTask(data, config.context, config.observation_noise)
        return train(model, task, config.train, folder, progress.report)


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
        fields["train"] = TrainConfig(**fields["train"])
        return RlConfig(**fields)
    except (TypeError, KeyError, ValueError) as error:
        raise ValueError(f"{folder / 'config.json'} is damaged: {error}") from error


def target(folder: Path, environment: str, asked: float | None = None) -> float:
    """The return to ask for: `asked`, that of the run or of the environment, or the highest."""
    known = (asked, read(folder).target, value_of(TARGET_RETURNS, environment))
    return next(
        (value for value in known if value is not None),
        float(checkpoint.read_config(folder)["best_return"]),
    )


def _read(config: RlConfig) -> Trajectories:
    data = trajectory_files.read(config.data)
    data = trajectory_files.with_reference(data, config.env, config.reference)
    return data if config.best == 1 else data.best(config.best)


def _scale(model: DecisionModel, data: Trajectories, actions: list[list[float]]) -> None:
    """Let the model see standardised observations and act within the bounds `actions`."""
    low, high = torch.tensor(actions)
    mean, std = map(torch.from_numpy, data.moments)
    model.observation_mean.copy_(mean)
    model.observation_std.copy_(std)
    model.action_middle.copy_((low + high) / 2)
    model.action_reach.copy_((high - low) / 2)


def _to_json(config: RlConfig) -> dict[str, Any]:
    fields = dataclasses.asdict(config)
    out = None if config.out is None else str(config.out.resolve())
    # a set that is named, not found by a path, keeps its name
    paths = [str(path.resolve() if path.exists() else path) for path in config.data]
    return fields | {"data": paths, "out": out}
