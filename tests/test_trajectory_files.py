"""Sets of episodes on disk: relative paths, damaged files, sets that are joined."""

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest

from minrnn import cli
from minrnn.data import trajectory_files
from minrnn.data.trajectories import REFERENCE_RETURNS
from tests.made_episodes import episodes

HOPPER = REFERENCE_RETURNS["Hopper"]


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    """The working folder, with a D4RL file and a Minari set of the same episodes."""
    folder = tmp_path / "home"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "stored"))
    data = episodes((3, 4))
    trajectory_files.write_d4rl(data, folder / "a.hdf5")
    trajectory_files.write_minari(data, folder / "set-v0")
    trajectory_files.write_minari(data, tmp_path / "stored" / "kept" / "set-v0")
    return folder


FROM = ("a.hdf5", "./a.hdf5", "../home/a.hdf5", "set-v0", "./set-v0/", "set-v0/data", "kept/set-v0")
OUT = (
    ("b-v0", "minari"),
    ("./b-v0/", "minari"),
    ("x/y/b-v0", "minari"),
    ("../b-v0", "minari"),
    ("b.hdf5", "d4rl"),
    ("x/y/b.hdf5", "d4rl"),
    ("../b.hdf5", "d4rl"),
)


@pytest.mark.parametrize(
    ("source", "out", "to"),
    [(source, *OUT[n % len(OUT)]) for n, source in enumerate(FROM)]
    + [("a.hdf5", *out) for out in OUT]
    + [("set-v0", *out) for out in OUT],
)
def test_converting_takes_relative_paths(source: str, out: str, to: str, home, capsys) -> None:
    before = trajectory_files.fingerprint(trajectory_files.read([Path("a.hdf5")]))
    assert cli.main(["data", "rl", "convert", source, out, "--to", to]) == 0
    assert "2 episodes, 7 steps" in capsys.readouterr().out
    found = trajectory_files.read([Path(out)])
    assert trajectory_files.fingerprint(found) == before
    assert (found.environment, found.reference) == ("Hopper-v5", HOPPER)
    # nothing is left beside it
    assert not [p.name for p in Path(out).absolute().parent.iterdir() if p.name[0] == "."]


def _attributes(path: Path, **values: object) -> None:
    with h5py.File(path, "a") as file:
        file.attrs.update(values)


def _metadata(folder: Path, **values: object) -> None:
    path = folder / "data" / "metadata.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


BAD = ((5.0, 5.0), (7.0, 5.0), (float("nan"), 5.0), (0.0, float("inf")), ("low", 5.0))


@pytest.mark.parametrize("values", BAD)
def test_reference_returns_of_files_are_checked(values, home, capsys) -> None:
    names = dict(zip(("ref_min_score", "ref_max_score"), values, strict=True))
    _attributes(Path("a.hdf5"), **names)
    _metadata(Path("set-v0"), **names)
    for path in ("a.hdf5", "set-v0"):
        message = f"{path}: `reference` must be two finite returns"
        with pytest.raises(ValueError, match=message):
            trajectory_files.read([Path(path)])
        for command in (["data", "rl", "info", path], ["train", "rl", "--data", path]):
            assert cli.main(command) == 2
            said = capsys.readouterr().err
            assert message in said
            assert said.count("\n") == 1
    assert not Path("runs/rl").exists()


def test_reference_returns_that_are_null_are_not_known(home) -> None:
    for values in ((None, None), (1.0, None)):
        names = dict(zip(("ref_min_score", "ref_max_score"), values, strict=True))
        _metadata(Path("set-v0"), **names)
        assert trajectory_files.read([Path("set-v0")]).reference == HOPPER
    _attributes(Path("a.hdf5"), ref_min_score=np.array([1.0]), ref_max_score=np.float32(2))
    assert trajectory_files.read([Path("a.hdf5")]).reference == (1.0, 2.0)


