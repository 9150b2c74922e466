"""Commands about episodes: train rl, eval of such a run, data rl."""

import json
import statistics
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

from tyro.conf import Positional

from minrnn import acting, checkpoint
from minrnn.acting import ActingConfig
from minrnn.collecting import CollectConfig, collect
from minrnn.data import trajectory_files
from minrnn.data.trajectories import Trajectories
from minrnn.decision import DecisionModel
from minrnn.recipes import RlConfig


def train_rl(config: RlConfig) -> int:
    """Train a decision model on episodes that others played."""
    from minrnn.runs import decisions

    return resume_rl(decisions.start(config))


def resume_rl(resume: Path) -> int:
    """Go on with a training on episodes.

    Args:
        resume: the run folder.
    """
    from minrnn import ranks
    from minrnn.runs import decisions

    result = decisions.go_on(resume)
    if not ranks.is_first():
        return 130 if result.interrupted else 0
    if result.interrupted:
        print(f"stopped at step {result.step}; go on by: minrnn train --resume {resume}")
        return 130
    print(f"{result.step} updates; run folder {resume}; play by: minrnn eval {resume}")
    return 0


def evaluate_rl(
    run: Positional[Path],
    env: str | None = None,
    video: Path | None = None,
    acting_config: ActingConfig = ActingConfig(),
) -> int:
    """Let the model of a run play its environment.

    Args:
        run: the run folder.
        env: gymnasium's name of another environment of the same kind.
        video: play one episode only and write it to this file (.mp4 or .gif).
        acting_config: how.
    """
    from minrnn.runs import decisions

    config, facts = decisions.read(run), decisions.facts(run)
    model = checkpoint.load(run).model
    assert isinstance(model, DecisionModel)
    # a name that a file says must not import a module
    environment, imports = env or facts.environment, bool(env)
    asked = replace(
        acting_config,
        target=decisions.target(run, environment, acting_config.target),
        context=acting_config.context or config.context,
    )
    if video is not None:
        got = acting.record(model, environment, asked, video, imports=imports)
        print(f"{video}: an episode of return {got:.1f}, asked for {asked.target:g}")
        return 0
    played = acting.play(model, environment, asked, imports=imports)
    figures: dict[str, Any] = {
        "return": statistics.fmean(played.returns),
        "deviation": statistics.pstdev(played.returns),
        "score": facts.score(statistics.fmean(played.returns), environment),
        "length": statistics.fmean(played.lengths),
        "seconds_per_action": played.seconds_per_action,
    }
    if not sys.stdout.isatty():
        print(json.dumps(figures | {"environment": environment} | asdict(asked)))
        return 0
    score = "no reference returns, no score"
    if figures["score"] is not None:
        score = f"score {figures['score']:.1f}"
    print(
        f"return {figures['return']:.1f} ± {figures['deviation']:.1f} over {asked.episodes} "
        f"episodes of {environment}, {figures['length']:.0f} steps on average; {score}; "
        f"{figures['seconds_per_action'] * 1e6:.0f} µs an action ({asked.way})"
    )
    return 0


def show_trajectories(
    data: Positional[tuple[Path, ...]],
    env: str | None = None,
    reference: tuple[float, float] | None = None,
) -> int:
    """Print what is in sets of episodes.

    Args:
        data: D4RL files (HDF5), folders of them, or Minari sets by folder or name.
        env: gymnasium's name of the environment, where the data does not say it, or several.
        reference: returns of a random and of an expert policy, which scores are measured by.
    """
    for line in _describe(trajectory_files.read(data, env, reference)):
        print(line)
    return 0


def convert_trajectories(
    data: Positional[Path],
    out: Positional[Path],
    to: Literal["minari", "d4rl"],
    env: str | None = None,
    reference: tuple[float, float] | None = None,
) -> int:
    """Turn D4RL's layout into Minari's, or back.

    Args:
        data: what to read.
        out: the folder (minari; its last part names the set, like medium-v0) or file (d4rl).
        to: the layout to write.
        env: gymnasium's name of the environment, where the data does not say it, or several.
        reference: returns of a random and of an expert policy, where neither the data nor D4RL
            has them.
    """
    if out.exists():
        raise ValueError(f"{out} exists; choose another name")
    found = trajectory_files.read((data,), env, reference)
    if to == "minari":
        trajectory_files.write_minari(found, out, imports=bool(env))
    else:
        trajectory_files.write_d4rl(found, out)
    print(f"{out}: {found.num_episodes:,} episodes, {found.num_steps:,} steps")
    return 0


def collect_trajectories(
    environment: Positional[str],
    out: Positional[Path],
    config: CollectConfig = CollectConfig(),
) -> int:
    """Record episodes that a policy of stable-baselines3, or chance, plays; as a D4RL file.

    Args:
        environment: gymnasium's name of it.
        out: the file to write (HDF5).
        config: who plays, and how much.
    """
    if out.exists():
        raise ValueError(f"{out} exists; choose another name")
    # refused now, not after hours of playing
    out.parent.mkdir(parents=True, exist_ok=True)
    from rich.progress import Progress as Bar

    with Bar(disable=not sys.stdout.isatty()) as bar:
        task = bar.add_task("episodes", total=config.episodes)

        def progress(done: int) -> None:
            bar.update(task, completed=done)

        data = collect(environment, config, progress, imports=True)
    trajectory_files.write_d4rl(data, out)
    print(f"{out}: {data.num_episodes:,} episodes, {data.num_steps:,} steps")
    return 0


def _describe(data: Trajectories) -> list[str]:
    returns, lengths = data.returns, data.lengths
    lines = [
        f"environment {data.environment or 'not said; give it by --env NAME'}",
        f"observations of {data.observations.shape[1]} numbers, actions of "
        f"{data.actions.shape[1]}, between {data.actions.min():g} and {data.actions.max():g}",
        f"episodes {data.num_episodes:,}, {int(data.terminated.sum()):,} of them ended by the "
        f"environment; steps {data.num_steps:,}",
        f"lengths mean {lengths.mean():.1f}, from {lengths.min()} to {lengths.max()}",
        f"returns mean {returns.mean():.1f}, deviation {returns.std():.1f}, from "
        f"{returns.min():.1f} to {returns.max():.1f}",
    ]
    if data.reference is None:
        lines.append("no score: no reference returns; give them by --reference RANDOM EXPERT")
    else:
        best, mean = data.score(returns.max()), data.score(returns.mean())
        lines.append(f"score mean {mean:.1f}, highest {best:.1f} (0 random, 100 expert)")
    return lines
