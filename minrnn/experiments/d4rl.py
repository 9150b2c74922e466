"""Decisions learnt from others' episodes: the paper's table of offline reinforcement learning."""

import json
import statistics
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from matplotlib.figure import Figure

from minrnn import checkpoint
from minrnn.acting import GROWING, ActingConfig, Way, play
from minrnn.configs import check_fields
from minrnn.data import trajectory_files
from minrnn.decision import DecisionModel
from minrnn.experiments.results import TextTable, publish, spread, with_earlier
from minrnn.files import write_atomically
from minrnn.models import MixerName
from minrnn.recipes import RL_RECIPES, RlConfig
from minrnn.runs import decisions

Name = Literal["bc", "bc-best", "attention", "s4d", "aaren", "mamba", "minlstm", "mingru"]
# what a file set is called: environment and behaviour
SETS: dict[str, tuple[str, ...]] = {
    f"{environment}-{behaviour}": files
    for behaviour, kinds in (
        ("medium", ("medium",)),
        ("medium-replay", ("medium-replay",)),
        ("medium-expert", ("medium", "expert")),
    )
    for environment in ("halfcheetah", "hopper", "walker2d")
    for files in [tuple(f"{environment}-{kind}.hdf5" for kind in kinds)]
}

# returns-to-go are divided by it: Chen et al. 2021, arXiv:2106.01345, for all three environments
RETURN_SCALE = 1000.0
# single steps that a clone learns from at a time
_CLONED = 256
# of width 256 and a small learning rate in the paper
_WIDE = ("hopper-medium", "hopper-medium-replay")


class Entry(NamedTuple):
    """A model, its mixer, and the scores that Feng et al. 2024 report, in the order of SETS."""

    title: str
    mixer: MixerName
    paper: str = ""


# the paper's digits, columns of its table, are not checked against its PDF
ENTRIES: dict[Name, Entry] = {
    "bc": Entry("clone of all", "none"),
    "bc-best": Entry("clone of the best tenth", "none"),
    "attention": Entry(
        "Decision Transformer", "attention", "42.6 68.4 75.5 37.0 85.6 71.2 88.8 109.6 109.3"
    ),
    "s4d": Entry("DS4 (S4D)", "s4d", "42.5 54.2 78.0 15.2 49.6 69.0 92.7 110.8 105.7"),
    "aaren": Entry("DAaren", "aaren", "42.2 80.9 74.4 37.9 77.9 71.4 75.7 103.9 110.5"),
    "mamba": Entry("DMamba", "mamba", "42.8 83.5 78.2 39.6 82.6 70.9 91.9 111.1 108.3"),
    "minlstm": Entry(
        "minLSTM",
        "minlstm",
        "42.7±0.7 85.0±4.4 72.0±7.5 38.6±1.1 88.5±4.7 69.7±10.7 85.4±1.7 110.3±1.6 110.3±0.5",
    ),
    "mingru": Entry(
        "minGRU",
        "mingru",
        "43.0±0.4 79.4±8.2 73.3±3.3 38.5±1.1 90.5±0.9 72.8±8.9 86.3±0.5 109.7±2.7 110.3±0.4",
    ),
}


class Preset(NamedTuple):
    """How much is trained and played."""

    seeds: int
    episodes: int
    asks_best: bool
    """Whether the return that is asked for is the highest of the data; else it is the usual one,
    which was chosen for D4RL's own sets."""


PRESETS = {"paper": Preset(5, 100, asks_best=False), "cpu": Preset(2, 50, asks_best=True)}


@dataclass(frozen=True)
class D4rlConfig:
    """Decision models on Hopper, HalfCheetah and Walker2d.

    Raises:
        ValueError: a field is out of range.
        TypeError: a field has another type.
    """

    data: Path
    """The folder of the sets: hopper-medium.hdf5, ... in D4RL's layout."""
    preset: Literal["cpu", "paper"] = "cpu"
    """How long is trained: 100,000 updates (paper) or some that two cores manage."""
    model: Literal[
        "all", "bc", "bc-best", "attention", "s4d", "aaren", "mamba", "minlstm", "mingru"
    ] = "all"
    """Which to train; the table has all that were trained so far."""
    sets: tuple[str, ...] = tuple(SETS)
    """Which sets."""
    seeds: int = 0
    """Trainings of each, with seeds 0, 1, ...; 0 for five (paper) or two (cpu)."""
    episodes: int = 0
    """Episodes that each plays; 0 for 100 (paper) or 50 (cpu)."""
    target: float | None = None
    """The return that is asked for; None for 3,600, 12,000 and 5,000 (paper) or the highest of the
    data (cpu)."""
    precision: Literal["no", "bf16"] = "no"
    """Mixed precision of the training; "no" is float32. Acting is float32 always."""
    runs: Path = Path("runs/d4rl")
    """Where the run folders are; what is there already goes on or is done."""
    out: Path = Path("results/d4rl")
    """Where figures.json, table.md and picture.png go."""

    def __post_init__(self) -> None:
        check_fields(self)
        unknown = [name for name in self.sets if name not in SETS]
        if unknown:
            raise ValueError(f"`sets` must be of {', '.join(SETS)}, got {unknown}")
        for name in ("seeds", "episodes"):
            if getattr(self, name) < 0:
                raise ValueError(f"`{name}` must be >= 0, got {getattr(self, name)}")