@pytest.mark.parametrize("command", [["info"], ["convert"], ["train"]])
def test_reference_returns_that_are_given_are_checked(command, home, capsys) -> None:
    words = {
        "info": ["data", "rl", "info", "a.hdf5"],
        "convert": ["data", "rl", "convert", "a.hdf5", "b.hdf5", "--to", "d4rl"],
        "train": ["train", "rl", "--data", "a.hdf5"],
    }[command[0]]
    assert cli.main([*words, "--reference", "5", "5"]) == 2
    assert "`reference` must be" in capsys.readouterr().err


CASES = {
    "many": ({"total_episodes": 3}, "`total_episodes` of its metadata must be 2, .* got 3"),
    "few": ({"total_episodes": 1}, "`total_episodes` of its metadata must be 2, .* got 1"),
    "none": ({"total_episodes": None}, "`total_episodes` of its metadata must be 2, .* got None"),
    "text": ({"total_episodes": "2"}, "`total_episodes` of its metadata must be 2, .* got 2"),
    "format": ({"data_format": "pickle"}, "`data_format` must be one of .*, got 'pickle'"),
    "space": ({"observation_space": "{}"}, "`observation_space` of its metadata is no space"),
    "spec": ({"env_spec": "[1]"}, "`env_spec` of its metadata must be an object"),
    "json": ({"env_spec": "{"}, "`env_spec` of its metadata must be an object"),
    "name": ({"env_spec": '{"id": 5}'}, "`id` of `env_spec` in its metadata must be a string"),
}


