"""Recurrent PPO: remember a sign through a corridor, with MinGRU, nn.GRU and without a memory.

    pip install 'minrnn[train,rl]'
    python examples/recurrent_ppo.py --seeds 3 --out recurrent-ppo

A T-maze: at the first step a sign says left or right, a corridor of `--length` steps says nothing,
and at its end the way must be taken that the sign said. Whoever does not remember is right every
second time. PPO (Schulman et al. 2017, arXiv:1707.06347) learns from rollouts in which episodes
end and begin at any step, so that a memory must be emptied there and nowhere else: MinGRU takes a
mask, `reset`, and computes the whole rollout at once; nn.GRU goes step by step, since a state is
to be emptied between two of them.

An episode may also be cut by a time limit (`--limit`). That is no end: more reward would have come,
so the value of the observation after the last step stands for it (Pardo et al. 2018,
arXiv:1712.00378). The vector environment resets nothing by itself, so that this observation is what
its step returns, and every step that is learnt from is one that was played.
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium
import numpy as np
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from gymnasium.wrappers import TimeLimit
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.distributions import Categorical
from torch.nn import functional as F

import minrnn

FORWARD, LEFT, RIGHT = range(3)
MEMORIES = {"mingru": "MinGRU", "gru": "nn.GRU", "none": "no memory"}
# environments, steps of each in a rollout; passes over it, environments in a minibatch of those
NUM_ENVS, ROLLOUT, EPOCHS, MINIBATCH = 32, 64, 4, 8
DISCOUNT, TRACE, CLIP, ENTROPY, VALUE, CLIP_NORM = 0.99, 0.95, 0.2, 0.01, 0.5, 0.5
WIDTH, LEARNING_RATE = 64, 3e-3


class TMaze(gymnasium.Env):
    """A sign at first, a corridor, and a junction where the sign says what is right."""

    observation_space = gymnasium.spaces.Box(0.0, 1.0, (4,), dtype=np.float32)
    action_space = gymnasium.spaces.Discrete(3)

    def __init__(self, length: int) -> None:
        self.length = length

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.sign = int(self.np_random.integers(LEFT, RIGHT + 1))
        self.place = 0
        return self._observe(), {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict]:
        if self.place < self.length:
            # a turn in the corridor runs into the wall
            self.place += action == FORWARD
            return self._observe(), -0.1 * (action != FORWARD), False, False, {}
        right = action == self.sign
        return self._observe(), float(right), True, False, {}

    def _observe(self) -> np.ndarray:
        """Left sign, right sign, corridor, junction."""
        seen = np.zeros(4, dtype=np.float32)
        if self.place == 0:
            seen[0 if self.sign == LEFT else 1] = 1
        seen[2 if self.place < self.length else 3] = 1
        return seen


class Agent(nn.Module):
    """Observations (B, T, 4) -> logits (B, T, 3) and values (B, T), through a memory."""

    def __init__(self, memory: str, longest: int) -> None:
        super().__init__()
        self.embed = nn.Linear(4, WIDTH)
        layers: dict[str, Any] = {"mingru": minrnn.MinGRU, "gru": nn.GRU}
        self.rnn = layers[memory](WIDTH, WIDTH, batch_first=True) if memory in layers else None
        self.policy, self.value = nn.Linear(WIDTH, 3), nn.Linear(WIDTH, 1)
        nn.init.normal_(self.policy.weight, std=0.01)
        if self.rnn is not None:
            _remember(self.rnn, longest)

    def forward(self, x: Tensor, state: Tensor, begins: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Run on from `state` (1, B, WIDTH), emptied before each step where `begins` (B, T)."""
        y = self.embed(x).tanh()
        if isinstance(self.rnn, minrnn.MinGRU):
            y, state = self.rnn(y, state, reset=begins)
        elif self.rnn is not None:
            outputs = []
            for t in range(x.shape[1]):
                state = state * ~begins[None, :, t, None]
                output, state = self.rnn(y[:, t : t + 1], state)
                outputs.append(output)
            y = torch.cat(outputs, dim=1)
        return self.policy(y), self.value(y)[..., 0], state


@torch.no_grad()
def _remember(rnn: Any, longest: int) -> None:
    """Let channels forget after 1 to `longest` steps at first, as Tallec and Ollivier 2018 do.

    arXiv:1804.11188: a gate that lets in sigmoid(-u) remembers for about exp(u) steps.
    """
    u = torch.rand(WIDTH) * np.log(longest)
    if isinstance(rnn, minrnn.MinGRU):
        # rows k, v; sigmoid(k) lets in
        rnn.bias_ih_l0[:WIDTH] -= u
    else:
        # rows r, z, n; sigmoid(z) keeps
        rnn.bias_ih_l0[WIDTH : 2 * WIDTH] += u


