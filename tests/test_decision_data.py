"""What a training takes from its data and environment: scales, bounds, limits; what is refused."""

import json
from dataclasses import replace
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import torch
from PIL import Image

from minrnn import checkpoint, cli
from minrnn.collecting import CollectConfig, collect
from minrnn.data import trajectory_files
from minrnn.data.trajectories import REFERENCE_RETURNS, Trajectories
from minrnn.decision import DecisionConfig, DecisionModel
from minrnn.experiments import d4rl
from minrnn.recipes import RL_RECIPES
from minrnn.runs import decisions
from tests.made_episodes import episodes


class Choice(gymnasium.Env):
    """One step, rewarded with the action times `size`; it draws into one buffer."""

    observation_space = gymnasium.spaces.Box(-1, 1, (1,))
    action_space = gymnasium.spaces.Box(0, 1, (1,))
    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}  # noqa: RUF012

    def __init__(self, size: float = 1.0, last: int = 1, render_mode: str | None = None) -> None:
        self.size, self.last, self.render_mode = size, last, render_mode
        self.picture = np.zeros((9, 7, 3), dtype=np.uint8)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.done = 0
        return np.zeros(1, dtype=np.float32), {}

    def step(self, action):
        self.done += 1
        over = self.done == self.last
        return np.zeros(1, dtype=np.float32), self.size * float(action[0]), over, False, {}

    def render(self):
        self.picture[:] = 60 * self.done
        return self.picture


for size in (0.001, 1.0, 20_000.0):
    gymnasium.register(f"Choice{size:g}-v0", Choice, kwargs={"size": size})
gymnasium.register("Endless-v0", Choice, kwargs={"last": 0})
gymnasium.register("Limited-v0", Choice, kwargs={"last": 0}, max_episode_steps=40)
gymnasium.register("Four-v0", Choice, kwargs={"last": 4})
SMALL = ("--width", "8", "--num-layers", "1", "--batch-size", "4", "--steps", "1")


def _train(data: Path, run: Path, *options: str) -> int:
    return cli.main(["train", "rl", "--data", str(data), "--out", str(run), *options])


@pytest.mark.parametrize("size", [0.001, 1.0, 20_000.0])
def test_the_return_that_is_asked_for_is_seen_at_any_size(size, tmp_path, capsys) -> None:
    name, run = f"Choice{size:g}-v0", tmp_path / "run"
    data = collect(name, CollectConfig(episodes=300, seed=1))
    trajectory_files.write_d4rl(data, tmp_path / "a.hdf5")
    options = ["--width", "16", "--num-layers", "1", "--context", "1", "--dropout", "0"]
    options += ["--learning-rate", "0.01", "--warmup-steps", "1", "--steps", "80"]
    options += ["--batch-size", "32"]
    assert _train(tmp_path / "a.hdf5", run, *options) == 0
    assert checkpoint.read_config(run)["decision_model"]["return_scale"] == data.return_scale
    found = []
    for asked in (0.0, 0.5, 1.0):
        capsys.readouterr()
        command = ["eval", str(run), "--episodes", "1", "--target", str(asked * size)]
        assert cli.main(command) == 0
        found.append(json.loads(capsys.readouterr().out)["return"] / size)
    # about 0.1, 0.55 and 0.82; with a scale of 1,000 all three are equal where returns are small
    assert found[0] + 0.15 < found[1] < found[2] - 0.1


def _of_rewards(*rewards: float) -> Trajectories:
    data = episodes((len(rewards),))
    return replace(data, rewards=np.array(rewards, dtype=np.float64))


SCALES = {
    (3222.3,): 1000,
    (9816.1, 0.0): 1000,
    (1000.0,): 1000,
    (999.0,): 100,
    (1.0, 0.0): 1,
    (0.04,): 0.01,
    (-76.0, 1.0): 10,
    # returns that cancel: what is left on the way counts
    (-50.0, 50.0): 10,
    (0.0, 0.0): 1,
    (1e-38,): 1e-30,
}


@pytest.mark.parametrize("rewards", SCALES)
def test_the_scale_is_a_power_of_ten_of_the_data(rewards) -> None:
    data = _of_rewards(*rewards)
    assert data.return_scale == pytest.approx(SCALES[rewards], rel=1e-9)
    assert np.isfinite(data.to_go / data.return_scale).all()


def test_a_scale_that_is_given_stays(tmp_path, capsys) -> None:
    data = episodes((3, 4))
    trajectory_files.write_d4rl(data, tmp_path / "a.hdf5")
    for number, recipe in enumerate(RL_RECIPES):
        for option, scale in (([], data.return_scale), (["--return-scale", "50"], 50)):
            run = tmp_path / f"{number}-{scale}"
            assert _train(tmp_path / "a.hdf5", run, "--recipe", recipe, *SMALL, *option) == 0
            assert checkpoint.load(run).model.config.return_scale == scale
    # a model without data has the published one
    assert DecisionModel(DecisionConfig(2, 1)).return_scale == 1000
    # the published table keeps its scale
    for preset in ("cpu", "paper"):
        config = d4rl.D4rlConfig(Path("data"), preset)
        for name in d4rl.ENTRIES:
            run_config = d4rl.run_config(config, "hopper-medium", name, 0, tmp_path / "x")
            assert run_config.model.return_scale == 1000


