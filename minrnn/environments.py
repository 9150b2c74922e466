"""Environments of gymnasium: made by name, checked, and stepped through copies.

An environment may return its own buffers and write to the action that it is given. Nothing that
crosses the border is shared: observations, rewards and actions are copied in both directions.
"""

import contextlib
import shlex
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

# steps after which an episode ends whose environment sets no limit
DEFAULT_LIMIT = 1000


class Step(NamedTuple):
    """What an environment returned for an action, as values of its own."""

    observation: np.ndarray
    reward: float
    terminated: bool
    """whether the environment ended the episode"""
    truncated: bool
    """whether its time is over"""


@contextlib.contextmanager
def making(name: str, *, imports: bool = False, **options: Any) -> Iterator[Any]:
    """Make the environment `name`; it is closed at the end of the block.

    Args:
        name: gymnasium's name of it, e.g. Hopper-v5.
        imports: whether `name` may be like module:Hopper-v5, for which gymnasium imports the
            module. Only for a name that a person gave: a file must not choose what is imported.
        options: keyword arguments of the environment.

    Raises:
        ValueError: gymnasium cannot make such an environment, or `name` would import a module.
        ModuleNotFoundError: gymnasium, or what the environment needs, is not installed.
    """
    try:
        import gymnasium
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "this needs gymnasium, which is not installed: pip install 'minrnn[rl]'"
        ) from error
    if not isinstance(name, str) or not name.isprintable():
        raise ValueError(f"the name of an environment must be a printable text, got {name!r}")
    if ":" in name and not imports:
        raise ValueError(
            f"no environment {name!r}: a file names it, and its module would be imported; "
            f"if you trust it, give it by --env {shlex.quote(name)}"
        )
    with warnings.catch_warnings():
        # an older version of an environment is what was asked for
        warnings.simplefilter("ignore")
        try:
            # what it returns is checked below, in `begin` and `step`
            environment = gymnasium.make(name, disable_env_checker=True, **options)
        except gymnasium.error.DependencyNotInstalled as error:
            raise ModuleNotFoundError(f"{name}: {_line(error)}") from error
        # registered names end in code of any package, which raises what it likes
        except Exception as error:
            reason = f"no environment {name!r}: {_line(error)}"
            newer = _newer(name)
            raise ValueError(f"{reason}; give --env {newer}" if newer else reason) from error
    try:
        yield environment
    finally:
        environment.close()


def _line(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__


def _newer(name: str) -> str | None:
    """The latest version of the environment `name`, if that is a newer one."""
    import gymnasium
    from gymnasium.envs import registration

    try:
        namespace, plain, version = registration.parse_env_id(name.rpartition(":")[2])
    except gymnasium.error.Error:
        return None
    latest = registration.find_highest_version(namespace, plain)
    if version is None or latest is None or latest <= version:
        return None
    return registration.get_env_id(namespace, plain, latest)


def check_spaces(environment: Any, sizes: tuple[int, int] | None = None) -> None:
    """Check that an environment observes and does what a model, or data, does.

    Args:
        environment: of gymnasium.
        sizes: numbers of an observation and of an action; None for any.

    Raises:
        ValueError: a space is no box of that many numbers, or actions have no bounds.
    """
    name = environment.spec.id
    for place, what in enumerate(("observation", "action")):
        space = getattr(environment, f"{what}_space")
        if getattr(space, "low", None) is None or len(space.shape) != 1:
            raise ValueError(f"{name} must have {what}s that are vectors of numbers, got {space}")
        if sizes is not None and space.shape != (sizes[place],):
            raise ValueError(
                f"{name} must have {what}s of {sizes[place]} numbers, those of the data and the "
                f"model, got {space}"
            )
    low, high = action_bounds(environment)
    with np.errstate(over="ignore", invalid="ignore"):
        # bounds as wide as float32 are none
        bounded = np.isfinite(high - low).all()
    if not bounded:
        raise ValueError(f"{name} must have bounded actions, got no bounds")


def action_bounds(environment: Any) -> tuple[np.ndarray, np.ndarray]:
    """The lowest and the highest action, (A,) float32 each."""
    space = environment.action_space
    return space.low.astype(np.float32), space.high.astype(np.float32)


def bounded(space: Any, actions: np.ndarray) -> np.ndarray:
    """`actions` (..., A) as `space` has them: in its dtype, within its bounds, a new array."""
    if np.issubdtype(space.dtype, np.integer):
        actions = np.rint(actions)
    return np.clip(actions, space.low, space.high).astype(space.dtype)


def begin(environment: Any, seed: int | None = None) -> np.ndarray:
    """Reset the environment; returns the first observation, a copy.

    Raises:
        ValueError: it is no finite vector of the size that the environment's space says.
    """
    observation, _ = environment.reset(seed=seed)
    return _observed(environment, observation)


def step(environment: Any, action: np.ndarray) -> Step:
    """Do `action`, of which the environment gets a copy; returns copies of the result.

    Raises:
        ValueError: the observation is no finite vector of the size that the environment's space
            says, or the reward is no finite number.
    """
    observation, reward, terminated, truncated, _ = environment.step(np.array(action))
    return Step(
        _observed(environment, observation),
        _number(environment, "reward", reward),
        bool(_number(environment, "terminated", terminated)),
        bool(_number(environment, "truncated", truncated)),
    )


def _observed(environment: Any, observation: Any) -> np.ndarray:
    copied = np.array(observation)
    shape = environment.observation_space.shape
    if copied.shape != shape or copied.dtype.kind not in "biuf" or not np.isfinite(copied).all():
        raise ValueError(
            f"{environment.spec.id} must observe finite numbers of shape {shape}, got {observation}"
        )
    return copied


def _number(environment: Any, name: str, value: Any) -> float:
    """One number: of Python or NumPy, or in an array or a tensor of one element."""
    try:
        found = np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError):
        found = np.empty(0)
    if found.size != 1 or not np.isfinite(found).all():
        raise ValueError(
            f"{environment.spec.id} must return one finite number as `{name}`, got {value!r}"
        )
    return float(found.item())
