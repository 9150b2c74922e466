"""Environments: nothing is shared with them, and no file chooses what is imported."""

import json
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import gymnasium
import h5py
import numpy as np
import pytest
import torch

from minrnn import acting, checkpoint, cli
from minrnn.acting import ActingConfig, play
from minrnn.collecting import CollectConfig, collect
from minrnn.data import trajectory_files
from minrnn.decision import DecisionConfig, DecisionModel
from minrnn.environments import begin, bounded, making, step
from tests.made_episodes import episodes

LENGTH = 5


class Selfish(gymnasium.Env):
    """Counts its steps in buffers that it returns each time, and writes to its action.

    The reward is the distance between this action and the one before, which it keeps.
    """

    observation_space = gymnasium.spaces.Box(-99, 99, (2,), dtype=np.float32)
    action_space = gymnasium.spaces.Box(-2, 2, (1,), dtype=np.float32)

    def __init__(self, kind: str = "float32") -> None:
        dtype = {"list": "float64"}.get(kind, kind)
        self.shown, self.kind = np.zeros(2, dtype=dtype), kind
        self.reward = np.zeros((1,) if kind == "float64" else ())
        self.over, self.last = np.zeros((), dtype=bool), np.zeros(1, dtype=np.float32)

    def _observe(self):
        return self.shown.tolist() if self.kind == "list" else self.shown

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.shown[:] = 0
        self.over[...] = False
        self.last = np.zeros(1, dtype=np.float32)
        return self._observe(), {}

    def step(self, action):
        self.shown += 1
        self.reward[...] = np.abs(action - self.last).item()
        self.over[...] = self.shown[0] >= LENGTH
        self.last[:] = 77
        self.last = action
        return self._observe(), self.reward, self.over, np.False_, {}


KINDS = ("float32", "float64", "int64", "uint8", "list")
for kind in KINDS:
    gymnasium.register(
        f"Selfish-{kind}-v0",
        Selfish,
        max_episode_steps=30,
        disable_env_checker=True,
        kwargs={"kind": kind},
    )


class Greedy(Selfish):
    """Overwrites the action that it is given."""

    def step(self, action):
        came = super().step(action)
        action[:] = 55
        return came


gymnasium.register("Greedy-v0", Greedy, max_episode_steps=30, disable_env_checker=True)


@pytest.mark.parametrize("kind", KINDS)
def test_what_an_environment_returns_is_copied(kind: str) -> None:
    data = collect(f"Selfish-{kind}-v0", CollectConfig(episodes=2, seed=1))
    assert data.observations[:, 0].tolist() == [0, 1, 2, 3, 4] * 2
    assert data.terminated.tolist() == [True, True]
    before = np.where(np.arange(2 * LENGTH) % LENGTH == 0, 0, np.roll(data.actions[:, 0], 1))
    np.testing.assert_allclose(data.rewards, np.abs(data.actions[:, 0] - before), rtol=1e-6)
    # rewards are numbers of their own, not the last one n times
    assert len(set(data.rewards.tolist())) > 5


def test_recording_leaves_the_random_numbers_of_the_caller() -> None:
    torch.manual_seed(7)
    wanted = torch.rand(3)
    torch.manual_seed(7)
    collect("Selfish-float32-v0", CollectConfig(episodes=1, seed=1))
    assert torch.rand(3).equal(wanted)


def test_what_an_environment_is_given_is_copied() -> None:
    data = collect("Greedy-v0", CollectConfig(episodes=2, seed=1))
    assert (np.abs(data.actions) <= 2).all()
    assert len(set(data.actions[:, 0].tolist())) > 5
    with making("Greedy-v0") as env:
        first = begin(env)
        action = np.array([0.5], dtype=np.float32)
        came = step(env, action)
        assert action.tolist() == [0.5]
        # what was returned before stays
        assert (first.tolist(), came.observation.tolist()) == ([0, 0], [1, 1])


class _Scripted:
    """Acts in a given way, through a buffer of its own."""

    def __init__(self, actions):
        self.actions, self.seen, self.buffer = actions, [], torch.zeros(1, 1)

    def act(self, x):
        self.seen.append(x.clone())
        self.buffer.fill_(self.actions[len(self.seen) - 1])
        return self.buffer

    def select(self, rows):
        raise AssertionError


