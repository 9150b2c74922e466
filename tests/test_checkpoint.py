"""Run folders: exact, whole or refused, and never a pickle."""

import errno
import os
from pathlib import Path

import pytest
import torch

import minrnn
from minrnn import checkpoint, files
from minrnn.data.tokenizers import Characters


def _model() -> minrnn.LanguageModel:
    return minrnn.LanguageModel(minrnn.ModelConfig(vocab_size=3, width=8, num_layers=1))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A saved model."""
    minrnn.save(tmp_path / "run", _model(), Characters("abc"))
    return tmp_path / "run"


def test_load_gives_what_was_saved(tmp_path) -> None:
    model = _model().eval()
    minrnn.save(tmp_path, model, Characters("abc"))
    loaded, tokenizer = minrnn.load(tmp_path)
    ids = torch.tensor([[0, 1, 2]])
    assert torch.equal(loaded(ids)[0], model(ids)[0])
    assert loaded.config == model.config
    assert not loaded.training
    assert tokenizer.vocabulary == "abc"
    assert sorted(os.listdir(tmp_path)) == ["config.json", "model.safetensors"]
    minrnn.save(tmp_path, model)
    assert minrnn.load(tmp_path).tokenizer is None


def test_tensors_and_notes_come_back_exactly(tmp_path) -> None:
    tensors = {
        "half": torch.randn(3).bfloat16(),
        "scalar": torch.tensor(2.0),
        "view": torch.arange(6).reshape(2, 3).T,
        "empty": torch.zeros(0, 4),
    }
    checkpoint.write_tensors(tmp_path / "x", tensors, {"step": 3, "best": 0.1 + 0.2})
    loaded, notes = checkpoint.read_tensors(tmp_path / "x")
    assert notes == {"step": 3, "best": 0.1 + 0.2}
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[name], x) for name, x in tensors.items())


def test_truncated_weights_are_refused(folder: Path) -> None:
    weights = folder / "model.safetensors"
    content = weights.read_bytes()
    for size in (0, 5, 100, len(content) - 1):
        weights.write_bytes(content[:size])
        with pytest.raises(ValueError, match=r"model\.safetensors is damaged or truncated"):
            minrnn.load(folder)


def test_altered_weights_are_refused(folder: Path) -> None:
    weights = folder / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(ValueError, match=r"is damaged: its content does not fit its checksum"):
        minrnn.load(folder)


def test_weights_of_another_model_are_refused(folder: Path, tmp_path) -> None:
    tensors, notes = checkpoint.read_tensors(folder / "model.safetensors")
    notes["model"]["width"] = 4
    checkpoint.write_tensors(folder / "model.safetensors", tensors, notes)
    expected = (
        r"does not fit its configuration: embedding\.weight must have shape \(3, 4\), got \(3, 8\)"
    )
    with pytest.raises(ValueError, match=expected):
        minrnn.load(folder)


def test_other_folders_and_files_are_refused(folder: Path, tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match=r"is not a run folder: it has no config\.json"):
        minrnn.load(tmp_path)
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="has no weights yet"):
        minrnn.load(folder)
    (folder / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"has no format 'minrnn\.run/1'"):
        minrnn.load(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is damaged"):
        minrnn.load(folder)


def test_a_pickle_is_refused(folder: Path) -> None:
    torch.save(_model().state_dict(), folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged or truncated"):
        minrnn.load(folder)


@pytest.mark.parametrize(
    ("failing", "code"),
    [("fsync", errno.ENOSPC), ("replace", errno.EACCES), ("open", errno.EROFS)],
)
def test_a_failed_save_leaves_the_old_file(folder, monkeypatch, failing: str, code: int) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def fail(*args: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(files.os, failing, fail)
    with pytest.raises(
        checkpoint.SaveError, match=rf"{os.strerror(code)}; the file that was there"
    ):
        minrnn.save(folder, _model())
    monkeypatch.undo()
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_an_unwritable_folder_is_named(tmp_path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(checkpoint.SaveError, match=r"cannot write the folder .*file"):
        minrnn.save(tmp_path / "file", _model())


def test_leftovers_of_a_killed_process_are_removed(folder: Path) -> None:
    (folder / ".model.safetensors.abc.tmp").write_text("half")
    files.remove_leftovers(folder)
    assert sorted(os.listdir(folder)) == ["config.json", "model.safetensors"]


def test_a_save_that_fails_half_way_leaves_one_whole_model(folder: Path, monkeypatch) -> None:
    wider = minrnn.LanguageModel(minrnn.ModelConfig(vocab_size=3, width=16, num_layers=1))
    for calls in (1, 2):
        replace, left = os.replace, iter(range(calls, 0, -1))

        def fail(source, target, replace=replace, left=left) -> None:
            if next(left) == 1:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            replace(source, target)

        monkeypatch.setattr(files.os, "replace", fail)
        with pytest.raises(checkpoint.SaveError, match="No space left"):
            minrnn.save(folder, wider)
        monkeypatch.undo()
        assert minrnn.load(folder).model.config.width == (8 if calls == 1 else 16)


def test_a_training_is_not_overwritten(folder: Path) -> None:
    checkpoint.write_config(folder, {"text": {}})
    with pytest.raises(ValueError, match="`folder` must not hold a training"):
        minrnn.save(folder, _model())


def test_dtype_is_kept(tmp_path) -> None:
    minrnn.save(tmp_path, _model().double())
    assert minrnn.load(tmp_path).model.head.weight.dtype == torch.float64
