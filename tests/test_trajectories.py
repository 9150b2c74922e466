"""Trajectories: how episodes are cut, summed and drawn from; files that are refused."""

from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest

from minrnn import cli
from minrnn.data import trajectory_files
from minrnn.data.trajectories import REFERENCE_RETURNS, Trajectories, normalized, windows
from tests.made_episodes import episodes

LENGTHS = (5, 1, 9, 3)


@pytest.fixture
def data() -> Trajectories:
    return episodes(LENGTHS)


def _write(path: Path, data: Trajectories, **changes: object) -> Path:
    """A D4RL file of `data`, with keys replaced, or left out where the change is None."""
    trajectory_files.write_d4rl(data, path)
    with h5py.File(path, "a") as file:
        for key, value in changes.items():
            del file[key]
            if value is not None:
                file[key] = value
    return path


def test_returns_are_sums_within_an_episode(data) -> None:
    assert data.lengths.tolist() == list(LENGTHS)
    for episode, (start, end) in enumerate(zip(data.starts, data.ends, strict=True)):
        rewards = data.rewards[start:end].astype(np.float64)
        assert data.returns[episode] == pytest.approx(rewards.sum())
        for t in range(start, end):
            assert data.to_go[t] == pytest.approx(data.rewards[t:end].astype(np.float64).sum())


def test_windows_hold_one_episode_each(data) -> None:
    batch = windows(data, 4, 400, seed=(1, 2))
    A, S = data.actions.shape[1], data.observations.shape[1]
    starts = set()
    for x, target, mask in zip(batch.inputs, batch.targets, batch.mask, strict=True):
        before, to_go, observation, number = (part.numpy() for part in x.split([A, 1, S, 1], dim=1))
        steps = int(mask.sum())
        assert mask[:steps].all()
        # the row is found again by its observation
        first = int(np.flatnonzero((data.observations == observation[0]).all(axis=1))[0])
        starts.add(first)
        episode = int(np.searchsorted(data.ends, first, side="right"))
        assert steps == min(4, data.ends[episode] - first)
        rows = slice(first, first + steps)
        assert (target.numpy()[:steps] == data.actions[rows]).all()
        assert (observation[:steps] == data.observations[rows]).all()
        assert to_go[:steps, 0] == pytest.approx(data.to_go[rows], rel=1e-6)
        assert number[:steps, 0].tolist() == list(
            range(first - data.starts[episode], first - data.starts[episode] + steps)
        )
        for t in range(steps):
            previous = data.actions[first + t - 1] if number[t, 0] > 0 else 0.0
            assert (before[t] == previous).all()
        assert not x[steps:].any()
        assert not target[steps:].any()
    # every step is some window's first, in proportion to the lengths of the episodes
    assert starts == set(range(data.num_steps))


def test_windows_depend_on_the_seed_alone(data) -> None:
    one, same, other = (windows(data, 3, 8, seed) for seed in ((0, 1), (0, 1), (0, 2)))
    assert (one.inputs == same.inputs).all()
    assert (one.inputs != other.inputs).any()
    with pytest.raises(ValueError, match=r"`steps` and `batch_size` must be >= 1, got 0, 8"):
        windows(data, 0, 8, (0,))


def test_noise_is_on_the_observations_alone(data) -> None:
    clean, noisy = (windows(data, 4, 400, (0, 1), noise) for noise in (0.0, 0.1))
    assert noisy.targets.equal(clean.targets)
    assert noisy.mask.equal(clean.mask)
    A, S = data.actions.shape[1], data.observations.shape[1]
    added = noisy.inputs - clean.inputs
    assert not added[..., : A + 1].any()
    assert not added[..., A + 1 + S :].any()
    assert not added[~clean.mask].any()
    spread = added[clean.mask][:, A + 1 : -1].std(dim=0)
    assert spread.numpy() == pytest.approx(0.1 * data.moments[1], rel=0.15)