@pytest.mark.parametrize("name", ["Selfish-float32-v0", "Selfish-list-v0", "Greedy-v0"])
def test_playing_shares_nothing(name: str) -> None:
    actions = [1.0, -1.5, 2.0, 0.5, -0.5]
    actor = _Scripted(actions)
    with making(name) as env:
        played = acting._play(actor, [env], [0], 10.0)
    # Greedy sees its own 55 as the last action
    last = [0.0, *actions[:-1]] if name != "Greedy-v0" else [0.0, *[55.0] * 4]
    paid = [abs(a - b) for a, b in zip(actions, last, strict=True)]
    assert played.returns == pytest.approx([sum(paid)])
    seen = torch.cat(actor.seen)
    # the action before, the return-to-go, two observations, the number of the step
    assert seen[:, 0].tolist() == [0.0, *actions[:-1]]
    assert seen[:, 1].tolist() == pytest.approx([10 - sum(paid[:t]) for t in range(LENGTH)])
    assert seen[:, 2].tolist() == seen[:, 4].tolist() == [0, 1, 2, 3, 4]


def test_episodes_at_once_are_those_one_by_one() -> None:
    torch.manual_seed(0)
    model = DecisionModel(DecisionConfig(2, 1)).eval()
    at_once = play(model, "Selfish-float32-v0", ActingConfig(9.0, 3, "stream", 20, parallel=3))
    in_turn = play(model, "Selfish-float32-v0", ActingConfig(9.0, 3, "stream", 20, parallel=1))
    assert at_once.lengths == in_turn.lengths == [LENGTH] * 3
    assert at_once.returns == pytest.approx(in_turn.returns, rel=1e-4)


def test_the_arrays_of_trajectories_are_their_own() -> None:
    data = episodes((3, 4))
    rewards = data.rewards.copy()
    made = replace(data, rewards=rewards)
    rewards[:] = 99
    assert made.returns == pytest.approx(data.returns)


def test_actions_are_those_of_the_space() -> None:
    box = gymnasium.spaces.Box
    for space in (
        box(-0.1, 0.1, (2,), dtype=np.float64),
        box(-0.1, 0.1, (2,), dtype=np.float32),
        box(-0.1, 0.1, (2,), dtype=np.float16),
        box(-3, 5, (2,), dtype=np.int32),
    ):
        for value in (-9.0, -0.1, 0.0999999, 9.0):
            action = bounded(space, np.full(2, value, dtype=np.float32))
            assert space.contains(action), (space, action)
    # to the next whole number, not towards 0
    whole = bounded(box(0, 255, (3,), dtype=np.uint8), np.array([1.7, 300, -2], dtype=np.float32))
    assert whole.tolist() == [2, 255, 0]


class Odd(Selfish):
    """Returns what is no number, or of another shape."""

    def __init__(self, fault: str) -> None:
        super().__init__()
        self.fault = fault

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return (np.zeros(3) if self.fault == "shape" else self.shown), {}

    def step(self, action):
        rewards = {"nan": np.nan, "two": np.zeros(2), "none": None}
        seen = np.array([np.inf, 0]) if self.fault == "infinite" else self.shown
        return seen, rewards.get(self.fault, 0.0), False, False, {}


ODD = {
    "shape": r"must observe finite numbers of shape \(2,\), got \[0",
    "infinite": r"must observe finite numbers of shape \(2,\), got \[inf",
    "nan": "must return one finite number as `reward`, got nan",
    "two": "must return one finite number as `reward`, got array",
    "none": "must return one finite number as `reward`, got None",
}


@pytest.mark.parametrize("fault", ODD)
def test_what_is_no_number_is_refused(fault: str) -> None:
    class Faulty(Odd):
        def __init__(self) -> None:
            super().__init__(fault)

    gymnasium.registry.pop("Odd-v0", None)
    gymnasium.register("Odd-v0", Faulty, max_episode_steps=9, disable_env_checker=True)
    with pytest.raises(ValueError, match=ODD[fault]):
        collect("Odd-v0", CollectConfig(episodes=1))
    with pytest.raises(ValueError, match=ODD[fault]):
        play(DecisionModel(DecisionConfig(2, 1)), "Odd-v0", ActingConfig(1.0, 1, context=5))


