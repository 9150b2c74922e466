"""Made-up episodes, for tests."""

import numpy as np

from minrnn.data.trajectories import REFERENCE_RETURNS, Trajectories


def episodes(lengths: tuple[int, ...], observation_size: int = 11) -> Trajectories:
    """Made-up episodes of a Hopper; every second one is ended by the environment."""
    random = np.random.default_rng(sum(lengths))
    steps = sum(lengths)
    return Trajectories(
        random.normal(size=(steps, observation_size)).astype(np.float32),
        random.uniform(-1, 1, (steps, 3)).astype(np.float32),
        random.normal(size=steps).astype(np.float32),
        np.cumsum(lengths),
        np.arange(len(lengths)) % 2 == 0,
        "Hopper-v5",
        REFERENCE_RETURNS["Hopper"],
    )