def test_the_best_are_those_with_the_highest_returns(data) -> None:
    best = data.best(0.3)
    order = np.argsort(-data.returns)
    assert best.num_steps >= 0.3 * data.num_steps
    assert set(best.returns) == set(data.returns[order[: best.num_episodes]])
    assert data.best(1.0).num_steps == data.num_steps
    with pytest.raises(ValueError, match=r"`fraction` must be in \(0, 1\], got 0"):
        data.best(0)


def test_a_feature_that_never_changes_is_not_divided_by_zero(data) -> None:
    observations = data.observations.copy()
    observations[:, 1] = 3.0
    mean, std = replace(data, observations=observations).moments
    assert (mean[1], std[1]) == (3.0, 1.0)


@pytest.mark.parametrize("unit", [1e-20, 1e-8, 1.0, 1e8])
def test_observations_in_any_unit_are_standardised(data, unit: float) -> None:
    observations = data.observations * np.float32(unit)
    # changes as rounding does
    observations[:, 1] = np.float32(unit)
    observations[::2, 1] = np.nextafter(np.float32(unit), np.float32(0))
    found = replace(data, observations=observations).moments
    assert found[0] == pytest.approx(observations.mean(axis=0, dtype=np.float64), rel=1e-5)
    expected = data.moments[1].astype(np.float64) * unit
    assert np.delete(found[1], 1) == pytest.approx(np.delete(expected, 1), rel=1e-5)
    assert found[1][1] == 1


def test_files_give_back_what_was_written(data, tmp_path) -> None:
    trajectory_files.write_d4rl(data, tmp_path / "a.hdf5")
    trajectory_files.write_minari(data, tmp_path / "set-v0")
    for path in ("a.hdf5", "set-v0"):
        found = trajectory_files.read([tmp_path / path])
        assert trajectory_files.fingerprint(found) == trajectory_files.fingerprint(data), path
        assert (found.environment, found.reference) == ("Hopper-v5", REFERENCE_RETURNS["Hopper"])
    with pytest.raises(ValueError, match="must be a new one"):
        trajectory_files.write_minari(data, tmp_path / "set-v0")


def test_minari_itself_reads_what_was_written(data, tmp_path, monkeypatch) -> None:
    import minari

    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    trajectory_files.write_minari(data, tmp_path / "made" / "medium-v0")
    loaded = minari.MinariDataset(tmp_path / "made" / "medium-v0" / "data")
    assert loaded.total_steps == data.num_steps
    first = next(loaded.iterate_episodes())
    assert (first.actions == data.actions[: LENGTHS[0]]).all()
    assert loaded.storage.metadata["ref_max_score"] == 3234.3
    # by its name, as minari stores its own
    found = trajectory_files.read([Path("made/medium-v0")])
    assert found.num_episodes == len(LENGTHS)


def test_a_part_of_an_episode_at_the_end_is_dropped(data, tmp_path) -> None:
    ends = np.zeros(data.num_steps, dtype=bool)
    ends[[4, 14]] = True
    nothing = np.zeros(data.num_steps, dtype=bool)
    path = _write(tmp_path / "cut.hdf5", data, terminals=nothing, timeouts=ends)
    found = trajectory_files.read([path])
    assert found.lengths.tolist() == [5, 10]
    assert not found.terminated.any()


def test_sets_stand_one_behind_the_other(data, tmp_path) -> None:
    for name in ("a.hdf5", "b.hdf5"):
        trajectory_files.write_d4rl(data, tmp_path / name)
    for paths in ([tmp_path], [tmp_path / "a.hdf5", tmp_path / "b.hdf5"]):
        both = trajectory_files.read(paths)
        assert both.lengths.tolist() == [*LENGTHS, *LENGTHS]
        assert both.returns == pytest.approx([*data.returns, *data.returns])
    other = episodes(LENGTHS, observation_size=7)
    trajectory_files.write_d4rl(other, tmp_path / "c.hdf5")
    with pytest.raises(ValueError, match="must hold one environment's sets"):
        trajectory_files.read([tmp_path])


