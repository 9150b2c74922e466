"""Acting: a decision model plays an environment, from a window of steps or a state it carries."""

import contextlib
import importlib.util
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from minrnn.configs import check_fields
from minrnn.decision import DecisionModel
from minrnn.environments import DEFAULT_LIMIT, begin, bounded, check_spaces, making, step
from minrnn.state import State, row_numbers

Way = Literal["window", "stream"]
# mixers whose state is all that they have read
GROWING = ("attention", "hyena", "mamba-hyena")
# endings of the videos that are written
_VIDEOS = (".mp4", ".gif")
_NEEDS = "this needs {}, which is not installed: pip install 'minrnn[rl]'"


@dataclass(frozen=True)
class ActingConfig:
    """How episodes are played.

    Raises:
        ValueError: a field is out of range.
        TypeError: a field has another type.
    """

    target: float | None = None
    """The return that is asked for; None for that of the run."""
    episodes: int = 100
    """Episodes to play."""
    way: Way = "window"
    """window computes the last `context` steps for each action; stream carries a state."""
    context: int = 0
    """Steps in a window; 0 for those of the training."""
    parallel: int = 25
    """Episodes that are played at a time, one batch for the model."""
    seed: int = 0
    """Of the environments."""

    def __post_init__(self) -> None:
        check_fields(self)
        for name, least in (("episodes", 1), ("parallel", 1), ("context", 0), ("seed", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"`{name}` must be >= {least}, got {getattr(self, name)}")


class Played(NamedTuple):
    """What came of the episodes."""

    returns: list[float]
    """of each episode"""
    lengths: list[int]
    """of each episode"""
    seconds_per_action: float
    """that the model took, over all actions; of several episodes at a time"""


class Actor(Protocol):
    """Tells actions, step by step, for several episodes at once."""

    def act(self, x: Tensor) -> Tensor:
        """The actions (B, A) of the steps x (B, A + 1 + S + 1); see `DecisionModel`."""
        ...

    def select(self, rows: Sequence[int]) -> None:
        """Go on with the episodes `rows` of those before only."""
        ...


class WindowActor:
    """Computes the last steps anew for each action, as the models were trained."""

    def __init__(self, model: DecisionModel, steps: int) -> None:
        self.model, self.steps = model, steps
        self.past: Tensor | None = None

    @torch.no_grad()
    def act(self, x: Tensor) -> Tensor:
        """The actions (B, A) of the steps x (B, A + 1 + S + 1)."""
        x = x[:, None]
        self.past = x if self.past is None else torch.cat([self.past, x], dim=1)[:, -self.steps :]
        return self.model(self.past)[0][:, -1]

    def select(self, rows: Sequence[int]) -> None:
        """Go on with the episodes `rows` of those before only."""
        if self.past is not None:
            numbers = row_numbers(rows, len(self.past))
            self.past = self.past[numbers.to(self.past.device)]


class StreamActor:
    """Takes one step of work for each action, in constant memory, however long the episode.

    Raises:
        ValueError: the state of the model's mixer grows.
    """

    def __init__(self, model: DecisionModel) -> None:
        mixer = model.config.blocks.mixer
        if mixer in GROWING:
            raise ValueError(f"a stream needs a mixer of constant state, got {mixer!r}")
        self.model = model
        self.state: State | None = None

    @torch.no_grad()
    def act(self, x: Tensor) -> Tensor:
        """The actions (B, A) of the steps x (B, A + 1 + S + 1)."""
        actions, self.state = self.model(x[:, None], self.state)
        return actions[:, 0]

    def select(self, rows: Sequence[int]) -> None:
        """Go on with the episodes `rows` of those before only."""
        if self.state is not None:
            self.state = self.state.select(rows)


def play(
    model: DecisionModel, environment: str, config: ActingConfig, *, imports: bool = False
) -> Played:
    """Play episodes; the return-to-go falls by each reward.

    Chen et al. 2021, arXiv:2106.01345, section 3.

    Args:
        model: in evaluation mode.
        environment: gymnasium's name of it, e.g. Hopper-v5.
        config: how; `target` and `context` must be set.
        imports: whether `environment` may import a module; see `minrnn.environments.making`.

    Raises:
        ValueError: `target` or `context` is not set, there is no such environment, its spaces are
            not the model's, it or the model returns what is no finite number, or the model cannot
            be streamed.
        ModuleNotFoundError: gymnasium, or what the environment needs, is not installed.
    """
    target = _target(config)
    returns: list[float] = []
    lengths: list[int] = []
    seconds = 0.0
    with contextlib.ExitStack() as stack:
        size = min(config.parallel, config.episodes)
        environments = [
            stack.enter_context(making(environment, imports=imports)) for _ in range(size)
        ]
        check_spaces(environments[0], _sizes(model))
        for first in range(0, config.episodes, size):
            now = environments[: config.episodes - first]
            seeds = [config.seed * 1_000_003 + first + n for n in range(len(now))]
            batch = _play(_actor(model, config), now, seeds, target)
            returns += batch.returns
            lengths += batch.lengths
            seconds += batch.seconds_per_action * sum(batch.lengths)
    return Played(returns, lengths, seconds / sum(lengths))


def _target(config: ActingConfig) -> float:
    if config.target is None or config.context < 1:
        raise ValueError(
            f"`target` and `context` must be set, got {config.target} and {config.context}"
        )
    return config.target


def _sizes(model: DecisionModel) -> tuple[int, int]:
    return model.config.observation_size, model.config.action_size


def _actor(model: DecisionModel, config: ActingConfig) -> Actor:
    return StreamActor(model) if config.way == "stream" else WindowActor(model, config.context)


def _play(actor: Actor, environments: list[Any], seeds: list[int], target: float) -> Played:
    """One episode of each environment, all at once."""
    size, space = len(environments), environments[0].action_space
    limit = DEFAULT_LIMIT if environments[0].spec.max_episode_steps is None else sys.maxsize
    begun = [begin(env, seed) for env, seed in zip(environments, seeds, strict=True)]
    observations = np.stack(begun).astype(np.float32)
    before = np.zeros((size, *space.shape), dtype=np.float32)
    to_go = np.full((size, 1), target, dtype=np.float64)
    returns, lengths = np.zeros(size), np.zeros(size, dtype=int)
    live, seconds = np.arange(size), 0.0
    for number in count():
        columns = (before[live], to_go[live], observations[live], np.full((len(live), 1), number))
        x = np.concatenate(columns, axis=1, dtype=np.float32, casting="same_kind")
        start = time.perf_counter()
        outputs = actor.act(torch.from_numpy(x)).numpy()
        seconds += time.perf_counter() - start
        if not np.isfinite(outputs).all():
            raise ValueError("the actions are not finite: the model's weights are broken")
        # rounding may carry an action past its bound
        actions = bounded(space, outputs)
        before[live] = actions
        going = []
        for place, row in enumerate(live):
            result = step(environments[row], actions[place])
            observations[row] = result.observation
            returns[row] += result.reward
            to_go[row] -= result.reward
            lengths[row] += 1
            if not (result.terminated or result.truncated or lengths[row] >= limit):
                going.append(place)
        if not going:
            break
        if len(going) < len(live):
            actor.select(going)
            live = live[going]
    return Played(returns.tolist(), lengths.tolist(), seconds / int(lengths.sum()))


def record(
    model: DecisionModel,
    environment: str,
    config: ActingConfig,
    path: Path,
    *,
    imports: bool = False,
) -> float:
    """Play one episode and write a video of it, frame by frame; returns its return.

    Args:
        model: in evaluation mode.
        environment: gymnasium's name of it.
        config: how; `target` and `context` must be set.
        path: the file to write, MP4 or GIF by its ending.
        imports: whether `environment` may import a module; see `minrnn.environments.making`.

    Raises:
        ValueError: as `play`, `path` has another ending, or no renderer works here.
        FileNotFoundError: the folder of `path` does not exist.
        ModuleNotFoundError: a package is missing.
    """
    target, kind = _target(config), path.suffix.lower()
    if kind not in _VIDEOS:
        raise ValueError(f"the video must end in {' or '.join(_VIDEOS)}, got {path}")
    if kind == ".mp4" and importlib.util.find_spec("imageio_ffmpeg") is None:
        raise ModuleNotFoundError(_NEEDS.format("imageio[ffmpeg]"))
    if not path.parent.is_dir():
        raise FileNotFoundError(f"the folder {path.parent} does not exist")
    if path.is_dir():
        raise ValueError(f"the video must be a file, {path} is a folder")
    if sys.platform == "linux" and "DISPLAY" not in os.environ:
        # MuJoCo's renderer without a screen; taken when it is first imported
        os.environ.setdefault("MUJOCO_GL", "egl")
    with making(environment, imports=imports, render_mode="rgb_array") as plain:
        check_spaces(plain, _sizes(model))
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as scratch:
            made = Path(scratch) / f"video{kind}"
            with contextlib.closing(_film(made, plain.metadata.get("render_fps") or 30)) as film:
                filmed = _Filmed(plain, film)
                played = _play(_actor(model, config), [filmed], [config.seed], target)
            made.replace(path)
    return played.returns[0]


def _film(path: Path, rate: float) -> Any:
    """What takes frames and writes them to `path`."""
    try:
        import imageio.v2 as imageio
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(_NEEDS.format("imageio[ffmpeg]")) from error
    if path.suffix == ".gif":
        # milliseconds a frame; viewers slow down what is shorter than 20
        return imageio.get_writer(path, duration=max(20, round(1000 / rate)), loop=0)
    return imageio.get_writer(path, fps=rate, macro_block_size=1)


class _Filmed:
    """An environment of which every step becomes a frame."""

    def __init__(self, environment: Any, film: Any) -> None:
        self.environment, self.film = environment, film
        self.action_space, self.spec = environment.action_space, environment.spec
        self.observation_space = environment.observation_space

    def reset(self, **options: Any) -> Any:
        found = self.environment.reset(**options)
        self._take()
        return found

    def step(self, action: np.ndarray) -> Any:
        found = self.environment.step(action)
        self._take()
        return found

    def _take(self) -> None:
        try:
            frame = self.environment.render()
        # whatever a missing display makes a renderer raise
        except Exception as error:
            raise ValueError(
                f"no video: nothing renders {self.spec.id} here ({error}); MUJOCO_GL=egl and "
                "MUJOCO_GL=osmesa choose renderers without a screen"
            ) from error
        # a copy: the environment may draw the next one into the same buffer
        frame = np.array(frame)
        if frame.ndim != 3 or frame.dtype != np.uint8:
            raise ValueError(
                f"no video: {self.spec.id} must render (height, width, 3) of uint8, got shape "
                f"{frame.shape} of {frame.dtype}"
            )
        # videos have even sizes
        height, width, _ = frame.shape
        edges = ((0, height % 2), (0, width % 2), (0, 0))
        self.film.append_data(np.pad(frame, edges, mode="edge"))
