"""Recording episodes: an environment played at random or by a policy of stable-baselines3."""

import io
import re
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Literal

import numpy as np
import torch

from minrnn import acting
from minrnn.configs import check_fields
from minrnn.data.trajectories import REFERENCE_RETURNS, Trajectories, value_of

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

    def __post_init__(self) -> None:
        check_fields(self)
        if self.episodes < 1:
            raise ValueError(f"`episodes` must be >= 1, got {self.episodes}")
        if self.seed < 0:
            raise ValueError(f"`seed` must be >= 0, got {self.seed}")


def collect(
    environment: str, config: CollectConfig, progress: Callable[[int], None] = lambda done: None
) -> Trajectories:
    """Play whole episodes and keep what was seen, done and rewarded.

    Args:
        environment: gymnasium's name of it; its observations and actions are vectors.
        config: who plays, and how much.
        progress: called with the number of episodes done after each.

    Raises:
        ValueError: the environment is not known or has other spaces, or the policy does not fit.
        FileNotFoundError: there is no such policy.
        ModuleNotFoundError: gymnasium or stable-baselines3 is not installed.
    """
    torch.manual_seed(config.seed)
    rows: dict[str, list[Any]] = {"observations": [], "actions": [], "rewards": []}
    ends, terminated = [], []
    with acting.making(environment) as env:
        acting.check_spaces(env)
        env.action_space.seed(config.seed)
        act = _policy(config, env)
        observation, _ = env.reset(seed=config.seed)
        while len(ends) < config.episodes:
            action = act(observation)
            following, reward, ended, cut, _ = env.step(action)
            for name, value in zip(rows, (observation, action, reward), strict=True):
                rows[name].append(np.asarray(value, dtype=np.float32))
            observation = following
            if ended or cut:
                ends.append(len(rows["rewards"]))
                terminated.append(ended)
                progress(len(ends))
                observation, _ = env.reset()
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
    except (zipfile.BadZipFile, KeyError, RuntimeError, ValueError, UnpicklingError) as error:
        why = str(error).partition("\n")[0]
        raise ValueError(f"{path} is no policy of stable-baselines3: {why}") from error
    actor, critic = (_widths(weights, name) for name in _LAYERS[algorithm])
    options: dict[str, Any] = {"net_arch": {"pi": actor, "qf": critic}}
    if algorithm in ("ppo", "a2c"):
        options = {"net_arch": {"pi": actor, "vf": critic}}
    # the setting itself is a pickle; its name stands beside it
    function = re.search(r"activation_fn[^>]*torch\.nn\.modules\.activation\.(\w+)", settings)
    if function is not None:
        options["activation_fn"] = getattr(torch.nn, function[1])
    kind = getattr(stable_baselines3, algorithm.upper())
    model = kind("MlpPolicy", env, policy_kwargs=options, device="cpu")
    try:
        model.policy.load_state_dict(weights)
    except RuntimeError as error:
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