def test_actions_beyond_the_bounds_are_said_and_clipped(tmp_path, capsys, monkeypatch) -> None:
    data = episodes((3, 4))
    inside = data.actions.copy()
    # the bounds themselves, and what float32 makes of them
    inside[0], inside[1] = 1.0, np.float32(-1) * np.nextafter(np.float32(1), np.float32(2))
    outside = inside.copy()
    outside[2, 0], outside[2, 1], outside[5, 2] = 1.5, -2, -3
    seen = []

    def watched(data, *args):
        seen.append(data.actions)
        return draw(data, *args)

    draw = decisions.DecisionTask.batch.__globals__["windows"]
    monkeypatch.setattr("minrnn.tasks.windows", watched)
    for name, actions in (("inside", inside), ("outside", outside)):
        path = tmp_path / f"{name}.hdf5"
        trajectory_files.write_d4rl(replace(data, actions=actions), path)
        assert _train(path, tmp_path / name, *SMALL) == 0
        said = capsys.readouterr().err
        if name == "inside":
            assert "outside" not in said
        else:
            line = next(line for line in said.splitlines() if "outside" in line)
            assert line.startswith("2 of 7 actions lie outside the bounds of Hopper-v5")
            assert "by up to 2; they are clipped to the bounds" in line
        assert (np.abs(seen[-1]) <= 1).all()
        assert (seen[-1] == np.clip(actions, -1, 1)).all()


def test_an_episode_without_a_limit_is_cut(tmp_path, capsys) -> None:
    for name, asked, length in (
        ("Endless-v0", None, 1000),
        ("Endless-v0", 7, 7),
        ("Limited-v0", None, 40),
        ("Limited-v0", 7, 7),
        ("Limited-v0", 70, 40),
        ("Choice1-v0", 7, 1),
    ):
        data = collect(name, CollectConfig(episodes=2, max_episode_steps=asked))
        assert data.lengths.tolist() == [length, length]
        assert data.terminated.tolist() == [name == "Choice1-v0"] * 2
    out = str(tmp_path / "a.hdf5")
    command = ["data", "rl", "collect", "Endless-v0", out, "--episodes", "2"]
    assert cli.main([*command, "--max-episode-steps", "9"]) == 0
    assert "2 episodes, 18 steps" in capsys.readouterr().out
    with pytest.raises(ValueError, match="`max_episode_steps` must be >= 1, got 0"):
        CollectConfig(max_episode_steps=0)


WRONG = {
    "--mixer attention --num-heads 3": "`num_heads` must divide `width` = 128 evenly, got 3",
    "--mixer aaren --num-heads 3": "`num_heads` must divide `width` = 128, got 3",
    "--mixer s4d --state-size 3": "`state_size` must be even, got 3",
    "--observation-size 5": "`observation_size` must be that of the data, 11, or 0, got 5",
    "--action-size 2": "`action_size` must be that of the data, 3, or 0, got 2",
    "--return-scale 0": "`return_scale` must be > 0, got 0",
    "--env Walker2d-v5": "Walker2d-v5 must have observations of 11 numbers",
    "--reference 3 2": "`reference` must be (random, expert), rising",
}


@pytest.mark.parametrize("options", WRONG)
def test_settings_that_do_not_fit_leave_no_folder(options, tmp_path, capsys) -> None:
    trajectory_files.write_d4rl(episodes((3, 4)), tmp_path / "a.hdf5")
    assert _train(tmp_path / "a.hdf5", tmp_path / "run", *options.split()) == 2
    said = capsys.readouterr().err
    assert WRONG[options] in said
    assert "damaged" not in said
    assert said.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_sizes_of_the_data_may_be_given(tmp_path) -> None:
    trajectory_files.write_d4rl(episodes((3, 4)), tmp_path / "a.hdf5")
    sizes = ("--observation-size", "11", "--action-size", "3")
    assert _train(tmp_path / "a.hdf5", tmp_path / "run", *SMALL, *sizes) == 0


def test_an_action_that_cannot_vary_is_not_divided_by_zero(tmp_path, monkeypatch) -> None:
    bounds = np.array([0, 0.5], dtype=np.float32), np.array([1, 0.5], dtype=np.float32)

    class Held(Choice):
        action_space = gymnasium.spaces.Box(*bounds)

    gymnasium.registry.pop("Held-v0", None)
    gymnasium.register("Held-v0", Held, max_episode_steps=5)
    trajectory_files.write_d4rl(collect("Held-v0", CollectConfig(episodes=9)), tmp_path / "a.hdf5")
    assert _train(tmp_path / "a.hdf5", tmp_path / "run", *SMALL) == 0
    assert cli.main(["eval", str(tmp_path / "run"), "--episodes", "1"]) == 0
    assert checkpoint.load(tmp_path / "run").model.action_reach.tolist() == [0.5, 1.0]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("four")
    trajectory_files.write_d4rl(collect("Four-v0", CollectConfig(episodes=9)), folder / "a.hdf5")
    assert _train(folder / "a.hdf5", folder / "run", *SMALL) == 0
    return folder / "run"


