"""Episodes of observations, actions and rewards -> windows to learn decisions from."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
import torch

from minrnn.data.batch import Batch

# environment -> mean return of a random and of an expert policy: Fu et al. 2020, arXiv:2004.07219,
# as D4RL's code has them (its `infos.py`), whatever the version of the environment
REFERENCE_RETURNS: dict[str, tuple[float, float]] = {
    "HalfCheetah": (-280.178953, 12135.0),
    "Hopper": (-20.272305, 3234.3),
    "Walker2d": (1.629008, 4592.3),
}
# environment -> the return that a model is asked for: Chen et al. 2021, arXiv:2106.01345, table 11
TARGET_RETURNS: dict[str, float] = {"HalfCheetah": 12000.0, "Hopper": 3600.0, "Walker2d": 5000.0}
_T = TypeVar("_T")


@dataclass(frozen=True, eq=False)
class Trajectories:
    """Whole episodes, one after the other. The arrays are copies of those that are passed in.

    Raises:
        ValueError: shapes differ, a number is not finite, there is no episode, or the reference
            returns do not rise.
        TypeError: a field has another type.
    """

    observations: np.ndarray
    """(N, S) float32, before each action"""
    actions: np.ndarray
    """(N, A) float32"""
    rewards: np.ndarray
    """(N,) float32, for each action"""
    ends: np.ndarray
    """(E,) int64, the number of steps up to the end of each episode"""
    terminated: np.ndarray
    """(E,) bool, whether the environment ended it; else its time was over"""
    environment: str | None = None
    """e.g. Hopper-v5"""
    reference: tuple[float, float] | None = None
    """mean return of a random and of an expert policy, which a score is measured by"""

    def __post_init__(self) -> None:
        kinds = {"observations": "biuf", "actions": "biuf", "rewards": "biuf", "ends": "iu"}
        dtypes = {"ends": np.int64, "terminated": np.bool_}
        for name, kind in (kinds | {"terminated": "b"}).items():
            dtype = dtypes.get(name, np.float32)
            object.__setattr__(self, name, _copy(name, getattr(self, name), kind, dtype))
        name = self.environment
        if name is not None and not (isinstance(name, str) and name.isprintable()):
            raise TypeError(f"`environment` must be a printable str or None, got {name!r}")
        if self.reference is not None:
            object.__setattr__(self, "reference", checked_reference(self.reference))
        if self.rewards.ndim != 1:
            raise ValueError(f"`rewards` must have shape (N,), got {self.rewards.shape}")
        steps = len(self.rewards)
        for name in ("observations", "actions"):
            value = getattr(self, name)
            if value.ndim != 2 or len(value) != steps or value.shape[1] < 1:
                raise ValueError(
                    f"`{name}` must have shape (N, features) with N = {steps}, that of the "
                    f"rewards, got {value.shape}"
                )
        self._check_ends(steps)
        for name in ("observations", "actions", "rewards"):
            bad = ~np.isfinite(getattr(self, name)).reshape(steps, -1).all(axis=1)
            if bad.any():
                raise ValueError(
                    f"`{name}` must be finite, row {int(bad.argmax())} and {int(bad.sum()) - 1} "
                    "others are not"
                )

    def _check_ends(self, steps: int) -> None:
        if self.ends.ndim != 1 or self.terminated.shape != self.ends.shape:
            raise ValueError(
                "`ends` and `terminated` must have shape (E,), got "
                f"{self.ends.shape} and {self.terminated.shape}"
            )
        if len(self.ends) == 0:
            raise ValueError("there must be at least one whole episode, got none")
        short = np.diff(self.ends, prepend=0) < 1
        if short.any():
            episode = int(short.argmax())
            before = f" after {self.ends[episode - 1]}" if episode else ""
            raise ValueError(
                "`ends` must be strictly increasing from >= 1, got "
                f"{self.ends[episode]}{before} for episode {episode}"
            )
        if self.ends[-1] != steps:
            raise ValueError(
                f"the last of `ends` must be N = {steps}, the number of steps, got {self.ends[-1]}"
            )

    @property
    def num_episodes(self) -> int:
        """How many episodes there are, E."""
        return len(self.ends)

    @property
    def num_steps(self) -> int:
        """How many steps they have in all, N."""
        return len(self.rewards)

    @cached_property
    def starts(self) -> np.ndarray:
        """(E,) int64, the first step of each episode."""
        return np.concatenate([[0], self.ends[:-1]])

    @cached_property
    def lengths(self) -> np.ndarray:
        """(E,) int64, steps of each episode."""
        return self.ends - self.starts

    @cached_property
    def returns(self) -> np.ndarray:
        """(E,) float64, the sum of rewards of each episode."""
        return self.to_go[self.starts]

    @cached_property
    def to_go(self) -> np.ndarray:
        """(N,) float64, the sum of rewards from each step to the end of its episode."""
        # each episode alone: a difference of sums over all would lose small rewards to large ones
        sums = self.rewards.astype(np.float64)
        for start, end in zip(self.starts.tolist(), self.ends.tolist(), strict=True):
            sums[start:end] = sums[start:end][::-1].cumsum()[::-1]
        return sums

    @cached_property
    def moments(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation (S,) of the observations, float32.

        The deviation is 1 for a number that never changes, or only as rounding does.
        """
        mean = self.observations.mean(axis=0, dtype=np.float64)
        std = self.observations.std(axis=0, dtype=np.float64)
        # float32 rounds at 6e-8 of a number, and has none far below 1e-37
        least = np.maximum(1e-6 * np.abs(self.observations).max(axis=0), 1e-30)
        return mean.astype(np.float32), np.where(std > least, std, 1.0).astype(np.float32)

    @property
    def return_scale(self) -> float:
        """The largest power of ten up to the largest |return-to-go|; 1 if all of them are 0.

        Returns divided by it lie within -10 to 10, and not all within -1 to 1. For the returns of
        Hopper, HalfCheetah and Walker2d that is the 1,000 of Chen et al. 2021, arXiv:2106.01345.
        """
        largest = float(np.abs(self.to_go).max())
        # float32 has no numbers far below 1e-37
        return 10.0 ** max(-30, math.floor(math.log10(largest))) if largest > 0 else 1.0

    def outside(self, low: np.ndarray, high: np.ndarray) -> tuple[int, float]:
        """How many actions lie outside `low` to `high`, (A,) each, and the largest excess.

        Excess of the size of float32's rounding does not count.
        """
        excess = np.maximum(low - self.actions, self.actions - high)
        beyond = excess > 1e-6 * np.maximum(np.abs(low), np.abs(high))
        return int(beyond.any(axis=1).sum()), float(excess.max(initial=0.0, where=beyond))

    def clipped(self, low: np.ndarray, high: np.ndarray) -> "Trajectories":
        """The same episodes, with actions clipped to `low` to `high`, (A,) each."""
        return replace(self, actions=np.clip(self.actions, low, high))

    def best(self, fraction: float) -> "Trajectories":
        """The episodes with the highest returns that make up at least `fraction` of the steps.

        Raises:
            ValueError: `fraction` is not in (0, 1].
        """
        if not 0 < fraction <= 1:
            raise ValueError(f"`fraction` must be in (0, 1], got {fraction}")
        order = np.argsort(-self.returns, kind="stable")
        enough = np.cumsum(self.lengths[order]) >= fraction * self.num_steps
        return self.take(np.sort(order[: int(enough.argmax()) + 1]))

    def take(self, episodes: Sequence[int] | np.ndarray) -> "Trajectories":
        """The `episodes`, in that order.

        Args:
            episodes: numbers in [0, E); or a mask, (E,) bool, e.g. `data.returns > 100`.

        Raises:
            ValueError: a number is outside, `episodes` has not one axis, a mask has not E entries,
                or no episode is left.
            TypeError: `episodes` holds neither integers nor bools.
        """
        episodes = _numbers(episodes, self.num_episodes)
        if len(episodes) == 0:
            raise ValueError("`episodes` must select at least one episode, got none")
        bounds = zip(self.starts[episodes].tolist(), self.ends[episodes].tolist(), strict=True)
        rows = np.concatenate([np.arange(first, end) for first, end in bounds])
        return Trajectories(
            self.observations[rows],
            self.actions[rows],
            self.rewards[rows],
            np.cumsum(self.lengths[episodes]),
            self.terminated[episodes],
            self.environment,
            self.reference,
        )

    def score(self, value: float) -> float | None:
        """`value`, a return, on a scale from 0 (random) to 100 (expert); None without reference."""
        return normalized(value, self.reference)