@pytest.fixture
def spy(tmp_path, monkeypatch) -> str:
    """A module that says so when it is imported, and registers an environment."""
    text = (
        "import gymnasium\nfrom pathlib import Path\n"
        f"Path({str(tmp_path / 'imported')!r}).touch()\n"
        "from tests.test_environments import Selfish\n"
        "gymnasium.registry.pop('Spied-v0', None)\n"
        "gymnasium.register('Spied-v0', Selfish, max_episode_steps=9, disable_env_checker=True)\n"
        "def call(**kwargs):\n    raise AssertionError\n"
    )
    (tmp_path / "spy_module.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield "spy_module:Spied-v0"
    sys.modules.pop("spy_module", None)
    gymnasium.registry.pop("Spied-v0", None)


def _refused(command: list[str], capsys, message: str) -> None:
    assert cli.main(command) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1


def test_a_file_imports_no_module(spy, tmp_path, capsys) -> None:
    data = collect("Selfish-float32-v0", CollectConfig(episodes=4))
    trajectory_files.write_d4rl(replace(data, environment=spy), tmp_path / "a.hdf5")
    small = ["--width", "8", "--num-layers", "1", "--steps", "1", "--batch-size", "2"]
    train = ["train", "rl", "--data", str(tmp_path / "a.hdf5"), "--out", str(tmp_path / "run")]
    convert = ["data", "rl", "convert", str(tmp_path / "a.hdf5"), str(tmp_path / "a-v0")]
    convert += ["--to", "minari"]
    # nor does an empty --env make the name of the file one that was given
    for command in ([*train, *small], convert, [*train, *small, "--env", ""]):
        _refused(command, capsys, f"give it by --env {spy}")
    with pytest.raises(ValueError, match="a file names it"):
        play(DecisionModel(DecisionConfig(2, 1)), spy, ActingConfig(1.0, 1, context=5))
    assert not (tmp_path / "imported").exists()
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "a-v0").exists()
    # a person may
    assert cli.main([*train, *small, "--env", spy]) == 0
    assert (tmp_path / "imported").exists()
    assert cli.main([*convert, "--env", spy]) == 0
    play_it = ["eval", str(tmp_path / "run"), "--episodes", "1"]
    capsys.readouterr()
    for options in ([], ["--env", ""]):
        _refused([*play_it, *options], capsys, f"give it by --env {spy}")
    video = ["--video", str(tmp_path / "a.gif")]
    _refused([*play_it, *video], capsys, f"give it by --env {spy}")
    assert cli.main([*play_it, "--env", spy]) == 0
    collected = ["data", "rl", "collect", spy, str(tmp_path / "b.hdf5"), "--episodes", "1"]
    assert cli.main(collected) == 0


def test_a_config_imports_no_module(spy, tmp_path, capsys) -> None:
    trajectory_files.write_d4rl(
        collect("Selfish-float32-v0", CollectConfig(episodes=4)), tmp_path / "a.hdf5"
    )
    run = tmp_path / "run"
    small = ["--width", "8", "--num-layers", "1", "--steps", "1", "--batch-size", "2"]
    data = ["--data", str(tmp_path / "a.hdf5"), "--out", str(run)]
    assert cli.main(["train", "rl", *data, *small]) == 0
    saved = checkpoint.read_config(run)
    command = ["eval", str(run), "--episodes", "1"]
    capsys.readouterr()
    for name, message in (
        (spy, f"give it by --env {spy}"),
        ("a:b:c", "give it by --env a:b:c"),
        ("a:b; touch c", "give it by --env 'a:b; touch c'"),
        ("\x1b[2J", "must be a printable text"),
        (["spy_module", "x"], "`environment` must be a string"),
        (None, "`environment` must be a string"),
    ):
        checkpoint.write_config(run, saved | {"environment": name})
        _refused(command, capsys, message)
    for key in ("environment", "reference", "best_return", "actions"):
        checkpoint.write_config(run, {k: v for k, v in saved.items() if k != key})
        _refused(command, capsys, "config.json is damaged")
    assert not (tmp_path / "imported").exists()


@pytest.mark.parametrize("spaces", [True, False])
def test_a_specification_of_minari_calls_nothing(spaces, spy, tmp_path, capsys) -> None:
    folder = tmp_path / "set-v0"
    trajectory_files.write_minari(episodes((3, 4)), folder)
    path = folder / "data" / "metadata.json"
    metadata = json.loads(path.read_text())
    spec = json.loads(metadata["env_spec"])
    spec["entry_point"] = "spy_module:call"
    spec["kwargs"] = {"xml_file": "/etc/passwd"}
    wrapper = {"name": "Spy", "entry_point": "spy_module:call", "kwargs": {}}
    spec["additional_wrappers"] = [wrapper]
    metadata["env_spec"] = json.dumps(spec)
    if not spaces:
        # without them minari makes the environment
        del metadata["observation_space"], metadata["action_space"]
    path.write_text(json.dumps(metadata))
    assert trajectory_files.read([folder]).environment == "Hopper-v5"
    assert cli.main(["data", "rl", "info", str(folder)]) == 0
    assert not (tmp_path / "imported").exists()