@pytest.mark.parametrize("name", ["a.gif", "b.GIF", "c.mp4"])
def test_a_video_is_what_its_ending_says(name: str, run, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["eval", str(run), "--video", name]) == 0
    content = Path(name).read_bytes()
    if name == "c.mp4":
        # its frames have odd sizes
        assert content[4:8] == b"ftyp"
        assert len(content) > 500
        return
    with Image.open(name) as film:
        assert film.n_frames == 5
        greys = []
        for number in range(5):
            film.seek(number)
            greys.append(film.convert("L").getpixel((0, 0)))
    # each frame as it was drawn, though all are drawn in one buffer
    assert greys == pytest.approx([0, 60, 120, 180, 240], abs=4)


@pytest.mark.parametrize("name", ["a.webm", "a", "a.mp4.txt", ".gif"])
def test_other_videos_are_refused(name: str, run, tmp_path, capsys) -> None:
    assert cli.main(["eval", str(run), "--video", str(tmp_path / name)]) == 2
    said = capsys.readouterr().err
    assert "the video must end in .mp4 or .gif, got" in said
    assert said.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_score_is_that_of_the_environment() -> None:
    facts = decisions.Facts("Hopper-v5", (0.0, 10.0), 9.0, (np.zeros(1), np.ones(1)))
    assert facts.score(5.0, "Hopper-v4") == 50
    assert facts.score(5.0, "Unknown-v0") is None
    assert facts.score(REFERENCE_RETURNS["Walker2d"][1], "Walker2d-v5") == pytest.approx(100)


FAULTS = {
    "falling": (
        {"ends": [4, 3, 7]},
        ValueError,
        "`ends` must be strictly increasing .*got 3 after",
    ),
    "equal": ({"ends": [3, 3, 7]}, ValueError, "got 3 after 3 for episode 1"),
    "zero": ({"ends": [0, 3, 7]}, ValueError, "got 0 for episode 0"),
    "negative": ({"ends": [-1, 3, 7]}, ValueError, "got -1 for episode 0"),
    "short": ({"ends": [2, 3, 6]}, ValueError, "the last of `ends` must be N = 7, .* got 6"),
    "long": ({"ends": [2, 3, 8]}, ValueError, "the last of `ends` must be N = 7, .* got 8"),
    "fewer": ({"terminated": [True]}, ValueError, r"must have shape \(E,\), got \(3,\) and \(1,\)"),
    "nested": ({"ends": [[2], [3], [7]]}, ValueError, r"must have shape \(E,\), got \(3, 1\)"),
    "none": ({"ends": np.zeros(0, int), "terminated": np.zeros(0, bool)}, ValueError, "got none"),
    "real": ({"ends": [2.0, 3.0, 7.0]}, TypeError, "`ends` must be int64, got dtype float64"),
    "count": ({"terminated": [1, 0, 1]}, TypeError, "`terminated` must be bool, got dtype int64"),
    "column": ({"rewards": np.zeros((7, 1))}, ValueError, r"`rewards` must have shape \(N,\)"),
    "words": ({"actions": [["a"]] * 7}, TypeError, "`actions` must be float32, got dtype <U1"),
    "nan": ({"rewards": [np.nan] * 7}, ValueError, "`rewards` must be finite, row 0 and 6"),
    "name": ({"environment": b"Hopper-v5"}, TypeError, "`environment` must be a printable str"),
    "escape": ({"environment": "\x1b[2J"}, TypeError, "`environment` must be a printable str"),
    "scale": ({"reference": (1.0, 1.0)}, ValueError, "`reference` must be two finite returns"),
    "three": ({"reference": (1.0, 2.0, 3.0)}, ValueError, "`reference` must be two finite"),
}


@pytest.mark.parametrize("kind", FAULTS)
def test_trajectories_check_what_they_are_made_of(kind: str) -> None:
    values, error, message = FAULTS[kind]
    data = episodes((2, 1, 4))
    with pytest.raises(error, match=message):
        replace(data, **values)


def test_trajectories_have_one_dtype_each() -> None:
    data = episodes((2, 1, 4))
    made = Trajectories(
        data.observations.astype(np.float64),
        data.actions.tolist(),
        np.arange(7),
        [2, 3, 7],
        [True, False, True],
    )
    dtypes = [made.observations.dtype, made.actions.dtype, made.rewards.dtype, made.ends.dtype]
    assert dtypes == [np.float32, np.float32, np.float32, np.int64]
    assert made.returns.tolist() == [1, 2, 18]
    assert torch.from_numpy(made.actions).equal(torch.from_numpy(data.actions))
