"""The example of recurrent PPO: a memory is emptied where an episode begins, and only there."""

import importlib.util
import json
import sys
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import pytest
import torch
from gymnasium.utils.env_checker import check_env

SCRIPT = Path(__file__).parents[1] / "examples" / "recurrent_ppo.py"


@pytest.fixture(scope="module")
def ppo() -> ModuleType:
    spec = importlib.util.spec_from_file_location("recurrent_ppo", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(params=["mingru", "gru"])
def played(request: pytest.FixtureRequest, ppo: ModuleType):
    """An agent that wanders, and its second rollout: episodes are under way when it begins."""
    torch.manual_seed(1)
    agent = ppo.Agent(request.param, 10)
    torch.nn.init.normal_(agent.policy.weight, std=0.3)
    agent.policy.bias.data[ppo.FORWARD] += 1
    collector = ppo.Collector(agent, 3, seed=2)
    collector.collect()
    rollout, behind, _ = collector.collect()
    # episodes begin in the middle, and some were under way
    assert rollout.begins[:, 1:].any()
    assert not rollout.begins[:, 0].all()
    return agent, rollout, behind


def _log_probs(ppo, agent, rollout, begins):
    logits, values, state = agent(rollout.x, rollout.state, begins)
    chosen = ppo.Categorical(logits=logits)
    return chosen.log_prob(rollout.actions), values, state


def test_learning_sees_what_playing_saw(ppo, played) -> None:
    agent, rollout, _ = played
    with torch.no_grad():
        log_probs, values, _ = _log_probs(ppo, agent, rollout, rollout.begins)
        torch.testing.assert_close(log_probs, rollout.log_probs, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(values, rollout.values, rtol=1e-5, atol=1e-5)
        # one step late, as others had it, or never: the check would see it
        late = rollout.begins.roll(1, dims=1)
        for wrong in (late, torch.zeros_like(rollout.begins)):
            off, _, _ = _log_probs(ppo, agent, rollout, wrong)
            assert (off - rollout.log_probs).abs().max() > 1e-3


def test_an_episode_answers_as_it_would_alone(ppo, played) -> None:
    agent, rollout, _ = played
    with torch.no_grad():
        whole, _, _ = agent(rollout.x, rollout.state, rollout.begins)
        checked = 0
        for row in range(4):
            firsts = [*rollout.begins[row].nonzero()[:, 0].tolist(), ppo.ROLLOUT]
            for first, last in pairwise(firsts):
                piece = rollout.x[row : row + 1, first:last]
                nothing = torch.zeros(1, last - first, dtype=torch.bool)
                alone, _, _ = agent(piece, torch.zeros(1, 1, ppo.WIDTH), nothing)
                torch.testing.assert_close(alone[0], whole[row, first:last], rtol=1e-5, atol=1e-5)
                checked += 1
        assert checked > 8


def test_gradients_stop_where_an_episode_begins(ppo, played) -> None:
    agent, rollout, _ = played
    x = rollout.x.clone().requires_grad_()
    logits, _, _ = agent(x, rollout.state, rollout.begins)
    row = int(rollout.begins[:, 1:].any(dim=1).nonzero()[0])
    last = int(rollout.begins[row].nonzero()[-1])
    (grad,) = torch.autograd.grad(logits[row, -1].sum(), x)
    assert not grad[row, :last].any()
    assert grad[row, last:].any()


def test_advantages_are_those_of_each_episode(ppo, played) -> None:
    _, rollout, behind = played
    found = ppo.advantages(rollout, behind)
    B, T = found.shape
    values = torch.cat([rollout.values, behind[:, None]], dim=1)
    for b in range(0, B, 7):
        for t in range(0, T, 5):
            total, weight = 0.0, 1.0
            for s in range(t, T):
                after = 0.0 if rollout.ends[b, s] else ppo.DISCOUNT * values[b, s + 1]
                total += weight * (rollout.rewards[b, s] + after - values[b, s])
                weight *= ppo.DISCOUNT * ppo.TRACE
                if rollout.ends[b, s]:
                    break
            assert found[b, t].item() == pytest.approx(float(total), abs=1e-4)


def _rollout(ppo, **columns):
    """One environment, three steps; values of the steps 10, 20, 40."""
    zeros = torch.zeros(1, 3)
    columns = {name: torch.tensor([column]) for name, column in columns.items()}
    known = {
        "x": torch.zeros(1, 3, 4),
        "begins": zeros.bool(),
        "actions": zeros.long(),
        "log_probs": zeros,
        "values": torch.tensor([[10.0, 20.0, 40.0]]),
        "rewards": torch.tensor([[1.0, 2.0, 3.0]]),
        "ends": zeros.bool(),
        "after": zeros,
        "state": torch.zeros(1, 1, ppo.WIDTH),
    }
    return ppo.Rollout(**(known | columns))


def test_a_time_limit_is_no_end(ppo, monkeypatch) -> None:
    monkeypatch.setattr(ppo, "DISCOUNT", 0.5)
    monkeypatch.setattr(ppo, "TRACE", 0.5)
    behind = torch.tensor([80.0])
    # delta: 1 + 0.5 * 20 - 10 = 1, 2 + 0.5 * 40 - 20 = 2, 3 + 0.5 * 80 - 40 = 3
    found = ppo.advantages(_rollout(ppo), behind)
    assert found.tolist() == [[1 + 0.25 * (2 + 0.25 * 3), 2 + 0.25 * 3, 3]]
    # ended by the environment at the second step: 2 - 20
    ended = {"ends": [False, True, False]}
    found = ppo.advantages(_rollout(ppo, **ended), behind)
    assert found.tolist() == [[1 + 0.25 * -18, -18, 3]]
    # cut there, where the next observation has the value 100: 2 + 0.5 * 100 - 20
    found = ppo.advantages(_rollout(ppo, **ended, after=[0.0, 100.0, 0.0]), behind)
    assert found.tolist() == [[1 + 0.25 * 32, 32, 3]]
    # cut at the last step: its own next value, not that of the episode that follows
    cut = {"ends": [False, False, True], "after": [0.0, 0.0, 100.0]}
    found = ppo.advantages(_rollout(ppo, **cut), behind)
    assert found[0, 2] == 3 + 0.5 * 100 - 40


def test_an_episode_that_is_cut_goes_on_in_its_value(ppo) -> None:
    torch.manual_seed(1)
    limit = 5
    agent = ppo.Agent("mingru", 10)
    agent.policy.bias.data[ppo.FORWARD] += 2
    collector = ppo.Collector(agent, 3, seed=2, limit=limit)
    collector.collect()
    rollout = collector.collect()[0]
    cut = rollout.after != 0
    assert cut.any()
    assert (rollout.ends & ~cut).any()
    assert not (cut & ~rollout.ends).any()
    # every step that is learnt from was played: episodes begin where others end, at the first sign
    assert rollout.begins[:, 1:].equal(rollout.ends[:, :-1])
    assert (rollout.x[:, :, :2].sum(dim=2)[rollout.begins] == 1).all()


def test_the_value_after_a_cut_is_that_of_the_next_observation(ppo) -> None:
    torch.manual_seed(1)
    limit = 5
    agent = ppo.Agent("mingru", 10)
    rollout = ppo.Collector(agent, 3, seed=2, limit=limit).collect()[0]
    maze, nothing = ppo.TMaze(3), torch.zeros(1, limit + 1, dtype=torch.bool)
    cuts = (rollout.after != 0).nonzero()[:8].tolist()
    assert len(cuts) == 8
    for row, last in cuts:
        # the episode once more, alone, with one observation more
        first = last - limit + 1
        maze.reset()
        maze.sign = ppo.LEFT if rollout.x[row, first, 0] else ppo.RIGHT
        for action in rollout.actions[row, first : last + 1].tolist():
            seen = maze.step(action)[0]
        x = torch.cat([rollout.x[row, first : last + 1], torch.from_numpy(seen)[None]])[None]
        with torch.no_grad():
            _, values, _ = agent(x, torch.zeros(1, 1, ppo.WIDTH), nothing)
        torch.testing.assert_close(values[0, -1], rollout.after[row, last], rtol=1e-4, atol=1e-5)


def test_the_maze_is_an_environment(ppo) -> None:
    maze = ppo.TMaze(2)
    check_env(maze, skip_render_check=True)
    seen, _ = maze.reset(seed=0)
    assert seen[:2].sum() == 1
    _, wall, _, _, _ = maze.step(ppo.LEFT)
    assert wall == -0.1
    for _ in range(2):
        seen, reward, ended, _, _ = maze.step(ppo.FORWARD)
        assert (reward, ended) == (0, False)
    assert seen.tolist() == [0, 0, 0, 1]
    assert maze.step(maze.sign)[1:3] == (1.0, True)


@pytest.mark.long
def test_a_memory_is_what_it_takes(ppo, tmp_path, capsys, monkeypatch) -> None:
    out = tmp_path / "ppo"
    options = ["--memory", "mingru", "none", "--seeds", "1", "--steps", "60000", "--length", "2"]
    monkeypatch.setattr(sys, "argv", ["recurrent_ppo.py", *options, "--out", str(out)])
    ppo.main()
    said = capsys.readouterr().out
    assert "| MinGRU |" in said
    assert "| no memory |" in said
    runs = json.loads(out.with_suffix(".json").read_text())["runs"]
    right = {run["memory"]: run["right"] for run in runs}
    # without a memory the sign is guessed
    assert right["mingru"] > 0.9
    assert right["none"] < 0.75
    assert out.with_suffix(".png").stat().st_size > 5000
    for wrong in (["--seeds", "0"], ["--limit", "-1"]):
        monkeypatch.setattr(sys, "argv", ["recurrent_ppo.py", *wrong])
        with pytest.raises(SystemExit, match="2"):
            ppo.main()