@pytest.mark.parametrize("name", ["warnings", "Nothing", "F", "Parameter"])
def test_a_policy_names_activations_only(name: str, tmp_path) -> None:
    path = tmp_path / "policy.zip"
    with zipfile.ZipFile(path, "w") as archive:
        with archive.open("policy.pth", "w") as file:
            torch.save({"mlp_extractor.policy_net.0.weight": torch.zeros(3, 2)}, file)
        archive.writestr("data", f'"activation_fn": "torch.nn.modules.activation.{name}"')
    with pytest.raises(ValueError, match=rf"policy\.zip must have an activation .* got '{name}'"):
        collect("Selfish-float32-v0", CollectConfig(path, episodes=1))


OLD = {
    "Hopper-v2": "--env Hopper-v5",
    "Hopper-v3": "--env Hopper-v5",
    "HalfCheetah-v2": "--env HalfCheetah-v5",
    "InvertedPendulum-v3": "--env InvertedPendulum-v5",
    "Hopper-v9": "no environment 'Hopper-v9'",
    "Hoper-v5": "Did you mean",
    "Nowhere/Hopper-v5": "Namespace Nowhere not found",
    "no such name!": "Malformed environment ID",
}


@pytest.mark.parametrize("name", OLD)
def test_environments_that_cannot_be_made_are_named(name: str, tmp_path, capsys) -> None:
    path = tmp_path / "a.hdf5"
    trajectory_files.write_d4rl(replace(episodes((3, 4)), environment=name), path)
    commands = (
        ["train", "rl", "--data", str(path), "--out", str(tmp_path / "run")],
        ["data", "rl", "convert", str(path), str(tmp_path / "a-v0"), "--to", "minari"],
        ["data", "rl", "collect", name, str(tmp_path / "b.hdf5")],
    )
    for command in commands:
        _refused(command, capsys, OLD[name])
    assert [p.name for p in tmp_path.iterdir()] == ["a.hdf5"]


def test_an_environment_whose_module_is_broken_is_named(tmp_path, capsys, monkeypatch) -> None:
    (tmp_path / "broken_module.py").write_text("raise OSError('a library\\nis missing')")
    monkeypatch.syspath_prepend(str(tmp_path))
    for name, message in (
        ("broken_module:A-v0", "a library is missing"),
        ("no_such_module:A-v0", "No module named 'no_such_module'"),
        ("a:b:c", "no environment 'a:b:c'"),
    ):
        command = ["data", "rl", "collect", name, str(tmp_path / "x.hdf5")]
        _refused(command, capsys, message)
    assert not Path(tmp_path / "x.hdf5").exists()


@pytest.mark.parametrize("value", [b"Hopper-v5", np.bytes_(b"Hopper-v5"), np.array([b"Hopper-v5"])])
def test_bytes_name_an_environment(value, tmp_path) -> None:
    path = tmp_path / "a.hdf5"
    trajectory_files.write_d4rl(episodes((3, 4)), path)
    with h5py.File(path, "a") as file:
        file.attrs["env"] = value
    assert trajectory_files.read([path]).environment == "Hopper-v5"


@pytest.mark.parametrize("way", ["window", "stream"])
def test_a_target_may_be_an_int(way) -> None:
    torch.manual_seed(0)
    model = DecisionModel(DecisionConfig(2, 1)).eval()
    played = [
        play(model, "Selfish-float32-v0", ActingConfig(target, 1, way, 20)) for target in (9, 9.0)
    ]
    assert played[0].returns == played[1].returns


def test_actions_of_broken_weights_are_not_played() -> None:
    model = DecisionModel(DecisionConfig(2, 1)).eval()
    model.head.bias.data[:] = float("nan")
    with pytest.raises(ValueError, match="actions are not finite: the model's weights are broken"):
        play(model, "Selfish-float32-v0", ActingConfig(9.0, 1, context=5))