class Rollout(NamedTuple):
    """What was seen, done and found; (B, T) each, with features behind where there are any."""

    x: Tensor
    begins: Tensor
    """an episode's first step"""
    actions: Tensor
    log_probs: Tensor
    values: Tensor
    rewards: Tensor
    ends: Tensor
    """an episode's last step"""
    after: Tensor
    """value of the observation after an episode's last step; 0 where the environment ended it"""
    state: Tensor
    """(1, B, WIDTH), of the memory before the first step"""


class Collector:
    """Plays on where it stopped, rollout by rollout."""

    def __init__(self, agent: Agent, length: int, seed: int, limit: int = 0) -> None:
        self.agent = agent

        def make() -> gymnasium.Env:
            return TimeLimit(TMaze(length), limit) if limit else TMaze(length)

        # reset below: the observation after an episode's last step is needed first
        self.environments = SyncVectorEnv([make] * NUM_ENVS, autoreset_mode=AutoresetMode.DISABLED)
        x, _ = self.environments.reset(seed=seed)
        self.x = torch.from_numpy(x)
        self.begins = torch.ones(NUM_ENVS, dtype=torch.bool)
        self.state = torch.zeros(1, NUM_ENVS, WIDTH)

    @torch.no_grad()
    def collect(self) -> tuple[Rollout, Tensor, list[bool]]:
        """A rollout, the values (B,) behind it, and which of the episodes in it ended right."""
        rows, right, first = [], [], self.state
        for _ in range(ROLLOUT):
            x, begins = self.x, self.begins
            logits, values, self.state = self.agent(x[:, None], self.state, begins[:, None])
            chosen = Categorical(logits=logits[:, 0])
            actions = chosen.sample()
            # the environments get a copy, and what they return is copied
            seen, rewards, terminated, cut, _ = self.environments.step(actions.numpy().copy())
            following = torch.from_numpy(seen.copy())
            ends = torch.from_numpy(terminated | cut)
            after = torch.zeros(NUM_ENVS)
            if cut.any():
                never = torch.zeros(NUM_ENVS, 1, dtype=torch.bool)
                _, after, _ = self.agent(following[:, None], self.state, never)
                after = after[:, 0] * torch.from_numpy(cut & ~terminated)
            if ends.any():
                # whoever ended an episode was rewarded, with 1, only if it ended right
                right += (rewards[ends.numpy()] > 0).tolist()
                seen, _ = self.environments.reset(options={"reset_mask": ends.numpy().copy()})
                following = torch.from_numpy(seen.copy())
            parts = (x, begins, actions, chosen.log_prob(actions), values[:, 0])
            rows.append((*parts, torch.from_numpy(rewards).float(), ends, after))
            self.x, self.begins = following, ends
        # without the state that comes of it
        _, behind, _ = self.agent(self.x[:, None], self.state, self.begins[:, None])
        columns = (torch.stack(column, dim=1) for column in zip(*rows, strict=True))
        return Rollout(*columns, first), behind[:, 0], right


def advantages(rollout: Rollout, behind: Tensor) -> Tensor:
    """Generalised advantages (B, T), Schulman et al. 2015, arXiv:1506.02438.

        delta_t = r_t + gamma V_{t+1} - V_t;  A_t = delta_t + gamma lambda A_{t+1}

    At an episode's last step A_{t+1} = 0, and V_{t+1} is 0 if the environment ended the episode, or
    the value of the observation after that step if a time limit cut it.
    """
    found = torch.zeros_like(rollout.rewards)
    following, trace = behind, torch.zeros_like(behind)
    for t in reversed(range(found.shape[1])):
        ends = rollout.ends[:, t]
        following = torch.where(ends, rollout.after[:, t], following)
        delta = rollout.rewards[:, t] + DISCOUNT * following - rollout.values[:, t]
        trace = delta + DISCOUNT * TRACE * torch.where(ends, 0.0, trace)
        found[:, t], following = trace, rollout.values[:, t]
    return found