def _copy(name: str, value: Any, kinds: str, dtype: Any) -> np.ndarray:
    """`value` as an array of its own; its dtype must be of `kinds`, letters of numpy."""
    found = np.asarray(value)
    if found.dtype.kind not in kinds:
        raise TypeError(f"`{name}` must be {np.dtype(dtype)}, got dtype {found.dtype}")
    with np.errstate(over="ignore"):
        # what float32 cannot hold becomes infinite, which is refused
        return np.array(found, dtype=dtype)


def checked_reference(value: Any) -> tuple[float, float]:
    """Reference returns (random, expert) as two numbers.

    Raises:
        ValueError: they are not two finite numbers, the second above the first.
    """
    try:
        lowest, highest = (float(np.asarray(part, dtype=np.float64).item()) for part in value)
    except (TypeError, ValueError):
        lowest = highest = math.nan
    if not (math.isfinite(lowest) and math.isfinite(highest) and lowest < highest):
        raise ValueError(
            f"`reference` must be two finite returns (random, expert), rising, got {value}"
        )
    return lowest, highest


def _numbers(episodes: Sequence[int] | np.ndarray, count: int) -> np.ndarray:
    """`episodes` as numbers in [0, count)."""
    found = np.asarray(episodes)
    if found.ndim != 1:
        raise ValueError(f"`episodes` must have one axis, (N,), got shape {found.shape}")
    if found.dtype == bool:
        if len(found) != count:
            raise ValueError(
                f"`episodes` as a mask must have E = {count} entries, got {len(found)}"
            )
        return found.nonzero()[0]
    if len(found) and found.dtype.kind not in "iu":
        raise TypeError(f"`episodes` must hold integers or bools, got {found.dtype}")
    outside = (found < 0) | (found >= count)
    if outside.any():
        bad = int(found[outside][0])
        raise ValueError(f"`episodes` must be in [0, E) = [0, {count}), got {bad}")
    return found.astype(np.int64)


