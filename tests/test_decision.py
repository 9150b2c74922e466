"""Decision models: steps, chunks and padding; runs that resume; acting in environments."""

import json
import zipfile
from dataclasses import replace
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import torch

from minrnn import acting, checkpoint, cli
from minrnn.acting import ActingConfig, StreamActor, WindowActor, play
from minrnn.collecting import CollectConfig, collect
from minrnn.data import trajectory_files
from minrnn.data.trajectories import windows
from minrnn.decision import DecisionConfig, DecisionModel
from minrnn.experiments import d4rl
from minrnn.losses import action_error
from minrnn.recipes import RL_RECIPES
from minrnn.runs import decisions
from tests.made_episodes import episodes

MIXERS = ("mingru", "minlstm", "gru", "attention", "aaren", "mamba", "s4d", "none")


class Corridor(gymnasium.Env):
    """A place on a line; moving right is rewarded, and the end is reached at 2."""

    observation_space = gymnasium.spaces.Box(-9, 9, (2,))
    action_space = gymnasium.spaces.Box(np.array([-0.5]), np.array([1.5]), dtype=np.float64)
    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}  # noqa: RUF012

    def __init__(self, render_mode: str | None = None) -> None:
        self.render_mode = render_mode

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.place = self.np_random.uniform(-0.1, 0.1)
        return self._observe(), {}

    def step(self, action):
        self.place += 0.1 * float(action[0])
        return self._observe(), float(action[0]), self.place >= 2, False, {}

    def render(self):
        return np.full((16, 16, 3), int(100 * abs(self.place)) % 256, dtype=np.uint8)

    def _observe(self):
        return np.array([self.place, 1.0], dtype=np.float32)


gymnasium.register("Corridor-v0", Corridor, max_episode_steps=30)


def _model(mixer: str = "mingru", observation_size: int = 11, action_size: int = 3):
    torch.manual_seed(0)
    config = DecisionConfig(observation_size, action_size)
    small = {"width": 16, "num_heads": 2, "num_layers": 2, "state_size": 4, "mixer": mixer}
    model = DecisionModel(replace(config, blocks=replace(config.blocks, **small)))
    # weights of a size at which every token matters
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