BROKEN = {
    "missing": ({"timeouts": None}, r"\['timeouts'\] are missing"),
    "unequal": ({"rewards": np.zeros(4)}, r"all keys must have one length, got .*'rewards': 4"),
    "nan": ({"observations": np.full((18, 11), np.nan)}, r"`observations` must be finite, row 0 "),
    "endless": ({"timeouts": np.zeros(18), "terminals": np.zeros(18)}, "no whole episode"),
    "flat": ({"actions": np.zeros(18)}, r"`actions` must have shape \(N, features\)"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_bad_files_are_named(kind: str, data, tmp_path, capsys) -> None:
    changes, message = BROKEN[kind]
    path = _write(tmp_path / "bad.hdf5", data, **changes)
    with pytest.raises(ValueError, match=message):
        trajectory_files.read([path])
    out = tmp_path / "run"
    assert cli.main(["train", "rl", "--data", str(path), "--out", str(out)]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert str(path) in said
    assert not out.exists()


def test_what_is_no_set_is_refused(tmp_path) -> None:
    (tmp_path / "text.hdf5").write_text("not HDF5")
    with pytest.raises(ValueError, match="it is no HDF5 file"):
        trajectory_files.read([tmp_path / "text.hdf5"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="neither a Minari set nor D4RL files"):
        trajectory_files.read([tmp_path / "empty"])
    with pytest.raises(FileNotFoundError, match="does not exist"):
        trajectory_files.read([tmp_path / "nothing"])
    with pytest.raises(ValueError, match="at least one set, got none"):
        trajectory_files.read([])


def test_a_truncated_file_is_refused(data, tmp_path) -> None:
    path = _write(tmp_path / "a.hdf5", data)
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(ValueError, match=r"a\.hdf5: is damaged"):
        trajectory_files.read([path])


def test_the_score_is_that_of_d4rl(data) -> None:
    assert normalized(-20.272305, data.reference) == 0
    assert data.score(3234.3) == pytest.approx(100)
    assert replace(data, reference=None).score(1.0) is None


def test_data_rl_on_the_command_line(data, tmp_path, capsys) -> None:
    path = _write(tmp_path / "a.hdf5", replace(data, environment=None, reference=None))
    assert cli.main(["data", "rl", "info", str(path)]) == 0
    said = capsys.readouterr().out
    assert "episodes 4, 2 of them ended by the environment; steps 18" in said
    assert "give them by --reference RANDOM EXPERT" in said
    command = ["data", "rl", "convert", str(path), str(tmp_path / "made-v0"), "--to", "minari"]
    assert cli.main(command) == 2
    assert "give it by --env" in capsys.readouterr().err
    assert not (tmp_path / "made-v0").exists()
    assert cli.main([*command, "--env", "Hopper-v5", "--reference", "0", "50"]) == 0
    assert trajectory_files.read([tmp_path / "made-v0"]).reference == (0.0, 50.0)
    back = ["data", "rl", "convert", str(tmp_path / "made-v0"), str(tmp_path / "b.hdf5")]
    assert cli.main([*back, "--to", "d4rl"]) == 0
    found = trajectory_files.read([tmp_path / "b.hdf5"])
    assert trajectory_files.fingerprint(found) == trajectory_files.fingerprint(data)
    assert cli.main([*back, "--to", "d4rl"]) == 2
    assert "exists; choose another name" in capsys.readouterr().err


@pytest.mark.parametrize("place", [0, 3, 5])
@pytest.mark.parametrize("large", [1e30, -1e30])
def test_returns_do_not_depend_on_other_episodes(place: int, large: float) -> None:
    rewards, ends = np.arange(1.0, 7.0), np.array([2, 3, 6])
    rewards[place] = large
    shown = Trajectories(np.zeros((6, 1)), np.zeros((6, 1)), rewards, ends, ends > 2)
    for start, end in ((0, 2), (2, 3), (3, 6)):
        expected = [sum(rewards[n:end].tolist()) for n in range(start, end)]
        assert shown.to_go[start:end] == pytest.approx(expected, rel=1e-6)
    assert shown.returns == pytest.approx(shown.to_go[[0, 2, 3]])