def normalized(value: float, reference: tuple[float, float] | None) -> float | None:
    """100 (R - random) / (expert - random), D4RL's score of a return R; None without reference.

    Example:
        >>> normalized(3234.3, REFERENCE_RETURNS["Hopper"])
        100.0
    """
    if reference is None:
        return None
    lowest, highest = reference
    return 100 * (value - lowest) / (highest - lowest)


def value_of(table: Mapping[str, _T], environment: str | None) -> _T | None:
    """What `table` has for an environment, whatever its version, e.g. for Hopper-v5.

    Example:
        >>> value_of(TARGET_RETURNS, "Hopper-v5")
        3600.0
    """
    return table.get((environment or "").partition("-")[0])


def windows(
    data: Trajectories,
    steps: int,
    batch_size: int,
    seed: tuple[int, ...],
    observation_noise: float = 0.0,
) -> Batch:
    """Draw windows of up to `steps` steps: an episode in proportion to its length, then a start.

    Chen et al. 2021, arXiv:2106.01345, as their code does it, but for two things. Padding stands
    behind the steps, where nothing that is causal sees it: for every mixer a padded row answers as
    the row alone, without a mask. And a step begins with the action before it, zeros at the start
    of an episode, so that one call of a model takes one step of its environment.

    Args:
        data: N steps in E episodes.
        steps: K; windows near the end of an episode are shorter, and padded with zeros.
        batch_size: B.
        seed: what the windows depend on, and nothing else.
        observation_noise: standard deviation of what is added to each observation, in those of
            the data; the same windows are drawn with it.

    Returns:
        inputs (B, K, A + 1 + S + 1): the action before, the return-to-go, the observation, the
        number of the step in its episode; targets (B, K, A): the action; the mask is False where
        there is no step.

    Raises:
        ValueError: `steps` or `batch_size` < 1.
    """
    if steps < 1 or batch_size < 1:
        raise ValueError(f"`steps` and `batch_size` must be >= 1, got {steps}, {batch_size}")
    random = np.random.default_rng(seed)
    # every step of the data is as likely to be the first of a window
    first = random.integers(data.num_steps, size=batch_size)
    episode = np.searchsorted(data.ends, first, side="right")
    # (B, K)
    rows = first[:, None] + np.arange(steps)
    inside = rows < data.ends[episode][:, None]
    rows = np.minimum(rows, data.num_steps - 1)
    number = rows - data.starts[episode][:, None]
    before = data.actions[np.maximum(rows - 1, 0)] * (number > 0)[:, :, None]
    observations = data.observations[rows]
    if observation_noise:
        drawn = random.standard_normal(observations.shape, dtype=np.float32)
        observations = observations + observation_noise * data.moments[1] * drawn
    columns = (before, data.to_go[rows][:, :, None], observations, number[:, :, None])
    inputs = np.concatenate(columns, axis=2, dtype=np.float32, casting="same_kind")
    targets = data.actions[rows] * inside[:, :, None]
    inputs *= inside[:, :, None]
    return Batch(torch.from_numpy(inputs), torch.from_numpy(targets), torch.from_numpy(inside))