def update(agent: Agent, optimizer: torch.optim.Optimizer, rollout: Rollout, gains: Tensor) -> None:
    """A few passes over a rollout, whole sequences of some environments at a time."""
    returns = gains + rollout.values
    for _ in range(EPOCHS):
        for rows in torch.randperm(NUM_ENVS).split(MINIBATCH):
            state = rollout.state[:, rows]
            logits, values, _ = agent(rollout.x[rows], state, rollout.begins[rows])
            chosen = Categorical(logits=logits)
            ratio = (chosen.log_prob(rollout.actions[rows]) - rollout.log_probs[rows]).exp()
            gain = gains[rows]
            gain = (gain - gain.mean()) / (gain.std() + 1e-8)
            clipped = ratio.clamp(1 - CLIP, 1 + CLIP)
            loss = -torch.minimum(ratio * gain, clipped * gain).mean()
            loss = loss + VALUE * F.mse_loss(values, returns[rows])
            loss = loss - ENTROPY * chosen.entropy().mean()
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(agent.parameters(), CLIP_NORM)
            optimizer.step()


def learn(memory: str, seed: int, steps: int, length: int, limit: int = 0) -> dict[str, Any]:
    """Train one agent; its curve and where its time went."""
    torch.manual_seed(seed)
    agent = Agent(memory, 2 * length)
    optimizer = torch.optim.Adam(agent.parameters(), lr=LEARNING_RATE)
    collector = Collector(agent, length, seed, limit)
    curve, seconds = [], {"playing": 0.0, "learning": 0.0}
    for done in range(0, steps, NUM_ENVS * ROLLOUT):
        start = time.perf_counter()
        rollout, behind, right = collector.collect()
        played = time.perf_counter()
        update(agent, optimizer, rollout, advantages(rollout, behind))
        seconds["playing"] += played - start
        seconds["learning"] += time.perf_counter() - played
        if right:
            curve.append((done + NUM_ENVS * ROLLOUT, statistics.fmean(right)))
    last = [share for _, share in curve[-5:]]
    return {
        "memory": memory,
        "seed": seed,
        "parameters": sum(p.numel() for p in agent.parameters()),
        "right": statistics.fmean(last) if last else 0.0,
        "seconds": seconds,
        "curve": curve,
    }


def table(found: list[dict[str, Any]]) -> str:
    """A row for each memory: mean and deviation over the seeds."""
    lines = ["| memory | parameters | right at the end % | s playing | s learning |"]
    lines.append("| --- | --- | --- | --- | --- |")
    for memory, title in MEMORIES.items():
        own = [run for run in found if run["memory"] == memory]
        if own:
            right = [100 * run["right"] for run in own]
            shown = f"{statistics.fmean(right):.1f} ± {statistics.pstdev(right):.1f}"
            times = [
                f"{statistics.median(run['seconds'][part] for run in own):.1f}"
                for part in ("playing", "learning")
            ]
            cells = [title, f"{own[0]['parameters']:,}", shown, *times]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(found: list[dict[str, Any]], length: int) -> Figure:
    """Learning curves, a line for each seed."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes: Any = figure.subplots()
    for number, (memory, title) in enumerate(MEMORIES.items()):
        own = [run for run in found if run["memory"] == memory and run["curve"]]
        for place, run in enumerate(own):
            steps, shares = zip(*run["curve"], strict=True)
            label = None if place else title
            axes.plot(steps, [100 * s for s in shares], f"C{number}", label=label, alpha=0.8)
    axes.set_xlabel("steps in the environment")
    axes.set_ylabel("episodes that end right, %")
    axes.set_title(f"A sign remembered through {length} steps", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return figure


def main() -> None:
    """Train every memory with every seed, in turn; print and write what came of it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--memory", nargs="+", choices=MEMORIES, default=list(MEMORIES))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=150_000, help="in the environment, of each")
    parser.add_argument("--length", type=int, default=20, help="steps between sign and junction")
    parser.add_argument("--limit", type=int, default=0, help="steps of an episode; 0 for no limit")
    parser.add_argument("--out", type=Path, help="begins the names of OUT.json and OUT.png")
    asked = parser.parse_args()
    if min(asked.seeds, asked.steps, asked.length) < 1:
        parser.error("--seeds, --steps and --length must be >= 1")
    if asked.limit < 0:
        parser.error("--limit must be >= 0")
    found = []
    for seed in range(asked.seeds):
        for memory in asked.memory:
            found.append(learn(memory, seed, asked.steps, asked.length, asked.limit))
            run = found[-1]
            print(f"{MEMORIES[memory]}, seed {seed}: {100 * run['right']:.1f} % right", flush=True)
    print(table(found))
    if asked.out is not None:
        settings = {"steps": asked.steps, "length": asked.length, "limit": asked.limit}
        settings |= {"torch": torch.__version__}
        facts = json.dumps(settings | {"runs": found}, indent=1) + "\n"
        asked.out.with_suffix(".json").write_text(facts, encoding="utf-8")
        draw(found, asked.length).savefig(asked.out.with_suffix(".png"), dpi=110)


if __name__ == "__main__":
    main()