@pytest.mark.parametrize("mixer", MIXERS)
def test_whole_chunks_and_steps_agree(mixer: str) -> None:
    model = _model(mixer)
    batch = windows(episodes((30, 9)), 12, 5, (0,))
    whole, _ = model(batch.inputs)
    state, parts = None, []
    for piece in batch.inputs.split([1, 7, 4], dim=1):
        told, state = model(piece, state)
        parts.append(told)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-5, atol=1e-5)
    state, steps = model.init_state(5), []
    for t in range(12):
        told, state = model(batch.inputs[:, t : t + 1], state)
        steps.append(told)
    torch.testing.assert_close(torch.cat(steps, dim=1), whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mixer", MIXERS)
def test_a_padded_row_answers_as_the_row_alone(mixer: str) -> None:
    model = _model(mixer)
    batch = windows(episodes((5, 6, 4)), 8, 6, (0,))
    told, _ = model(batch.inputs)
    for row in range(6):
        steps = int(batch.mask[row].sum())
        alone, _ = model(batch.inputs[row : row + 1, :steps])
        torch.testing.assert_close(told[row, :steps], alone[0], rtol=1e-5, atol=1e-5)


def test_what_an_action_depends_on() -> None:
    A, S = 3, 11
    x = windows(episodes((30,)), 6, 1, (0,)).inputs
    for mixer, sees in (("mingru", True), ("none", False)):
        model = _model(mixer)
        told, _ = model(x)
        for column, known in ((0, True), (A, True), (A + 1, False), (A + 1 + S, False)):
            other = x.clone()
            other[:, 3, column] += 1
            changed = (model(other)[0] != told).any(dim=2)[0]
            assert not changed[:3].any()
            # without a mixer a step knows its own observation and number only
            assert bool(changed[3]) == (sees or not known), (mixer, column)
            assert bool(changed[4:].any()) == sees


def test_actions_lie_within_their_bounds() -> None:
    model = _model()
    model.action_middle.fill_(2.0)
    model.action_reach.copy_(torch.tensor([1.0, 0.5, 3.0]))
    told, _ = model(100 * torch.rand(4, 5, model.num_features))
    assert ((told - 2.0).abs() <= torch.tensor([1.0, 0.5, 3.0])).all()


def test_the_loss_is_the_mean_over_steps_that_are_there() -> None:
    model = _model()
    batch = windows(episodes((5, 6, 4)), 8, 6, (0,))
    told, _ = model(batch.inputs)
    errors = [
        ((told[b, t] - batch.targets[b, t]) ** 2).mean().item()
        for b in range(6)
        for t in range(8)
        if batch.mask[b, t]
    ]
    assert action_error(told, batch).item() == pytest.approx(np.mean(errors), rel=1e-5)


def test_wrong_sizes_are_named() -> None:
    with pytest.raises(ValueError, match=r"must be >= 1, got 0, 3"):
        DecisionModel(DecisionConfig(0, 3))
    with pytest.raises(ValueError, match=r"`x` must have shape \(B, T, 16\) with T >= 1"):
        _model()(torch.zeros(1, 2, 15))
    with pytest.raises(ValueError, match="`return_scale` must be > 0, got 0"):
        DecisionConfig(return_scale=0)


@pytest.mark.parametrize("mixer", ["mingru", "minlstm", "mamba", "aaren"])
def test_a_stream_acts_as_a_window_of_everything(mixer: str) -> None:
    model = _model(mixer, 2, 1)
    found = {}
    for way in ("window", "stream"):
        config = ActingConfig(20.0, 7, way, context=1000, parallel=3, seed=5)
        found[way] = play(model, "Corridor-v0", config)
    assert found["stream"].lengths == found["window"].lengths
    assert found["stream"].returns == pytest.approx(found["window"].returns, abs=1e-4)
    # some ended early, at the end of the corridor or not: rows leave a batch that goes on
    assert found["stream"].seconds_per_action > 0


def test_rows_leave_a_batch_and_the_others_go_on() -> None:
    model = _model("minlstm")
    x = torch.randn(9, 4, model.num_features)
    for actor in (StreamActor(model), WindowActor(model, 3)):
        alone = StreamActor(model) if isinstance(actor, StreamActor) else WindowActor(model, 3)
        actor.act(x[0])
        alone.act(x[0, 2:3])
        actor.select([2, 0])
        for t in range(1, 9):
            both = actor.act(x[t, [2, 0]])
            torch.testing.assert_close(both[:1], alone.act(x[t, 2:3]), rtol=1e-5, atol=1e-6)


def test_the_return_to_go_falls_by_each_reward() -> None:
    seen = []

    class Watched(DecisionModel):
        def forward(self, x, state=None):
            seen.append(x[:, -1].clone())
            return super().forward(x, state)

    model = Watched(_model("mingru", 2, 1).config).eval()
    with acting.making("Corridor-v0") as env:
        got = acting._play(StreamActor(model), [env], [3], 8.0)
    # columns: action before, return-to-go, observation (2), number
    rows = torch.cat(seen)
    assert rows[0, 0] == 0
    assert rows[:, 1].tolist() == pytest.approx(
        [8.0 - rows[: t + 1, 0].sum().item() for t in range(len(rows))], abs=1e-4
    )
    assert rows[:, 4].tolist() == list(range(got.lengths[0]))


def test_attention_is_not_streamed() -> None:
    with pytest.raises(ValueError, match="needs a mixer of constant state, got 'attention'"):
        StreamActor(_model("attention"))
    with pytest.raises(ValueError, match="`target` and `context` must be set, got None and 0"):
        play(_model(), "Corridor-v0", ActingConfig())


@pytest.fixture(scope="module")
def recorded(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("recorded") / "corridor.hdf5"
    data = collect("Corridor-v0", CollectConfig(episodes=40, seed=1))
    trajectory_files.write_d4rl(data, path)
    return path


SMALL = ("--width", "16", "--num-layers", "1", "--log-every", "1", "--warmup-steps", "1")


def _train(data: Path, out: Path, *options: str) -> int:
    where = ["--data", str(data), "--out", str(out)]
    return cli.main(["train", "rl", *where, *SMALL, "--eval-every", "3", *options])


def test_a_run_is_stopped_resumed_and_the_same(recorded, tmp_path, monkeypatch, capsys) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert _train(recorded, whole, "--steps", "9") == 0
    draw, calls = windows, 0

    def impatient(data, steps, batch_size, seed, *noise):
        nonlocal calls
        calls += seed[0] < 2
        if calls == 5:
            raise KeyboardInterrupt
        return draw(data, steps, batch_size, seed, *noise)

    monkeypatch.setattr("minrnn.tasks.windows", impatient)
    assert _train(recorded, parts, "--steps", "9") == 130
    assert cli.main(["train", "--resume", str(parts)]) == 0
    (one, notes), (other, same) = (
        checkpoint.read_tensors(run / "model.safetensors") for run in (whole, parts)
    )
    assert all((other[name] == x).all() for name, x in one.items())
    # the last weights, not those of the lowest loss
    assert notes["step"] == same["step"] == 9
    assert (parts / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()


def test_a_trained_model_goes_right(recorded, tmp_path, capsys) -> None:
    run = tmp_path / "run"
    lasting = ("--learning-rate", "0.01", "--context", "5", "--return-scale", "10")
    assert _train(recorded, run, "--steps", "120", *lasting) == 0
    model, _ = checkpoint.load(run)
    assert isinstance(model, DecisionModel)
    data = trajectory_files.read([recorded])
    assert model.observation_mean.numpy() == pytest.approx(data.moments[0])
    assert (model.action_middle.item(), model.action_reach.item()) == (0.5, 1.0)
    capsys.readouterr()
    assert cli.main(["eval", str(run), "--episodes", "8", "--way", "stream"]) == 0
    found = json.loads(capsys.readouterr().out)
    # no reference returns are known, and the highest of the data is asked for
    assert found["score"] is None
    assert found["target"] == pytest.approx(data.returns.max())
    assert found["return"] > data.returns.mean()
    # asked for less, it goes slower
    assert cli.main(["eval", str(run), "--episodes", "8", "--target", "5"]) == 0
    assert json.loads(capsys.readouterr().out)["return"] < found["return"]
    assert cli.main(["info", str(run)]) == 0
    assert "parameters" in capsys.readouterr().out


def test_what_cannot_be_trained_on_is_named(tmp_path, capsys) -> None:
    assert cli.main(["train", "rl", "--out", str(tmp_path / "run")]) == 2
    assert "`data` must name at least one set of episodes, got none" in capsys.readouterr().err
    for name in ("FrozenLake-v1", "CartPole-v1"):
        assert cli.main(["data", "rl", "collect", name, str(tmp_path / "x.hdf5")]) == 2
        assert "s that are vectors of numbers, got Discrete" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_data_that_changed_is_refused(recorded, tmp_path, capsys) -> None:
    copy = tmp_path / "copy.hdf5"
    copy.write_bytes(recorded.read_bytes())
    assert _train(copy, tmp_path / "run", "--steps", "3") == 0
    trajectory_files.write_d4rl(trajectory_files.read([recorded]).best(0.5), copy)
    assert cli.main(["train", "--resume", str(tmp_path / "run")]) == 2
    assert "has changed since its training began" in capsys.readouterr().err


def test_an_environment_of_other_spaces_is_refused(recorded, tmp_path, capsys) -> None:
    made = episodes((5, 6))
    trajectory_files.write_d4rl(made, tmp_path / "hopper.hdf5")
    cases = {
        "Walker2d-v5": "must have observations of 11 numbers",
        "CartPole-v1": "must have observations of 11 numbers",
        "Nothing-v0": "no environment 'Nothing-v0'",
    }
    for name, message in cases.items():
        assert _train(tmp_path / "hopper.hdf5", tmp_path / "run", "--env", name) == 2
        said = capsys.readouterr().err
        assert message in said
        assert said.count("\n") == 1
        assert not (tmp_path / "run").exists()
    assert _train(recorded, tmp_path / "run", "--steps", "1") == 0
    assert cli.main(["eval", str(tmp_path / "run"), "--env", "Hopper-v5"]) == 2
    assert "must have observations of 2 numbers" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["Hopper-v5", "Hopper-v4"])
def test_it_plays_mujoco(name: str) -> None:
    played = play(_model(), name, ActingConfig(3600.0, 2, "stream", 20, seed=1))
    again = play(_model(), name, ActingConfig(3600.0, 2, "stream", 20, seed=1))
    assert played.returns == again.returns
    assert min(played.lengths) > 1


def test_a_video_is_made(recorded, tmp_path, monkeypatch, capsys) -> None:
    assert _train(recorded, tmp_path / "run", "--steps", "1") == 0
    video = tmp_path / "a.mp4"
    assert cli.main(["eval", str(tmp_path / "run"), "--video", str(video)]) == 0
    assert video.read_bytes()[4:8] == b"ftyp"

    def broken(self):
        raise RuntimeError("no display")

    monkeypatch.setattr(Corridor, "render", broken)
    assert cli.main(["eval", str(tmp_path / "run"), "--video", str(tmp_path / "b.mp4")]) == 2
    said = capsys.readouterr().err
    assert "no video: nothing renders Corridor-v0 here (no display)" in said
    assert said.count("\n") == 1
    assert not (tmp_path / "b.mp4").exists()


@pytest.mark.parametrize("algorithm", ["ppo", "a2c", "sac", "td3", "ddpg"])
def test_policies_of_stable_baselines3_are_played(algorithm: str, tmp_path) -> None:
    import stable_baselines3

    options = {"net_arch": {"pi": [12, 7], "qf": [9]}, "activation_fn": torch.nn.ELU}
    if algorithm in ("ppo", "a2c"):
        options["net_arch"] = {"pi": [12, 7], "vf": [9]}
    kind = getattr(stable_baselines3, algorithm.upper())
    policy = kind("MlpPolicy", "Corridor-v0", policy_kwargs=options, seed=0, device="cpu")
    policy.save(tmp_path / "policy.zip")
    config = CollectConfig(tmp_path / "policy.zip", algorithm, episodes=3, deterministic=True)
    data = collect("Corridor-v0", config)
    assert data.num_episodes == 3
    for observation, action in zip(data.observations[:20], data.actions[:20], strict=True):
        assert policy.predict(observation, deterministic=True)[0] == pytest.approx(action, abs=1e-5)
    # the same seed, the same episodes
    assert (collect("Corridor-v0", config).actions == data.actions).all()


def test_nothing_of_a_policy_is_unpickled(tmp_path, capsys) -> None:
    with zipfile.ZipFile(tmp_path / "evil.zip", "w") as archive:
        # a pickle that would call os.system
        archive.writestr("policy.pth", b"cposix\nsystem\n(S'touch owned'\ntR.")
        archive.writestr("data", "{}")
    command = ["data", "rl", "collect", "Corridor-v0", str(tmp_path / "x.hdf5")]
    assert cli.main([*command, "--policy", str(tmp_path / "evil.zip")]) == 2
    assert "is no policy of stable-baselines3" in capsys.readouterr().err
    assert not Path("owned").exists()
    assert not (tmp_path / "x.hdf5").exists()
    assert cli.main([*command, "--episodes", "2"]) == 0
    assert trajectory_files.read([tmp_path / "x.hdf5"]).num_episodes == 2


@pytest.mark.long
def test_the_table_of_decision_models(recorded, tmp_path, monkeypatch, capsys) -> None:
    data = replace(trajectory_files.read([recorded]), reference=(0.0, 20.0))
    trajectory_files.write_d4rl(data, tmp_path / "corridor-medium.hdf5")
    monkeypatch.setattr(d4rl, "SETS", {"corridor-medium": ("corridor-medium.hdf5",)})
    recipe = RL_RECIPES["cpu"]
    blocks = replace(recipe.model.blocks, width=16, num_layers=1, num_heads=2, state_size=4)
    train = replace(recipe.train, steps=4, eval_every=2, batch_size=4, warmup_steps=1)
    small = replace(recipe, model=replace(recipe.model, blocks=blocks), train=train, context=5)
    monkeypatch.setitem(d4rl.RL_RECIPES, "cpu", small)
    where = [
        "--data",
        str(tmp_path),
        "--runs",
        str(tmp_path / "runs"),
        "--out",
        str(tmp_path / "o"),
    ]
    command = ["reproduce", "d4rl", *where, "--sets", "corridor-medium", "--episodes", "3"]
    assert cli.main(command) == 0
    capsys.readouterr()
    table = (tmp_path / "o" / "table.md").read_text()
    for entry in d4rl.ENTRIES.values():
        row = next(line for line in table.splitlines() if entry.title in line).split("|")
        assert "±" in row[3]
        assert ("±" in row[4]) == (entry.mixer not in ("none", "attention"))
        assert row[8].strip() == "2"
    best = tmp_path / "runs" / "cpu" / "corridor-medium-bc-best-0"
    assert decisions.read(best).best == 0.1
    assert checkpoint.read_config(best)["best_return"] == pytest.approx(data.returns.max())
    # nothing is trained twice, and the table stays
    monkeypatch.setattr(decisions, "start", None)
    monkeypatch.setattr(decisions, "go_on", None)
    assert cli.main(command) == 0
    assert (tmp_path / "o" / "table.md").read_text() == table
    assert cli.main([*command[:-4], "--sets", "ant-medium"]) == 2
    assert "`sets` must be of corridor-medium, got ['ant-medium']" in capsys.readouterr().err
    assert cli.main(["reproduce", "d4rl", "--data", str(tmp_path), "--sets", "nothing"]) == 2
