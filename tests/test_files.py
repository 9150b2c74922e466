"""Files are whole or not there, and open to whom they should be."""

import os
import stat
import threading
from pathlib import Path

import pytest
import torch

import minrnn
from minrnn import checkpoint, cli
from minrnn.data.bpe import BPE
from minrnn.files import replacing, write_atomically
from minrnn.serve.folder_store import FolderStore
from minrnn.serve.sessions import Session
from minrnn.state import State


@pytest.fixture(params=[0o022, 0o077, 0o002], ids=oct)
def mask(request: pytest.FixtureRequest):
    """The umask of the process, which no thread of ours may touch."""
    before = os.umask(request.param)
    yield request.param
    assert os.umask(before) == request.param


def _rights(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_new_file_has_the_usual_rights(tmp_path, mask: int) -> None:
    write_atomically(tmp_path / "x", b"1")
    assert _rights(tmp_path / "x") == 0o666 & ~mask
    write_atomically(tmp_path / "mine", b"1", private=True)
    assert _rights(tmp_path / "mine") == 0o600


@pytest.mark.parametrize("rights", [0o600, 0o640, 0o644, 0o400])
def test_a_replaced_file_keeps_its_rights(tmp_path, rights: int) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"1")
    path.chmod(rights)
    with replacing(path) as file:
        # from the first byte on
        [temporary] = tmp_path.glob(".*.tmp")
        assert _rights(temporary) == rights
        file.write(b"2")
    assert (path.read_bytes(), _rights(path)) == (b"2", rights)
    write_atomically(path, b"3", private=True)
    assert _rights(path) == 0o600


def test_the_umask_is_never_set(tmp_path, monkeypatch) -> None:
    def refuse(mask: int) -> int:
        raise AssertionError("the umask is that of all threads")

    monkeypatch.setattr(os, "umask", refuse)
    write_atomically(tmp_path / "x", b"1")
    write_atomically(tmp_path / "x", b"2", private=True)


def test_files_of_many_threads_have_the_usual_rights(tmp_path) -> None:
    before = os.umask(0o027)
    try:
        writers = [
            threading.Thread(
                target=lambda n=n: [write_atomically(tmp_path / f"{n}-{k}", b"") for k in range(20)]
            )
            for n in range(8)
        ]
        for one in writers:
            one.start()
        for one in writers:
            one.join()
        assert os.umask(0o027) == 0o027
    finally:
        os.umask(before)
    assert {_rights(path) for path in tmp_path.iterdir()} == {0o640}


def _session() -> Session:
    return Session(State({"h": torch.ones(1, 2)}), (), 3, 0.0, 0.0)


def test_sessions_are_private(tmp_path, mask: int) -> None:
    store = FolderStore(tmp_path / "run" / "sessions", "a model")
    store.save("me", "x", _session())
    assert store.claim("me", "y")
    found = list((tmp_path / "run" / "sessions").rglob("*"))
    assert len(found) == 3
    assert {_rights(path) for path in found if path.is_file()} == {0o600}
    folders = [store.folder, *(path for path in found if path.is_dir())]
    assert {_rights(path) for path in folders} == {0o700}
    store.close()


def test_sessions_of_an_older_version_are_closed_to_others(tmp_path) -> None:
    store = FolderStore(tmp_path, "a model")
    store.save("me", "x", _session())
    [owned] = tmp_path.iterdir()
    owned.chmod(0o755)
    (owned / "x.session").chmod(0o644)
    again = FolderStore(tmp_path, "a model")
    assert _rights(owned) == 0o700
    again.save("me", "x", again.load("me", "x"))
    assert _rights(owned / "x.session") == 0o600


# names of files may be any bytes
NAME = os.fsdecode(b"caf\xe9")


def test_any_name_will_do(tmp_path) -> None:
    model = minrnn.LanguageModel(minrnn.ModelConfig(vocab_size=3, width=8, num_layers=1))
    minrnn.save(tmp_path / NAME, model, minrnn.Characters("a\udce9\ud800"))
    loaded, tokenizer = minrnn.load(tmp_path / NAME)
    assert loaded.head.weight.equal(model.head.weight)
    assert tokenizer.vocabulary == "a\udce9\ud800"
    assert checkpoint.read_config(tmp_path / NAME)["tokenizer"]["vocabulary"] == "a\udce9\ud800"
    # what other programs read is UTF-8
    (tmp_path / NAME / "config.json").read_bytes().decode("utf-8")
    State({"h": torch.ones(1, 2)}).save(tmp_path / NAME / NAME)
    assert State.load(tmp_path / NAME / NAME).tensor("h").tolist() == [[1.0, 1.0]]
    (tmp_path / NAME / NAME).write_bytes(b"12")
    with pytest.raises(ValueError, match="`path` holds a damaged state file"):
        State.load(tmp_path / NAME / NAME)


def test_a_text_of_any_name_is_trained_on(tmp_path, capsys) -> None:
    (tmp_path / NAME).write_text("To be, or not to be. " * 40)
    options = ["--context", "16", "--width", "8", "--num-layers", "1", "--steps", "2"]
    options += ["--batch-size", "2", "--eval-every", "2", "--data", str(tmp_path / NAME)]
    run = str(tmp_path / "run")
    assert cli.main(["train", "text", *options, "--out", run]) == 0
    assert cli.main(["train", "--resume", run]) == 0
    assert cli.main(["info", run]) == 0
    assert "caf\\udce9" in capsys.readouterr().out
    assert cli.main(["train", "text", *options, "--out", str(tmp_path / "r\udce9")]) == 2
    assert "must have a name in UTF-8, got " in capsys.readouterr().err
    assert not (tmp_path / "r\udce9").exists()


def test_half_surrogates_are_bytes_or_named() -> None:
    assert minrnn.Bytes().encode("a\udce9").tolist() == [97, 0xE9]
    for tokenizer, text in ((minrnn.Bytes(), "a\ud800"), (BPE(["a b"]), "a\udce9")):
        with pytest.raises(ValueError, match=r"at place 1 is half a surrogate pair"):
            tokenizer.encode(text)