def reproduce(config: D4rlConfig, say: Callable[[str], None]) -> bool:
    """Train what is not trained yet, let it play, write the table.

    Args:
        config: what to train.
        say: called with a line before each training.

    Returns:
        False if a training was stopped; the same call goes on.

    Raises:
        FileNotFoundError: a set is missing.
        ValueError: a set is damaged.
    """
    preset = PRESETS[config.preset]
    for seed in range(config.seeds or preset.seeds):
        for name in ENTRIES if config.model == "all" else (config.model,):
            for set_name in config.sets:
                folder = config.runs / config.preset / f"{set_name}-{name}-{seed}"
                if not (folder / "played.json").is_file():
                    say(f"{set_name}, {ENTRIES[name].title}, seed {seed}: {folder}")
                    if not (folder / "config.json").is_file():
                        decisions.start(run_config(config, set_name, name, seed, folder))
                    if decisions.go_on(folder).interrupted:
                        return False
                    _play(folder, config.episodes or preset.episodes, preset, config.target)
                write(config)
    return True


def run_config(config: D4rlConfig, set_name: str, name: Name, seed: int, folder: Path) -> RlConfig:
    """The run of a model on a set."""
    recipe = RL_RECIPES[config.preset]
    mixer, clone = ENTRIES[name].mixer, ENTRIES[name].mixer == "none"
    blocks = replace(recipe.model.blocks, mixer=mixer)
    train = replace(recipe.train, seed=seed, precision=config.precision)
    if config.preset == "paper" and set_name in _WIDE:
        blocks = replace(blocks, width=256)
    if config.preset == "paper" and set_name in (*_WIDE, "walker2d-medium"):
        train = replace(train, learning_rate=1e-4, min_learning_rate=1e-4)
    # the scale of the published table, whatever the data gives; a clone looks at what it sees now,
    # not at the time
    model = replace(recipe.model, blocks=blocks, return_scale=RETURN_SCALE)
    return replace(
        recipe,
        data=tuple(config.data / file for file in SETS[set_name]),
        out=folder,
        context=1 if clone else recipe.context,
        best=0.1 if name == "bc-best" else 1.0,
        # plain clones, as the data's notes have them
        observation_noise=0.0 if clone else recipe.observation_noise,
        model=replace(model, episode_length=0) if clone else model,
        train=replace(train, batch_size=_CLONED) if clone else train,
    )


def _play(folder: Path, episodes: int, preset: Preset, target: float | None) -> None:
    """Let the model of a run play in every way it can, and keep what came of it."""
    model, facts = checkpoint.load(folder).model, decisions.facts(folder)
    assert isinstance(model, DecisionModel)
    context, environment = decisions.read(folder).context, facts.environment
    if target is None and preset.asks_best:
        target = facts.best_return
    asked = decisions.target(folder, environment, target)
    ways: list[Way] = ["window"]
    if model.config.blocks.mixer not in (*GROWING, "none"):
        ways.append("stream")
    found = {
        way: play(model, environment, ActingConfig(asked, episodes, way, context))._asdict()
        for way in ways
    }
    facts = {"environment": environment, "target": asked, "ways": found}
    write_atomically(folder / "played.json", (json.dumps(facts, indent=1) + "\n").encode())


