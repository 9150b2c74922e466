"""Recording episodes: an environment played at random or by a policy of stable-baselines3."""

import io
import re
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from minrnn.configs import check_fields
from minrnn.data.trajectories import REFERENCE_RETURNS, Trajectories, value_of
from minrnn.environments import DEFAULT_LIMIT, begin, check_spaces, making, step

Algorithm = Literal["ppo", "a2c", "sac", "td3", "ddpg"]
# where a saved policy has the layers of its actor and of its critic
_LAYERS = {
    "ppo": ("mlp_extractor.policy_net", "mlp_extractor.value_net"),
    "a2c": ("mlp_extractor.policy_net", "mlp_extractor.value_net"),
    "sac": ("actor.latent_pi", "critic.qf0"),
    "td3": ("actor.mu", "critic.qf0"),
    "ddpg": ("actor.mu", "critic.qf0"),
}


@dataclass(frozen=True)
class CollectConfig:
    """How episodes are recorded.

    Raises:
        ValueError: a field is out of range.
        TypeError: a field has another type.
    """

    policy: Path | None = None
    """What `save` of stable-baselines3 wrote (.zip); None acts at random. Its weights are read and
    nothing else, so that no code in the file can run."""
    algorithm: Algorithm = "ppo"
    """What trained the policy."""
    episodes: int = 100
    """How many."""
    seed: int = 0
    """Of the environment and the actions."""
    deterministic: bool = False
    """Take the policy's mean, not a sample."""
    max_episode_steps: int | None = None
    """Steps after which an episode is cut; None for the environment's own limit, or 1,000 where it
    has none."""

    def __post_init__(self) -> None:
        check_fields(self)
        if self.episodes < 1:
            raise ValueError(f"`episodes` must be >= 1, got {self.episodes}")
        if self.seed < 0:
            raise ValueError(f"`seed` must be >= 0, got {self.seed}")
        if self.max_episode_steps is not None and self.max_episode_steps < 1:
            raise ValueError(f"`max_episode_steps` must be >= 1, got {self.max_episode_steps}")


def collect(
    environment: str,
    config: CollectConfig,
    progress: Callable[[int], None] = lambda done: None,
    *,
    imports: bool = False,
) -> Trajectories:
    """Play whole episodes and keep what was seen, done and rewarded.

    Args:
        environment: gymnasium's name of it; its observations and actions are vectors.
        config: who plays, and how much.
        progress: called with the number of episodes done after each.
        imports: whether `environment` may import a module; see `minrnn.environments.making`.

    Raises:
        ValueError: the environment is not known, has other spaces, or returns what is no number,
            or the policy does not fit.
        FileNotFoundError: there is no such policy.
        ModuleNotFoundError: gymnasium or stable-baselines3 is not installed.
    """
    rows: dict[str, list[Any]] = {"observations": [], "actions": [], "rewards": []}
    ends, terminated = [], []
    # the caller's random numbers stay where they were
    with torch.random.fork_rng(devices=[]), making(environment, imports=imports) as env:
        torch.manual_seed(config.seed)
        check_spaces(env)
        limit = config.max_episode_steps
        if limit is None and env.spec.max_episode_steps is None:
            limit = DEFAULT_LIMIT
        env.action_space.seed(config.seed)
        act = _policy(config, env)
        observation, length = begin(env, config.seed), 0
        while len(ends) < config.episodes:
            # neither the policy nor the environment gets the arrays that are kept
            action = np.array(act(observation.copy()))
            result = step(env, action)
            length += 1
            for name, value in zip(rows, (observation, action, result.reward), strict=True):
                rows[name].append(np.array(value, dtype=np.float32))
            observation = result.observation
            if result.terminated or result.truncated or length == limit:
                ends.append(len(rows["rewards"]))
                terminated.append(result.terminated)
                progress(len(ends))
                observation, length = begin(env), 0
    return Trajectories(
        np.stack(rows["observations"]),
        np.stack(rows["actions"]),
        np.stack(rows["rewards"]),
        np.array(ends),
        np.array(terminated),
        environment,
        value_of(REFERENCE_RETURNS, environment),
    )


def _policy(config: CollectConfig, env: Any) -> Callable[[np.ndarray], np.ndarray]:
    """What acts: chance, or a network of the shapes that the saved weights have."""
    path, algorithm = config.policy, config.algorithm
    if path is None:
        return lambda observation: env.action_space.sample()
    if not path.is_file():
        raise FileNotFoundError(f"`policy` must name a file, {path} does not exist")
    try:
        import stable_baselines3
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "this needs stable-baselines3, which is not installed: pip install 'minrnn[sb3]'"
        ) from error
    try:
        with zipfile.ZipFile(path) as archive:
            content, settings = archive.read("policy.pth"), archive.read("data").decode()
        weights = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        if not isinstance(weights, dict) or not all(map(torch.is_tensor, weights.values())):
            raise ValueError("policy.pth must hold tensors by name")
    # damaged bytes make zipfile and torch raise whatever these spell
    except Exception as error:
        why = str(error).partition("\n")[0]
        raise ValueError(f"{path} is no policy of stable-baselines3: {why}") from error
    actor, critic = (_widths(weights, name) for name in _LAYERS[algorithm])
    options: dict[str, Any] = {"net_arch": {"pi": actor, "qf": critic}}
    if algorithm in ("ppo", "a2c"):
        options = {"net_arch": {"pi": actor, "vf": critic}}
    # the setting itself is a pickle; its name stands beside it
    function = re.search(r"activation_fn[^>]*torch\.nn\.modules\.activation\.(\w+)", settings)
    if function is not None:
        activation = vars(torch.nn.modules.activation).get(function[1])
        if not isinstance(activation, type) or not issubclass(activation, torch.nn.Module):
            raise ValueError(f"{path} must have an activation of torch.nn, got {function[1]!r}")
        options["activation_fn"] = activation
    kind = getattr(stable_baselines3, algorithm.upper())
    try:
        model = kind("MlpPolicy", env, policy_kwargs=options, device="cpu")
        model.policy.load_state_dict(weights)
    except (RuntimeError, TypeError, AssertionError) as error:
        first = " ".join(str(error).split("\n")[:2])
        raise ValueError(f"{path} is no {algorithm} policy for {env.spec.id}: {first}") from error
    return lambda observation: model.predict(observation, deterministic=config.deterministic)[0]


def _widths(weights: dict[str, torch.Tensor], prefix: str) -> list[int]:
    """The widths of the hidden layers prefix.0, prefix.2, ..., an output of a layer apart."""
    rows = [
        (int(name.split(".")[-2]), x.shape[0])
        for name, x in weights.items()
        if name.startswith(f"{prefix}.") and name.endswith(".weight")
    ]
    widths = [width for _, width in sorted(rows)]
    # latent_pi, policy_net and value_net end in a hidden layer, mu and qf0 in an output
    return widths[:-1] if prefix.endswith(("mu", "qf0")) else widths