@pytest.mark.parametrize("kind", CASES)
def test_damaged_metadata_of_minari_is_named(kind: str, home, capsys) -> None:
    values, message = CASES[kind]
    _metadata(Path("set-v0"), **values)
    with pytest.raises(ValueError, match=f"^set-v0: {message}"):
        trajectory_files.read([Path("set-v0")])
    assert cli.main(["data", "rl", "info", "set-v0"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


DAMAGE = {
    "key": ("rewards", None, "is damaged"),
    "short": ("rewards", np.zeros(2), "episode 0 must have one observation more"),
    "ends": ("terminations", np.zeros(2, dtype=bool), "episode 0 must have one observation more"),
    "nothing": ("rewards", np.zeros(0), "episode 0 must have at least one step"),
    "flat": ("actions", np.zeros(3), r"`actions` must be vectors, got shape \(3,\)"),
    "size": ("actions", np.zeros((3, 2)), "its episodes must have vectors of one size"),
    "nan": ("observations", np.full((4, 11), np.nan), "`observations` must be finite"),
    "words": ("rewards", np.array([b"a", b"b", b"c"]), "`rewards` must be float32, got dtype"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_data_of_minari_is_named(kind: str, home, capsys) -> None:
    name, value, message = DAMAGE[kind]
    with h5py.File("set-v0/data/main_data.hdf5", "a") as file:
        del file["episode_0"][name]
        if value is not None:
            file["episode_0"][name] = value
    with pytest.raises(ValueError, match=f"^set-v0: {message}"):
        trajectory_files.read([Path("set-v0")])
    assert cli.main(["data", "rl", "info", "set-v0"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("content", ["", "[]", "null", "{", "{}"])
def test_metadata_that_is_none_is_named(content: str, home, capsys) -> None:
    Path("set-v0/data/metadata.json").write_text(content)
    assert cli.main(["data", "rl", "info", "set-v0"]) == 2
    said = capsys.readouterr().err
    assert "set-v0: " in said
    assert said.count("\n") == 1


def test_files_of_minari_that_are_gone_are_named(home, capsys) -> None:
    data = Path("set-v0/data/main_data.hdf5")
    for damage in (lambda: data.write_bytes(data.read_bytes()[:-3000]), data.unlink):
        damage()
        assert cli.main(["data", "rl", "info", "set-v0"]) == 2
        said = capsys.readouterr().err
        assert "set-v0: is damaged" in said
        assert said.count("\n") == 1


@pytest.mark.parametrize("kind", ["arrow", "parquet"])
def test_other_formats_of_minari_are_read(kind: str, home, capsys) -> None:
    from minari.data_collector import EpisodeBuffer
    from minari.dataset.minari_storage import MinariStorage

    if importlib.util.find_spec("pyarrow") is None:
        _metadata(Path("set-v0"), data_format=kind)
        with pytest.raises(ModuleNotFoundError, match="pyarrow is not installed"):
            trajectory_files.read([Path("set-v0")])
        return
    stored = MinariStorage.read("set-v0/data")
    spaces = {"observations": stored.observation_space, "actions": stored.action_space}
    Path("b-v0").mkdir()
    folder = Path("b-v0/data").absolute()
    other = MinariStorage.new(folder, *spaces.values(), data_format=kind)
    names = ("rewards", "terminations", "truncations")
    other.update_episodes(
        EpisodeBuffer(
            **{name: episode[name].astype(space.dtype) for name, space in spaces.items()},
            **{name: episode[name] for name in names},
        )
        for episode in stored.get_episodes(range(2))
    )
    found, same = (trajectory_files.read([Path(name)]) for name in ("b-v0", "a.hdf5"))
    assert trajectory_files.fingerprint(found) == trajectory_files.fingerprint(same)
    _metadata(Path("b-v0"), total_episodes=3)
    with pytest.raises(ValueError, match="must be 2, those in its data, got 3"):
        trajectory_files.read([Path("b-v0")])


FLAT = {
    "empty": (dict.fromkeys(("observations", "actions"), np.zeros((0, 3))), "no rows"),
    "two": ({"rewards": np.zeros((7, 2))}, r"`rewards` must have shape \(N,\), got \(7, 2\)"),
    "ends": ({"timeouts": np.full(7, np.nan)}, "`timeouts` must be booleans, or 0 and 1"),
    "words": ({"rewards": np.array([b"a"] * 7)}, "`rewards` must be float32, got dtype"),
    "complex": ({"rewards": np.zeros(7) * 1j}, "`rewards` must be float32, got dtype complex128"),
    "large": ({"rewards": np.full(7, 1e60)}, "`rewards` must be finite, row 0 and 6 others"),
    "wide": ({"observations": np.zeros((7, 2, 3))}, r"`observations` must have shape \(N, feat"),
    "bare": ({"observations": np.zeros((7, 0))}, r"`observations` must have shape \(N, feat"),
    "number": (dict.fromkeys(("rewards", "actions"), 5.0), "all keys must have one length"),
}


@pytest.mark.parametrize("kind", FLAT)
def test_damaged_columns_are_named(kind: str, home, capsys) -> None:
    values, message = FLAT[kind]
    if kind == "empty":
        values = values | dict.fromkeys(("rewards", "terminals", "timeouts"), np.zeros(0))
    with h5py.File("a.hdf5", "a") as file:
        for name, value in values.items():
            del file[name]
            file[name] = value
    with pytest.raises(ValueError, match=rf"^a\.hdf5: .*{message}"):
        trajectory_files.read([Path("a.hdf5")])
    assert cli.main(["data", "rl", "info", "a.hdf5"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_shapes_that_damage_made_up_fill_no_memory(home) -> None:
    with h5py.File("a.hdf5", "a") as flat, h5py.File("set-v0/data/main_data.hdf5", "a") as set_:
        for group, name in ((flat, "timeouts"), (set_["episode_0"], "terminations")):
            del group[name]
            # nothing of it is stored
            group.create_dataset(name, shape=(1 << 40,), dtype=bool, chunks=(3,))
    with pytest.raises(ValueError, match=r"^a\.hdf5: `timeouts` must have 1,099,511,627,776 bytes"):
        trajectory_files.read([Path("a.hdf5")])
    with pytest.raises(ValueError, match=r"^set-v0: .*`episode_0/terminations` must have 1,0"):
        trajectory_files.read([Path("set-v0")])


def test_attributes_of_other_kinds_are_named(home) -> None:
    for value in (5, np.array([b"a", b"b"]), b"\xff"):
        _attributes(Path("a.hdf5"), env=value)
        with pytest.raises(ValueError, match=r"^a\.hdf5: the attribute `env` must be"):
            trajectory_files.read([Path("a.hdf5")])
    _attributes(Path("a.hdf5"), env="")
    assert trajectory_files.read([Path("a.hdf5")]).environment is None


def test_numbers_of_other_kinds_are_read(home) -> None:
    data = trajectory_files.read([Path("a.hdf5")])
    with h5py.File("a.hdf5", "a") as file:
        for name, dtype in (("rewards", "f8"), ("terminals", "u1"), ("timeouts", "f4")):
            value = file[name][()].astype(dtype)[:, None]
            del file[name]
            file[name] = value
    found = trajectory_files.read([Path("a.hdf5")])
    assert trajectory_files.fingerprint(found) == trajectory_files.fingerprint(data)


def test_versions_of_an_environment_are_joined_by_its_name(home, capsys) -> None:
    for name in ("Hopper-v2", "Hopper-v5"):
        data = replace(episodes((3, 4)), environment=name)
        trajectory_files.write_d4rl(data, home / "both" / f"{name}.hdf5")
    commands = {
        "info": ["data", "rl", "info", "both"],
        "convert": ["data", "rl", "convert", "both", "both-v0", "--to", "minari"],
        "train": ["train", "rl", "--data", "both", "--steps", "1", "--width", "8"],
    }
    for command in commands.values():
        assert cli.main(command) == 2
        assert "join versions of one environment by --env" in capsys.readouterr().err
        assert cli.main([*command, "--env", "Hopper-v5"]) == 0
        capsys.readouterr()
    assert trajectory_files.read([Path("both-v0")]).num_episodes == 4


def test_sets_of_other_reference_returns_are_joined_by_given_ones(home, capsys) -> None:
    other = replace(episodes((3, 4)), reference=(0.0, 1.0))
    trajectory_files.write_d4rl(other, home / "b.hdf5")
    command = ["data", "rl", "info", "a.hdf5", "b.hdf5"]
    assert cli.main(command) == 2
    assert "`paths` must have the same reference returns" in capsys.readouterr().err
    assert cli.main([*command, "--reference", "0", "10"]) == 0


def test_a_set_of_minari_has_the_spaces_of_its_environment(home, capsys) -> None:
    command = ["data", "rl", "convert", "a.hdf5", "b-v0", "--to", "minari"]
    assert cli.main([*command, "--env", "Walker2d-v5"]) == 2
    assert "Walker2d-v5 must have observations of 11 numbers" in capsys.readouterr().err
    command[4] = "no version"
    assert cli.main(command) == 2
    assert "must have the name of a Minari set, like medium-v0" in capsys.readouterr().err
    assert sorted(p.name for p in home.iterdir()) == ["a.hdf5", "set-v0"]


def test_what_info_advises_is_taken(home, capsys) -> None:
    data = replace(episodes((3, 4)), environment=None, reference=None)
    trajectory_files.write_d4rl(data, Path("c.hdf5"))
    assert cli.main(["data", "rl", "info", "c.hdf5"]) == 0
    said = capsys.readouterr().out
    assert "environment not said; give it by --env" in said
    assert "give them by --reference RANDOM EXPERT" in said
    options = ["--reference", "0", "10", "--env", "Mine-v0"]
    assert cli.main(["data", "rl", "info", "c.hdf5", *options]) == 0
    said = capsys.readouterr().out
    assert "environment Mine-v0" in said
    assert f"score mean {10 * data.returns.mean():.1f}" in said