def write(config: D4rlConfig) -> None:
    """Write the folder of results from all runs of the preset that are done."""
    done = [run | {"preset": config.preset} for run in _done(config)]
    runs = with_earlier(config.out, done, ("preset", "set", "name", "seed"))
    found = [run for run in runs if run["preset"] == config.preset]
    behaviour = {
        name: _behaviour(config.data, name) for name in SETS if any(r["set"] == name for r in found)
    }
    facts = {"config": asdict(config), "behaviour": behaviour, "runs": runs}
    command = f"minrnn reproduce d4rl --preset {config.preset}"
    publish(config.out, command, facts, [table(found, behaviour)], draw(found, behaviour))


def _behaviour(folder: Path, set_name: str) -> float | None:
    """The score of those who played the episodes of a set."""
    data = trajectory_files.read([folder / file for file in SETS[set_name]])
    return data.score(float(data.returns.mean()))


def _done(config: D4rlConfig) -> Iterator[dict[str, Any]]:
    for set_name in SETS:
        for name in ENTRIES:
            for path in sorted((config.runs / config.preset).glob(f"{set_name}-{name}-[0-9]*")):
                if (path / "played.json").is_file():
                    saved, run = checkpoint.read_config(path), decisions.read(path)
                    facts = decisions.facts(path)
                    played = json.loads((path / "played.json").read_text())
                    scores = {
                        way: facts.score(statistics.fmean(got["returns"]), facts.environment)
                        for way, got in played["ways"].items()
                    }
                    model = checkpoint.build_model(path / "config.json", saved)
                    yield {
                        "set": set_name,
                        "name": name,
                        "seed": run.train.seed,
                        "updates": run.train.steps,
                        "precision": run.train.precision,
                        "parameters": sum(p.numel() for p in model.parameters()),
                        "scores": scores,
                        "played": played,
                    }


def table(found: list[dict[str, Any]], behaviour: dict[str, float | None]) -> TextTable:
    """Scores, mean and deviation over the seeds."""
    head = ["set", "model", "window", "stream", "paper", "parameters", "updates", "seeds"]
    rows = []
    for number, set_name in enumerate(SETS):
        if set_name in behaviour:
            own = behaviour[set_name]
            shown = "-" if own is None else f"{own:.1f}"
            rows.append([set_name, "those who played", shown, *"-----"])
        for name, entry in ENTRIES.items():
            runs = [r for r in found if (r["set"], r["name"]) == (set_name, name)]
            if not runs:
                continue
            scores = [
                spread([r["scores"][way] for r in runs], 1) if way in runs[0]["scores"] else "-"
                for way in ("window", "stream")
            ]
            paper = f"{entry.paper.split()[number]} †" if entry.paper else "-"
            last = [f"{runs[0]['parameters']:,}", f"{runs[0]['updates']:,}", str(len(runs))]
            rows.append([set_name, entry.title, *scores, paper, *last])
    notes = [
        "100 (R - random) / (expert - random) for the mean return R of the episodes of a seed. "
        "window: the last 20 steps computed anew for each action; stream: the state carried from "
        "the first step to the last.",
        "† The paper's are on D4RL's own sets, which are other data; not checked against its PDF.",
    ]
    return TextTable("Offline reinforcement learning", head, rows, notes)


def draw(found: list[dict[str, Any]], behaviour: dict[str, float | None]) -> Figure:
    """The scores, a panel for each set, a mark for each seed."""
    sets = list(behaviour) or ["none"]
    columns = min(3, len(sets))
    lines = -(-len(sets) // columns)
    figure = Figure(figsize=(1.5 + 2.6 * columns, 0.8 + 2.4 * lines), layout="constrained")
    panels: Any = figure.subplots(lines, columns, squeeze=False, sharey=True)
    for place, axes in enumerate(panels.flat):
        if place >= len(sets):
            axes.axis("off")
            continue
        for way, marker in (("window", "o"), ("stream", "x")):
            points = [
                (run["scores"][way], list(ENTRIES).index(run["name"]))
                for run in found
                if run["set"] == sets[place] and way in run["scores"]
            ]
            if points:
                axes.plot(*zip(*points, strict=True), marker, label=way, alpha=0.7)
        own = behaviour.get(sets[place])
        if own is not None:
            axes.axvline(own, color="0.5", linewidth=1, label="those who played")
        axes.set_title(sets[place], fontsize=9)
        axes.grid(alpha=0.3)
        axes.set_yticks(
            range(len(ENTRIES)), [entry.title for entry in ENTRIES.values()], fontsize=8
        )
        axes.tick_params(axis="x", labelsize=8)
    panels[0, 0].invert_yaxis()
    panels[0, 0].legend(fontsize=7)
    figure.supxlabel("score: 0 random, 100 expert", fontsize=9)
    return figure
