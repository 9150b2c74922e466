"""Texts in units and files, read side by side: the same ids whatever their number."""

import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest

from minrnn import checkpoint, cli
from minrnn.data import sources, text
from minrnn.data.windows import Windows
from minrnn.interrupts import terminable
from minrnn.runs.corpora import CorpusConfig, build

WORDS = "Tó bé, or not  to be:\n\n  that is (the) question — whether 't is nobler. "


def _ids(corpus: text.Corpus) -> np.ndarray:
    return np.concatenate([corpus.tokens("train")[:], corpus.tokens("valid")[:]])


@pytest.fixture
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "_UNIT", 1000)
    monkeypatch.setattr(sources, "_BLOCK", 64)


def _folder(path: Path) -> Path:
    """Files longer than a unit, short ones, an empty one."""
    path.mkdir()
    for number, times in enumerate((40, 1, 0, 3, 25, 2)):
        (path / f"{number}.txt").write_text(WORDS * times)
    return path


@pytest.mark.parametrize("kind", ["characters", "bytes", "bpe:300"])
def test_many_units_have_the_ids_of_one(tmp_path, monkeypatch, kind) -> None:
    folder = _folder(tmp_path / "texts")
    one = text.build(folder, tmp_path / "one", kind, 0.1)
    assert len(one.shards) == 1
    monkeypatch.setattr(sources, "_UNIT", 1000)
    monkeypatch.setattr(sources, "_BLOCK", 64)
    units = sources.of_files(folder)
    assert len(units) > 4
    assert sum(unit.size for unit in units) == sum(p.stat().st_size for p in folder.iterdir())
    told: list[tuple[int, int]] = []
    many = text.build(
        folder, tmp_path / "many", one.tokenizer, 0.1, lambda *done: told.append(done)
    )
    assert len(many.shards) == len(units)
    assert one.tokenizer.decode(_ids(many).tolist()) == one.tokenizer.decode(_ids(one).tolist())
    if kind != "bpe:300":
        # between files a pair may have been merged
        assert np.array_equal(_ids(many), _ids(one))
    assert many.num_train == int(0.9 * many.num_tokens)
    assert told[-1][0] == told[-1][1]
    again = text.load(tmp_path / "many")
    assert (again.shards, again.sha256) == (many.shards, many.sha256)


@pytest.mark.parametrize("kind", ["bytes", "bpe:300"])
def test_one_long_file_is_cut_where_no_symbol_is(tmp_path, small_units, kind) -> None:
    (tmp_path / "text.txt").write_text(WORDS * 100)
    units = sources.of_files(tmp_path / "text.txt")
    assert len(units) > 5
    many = text.build(tmp_path / "text.txt", tmp_path / "many", kind, 0.1)
    whole = many.tokenizer.encode(WORDS * 100)
    assert np.array_equal(_ids(many), whole)


def test_a_text_without_a_place_to_cut_stays_whole(tmp_path, small_units) -> None:
    (tmp_path / "text.txt").write_text("漢" * 5000)
    [unit] = sources.of_files(tmp_path / "text.txt")
    assert unit.size == 15_000


def test_slices_cross_files(tmp_path, small_units) -> None:
    (tmp_path / "text.txt").write_text(WORDS * 100)
    corpus = text.build(tmp_path / "text.txt", tmp_path / "corpus", "bytes", 0.5)
    whole, tokens = _ids(corpus), corpus.tokens("train")
    assert len(tokens) == corpus.num_train
    for first, stop in ((0, 10), (900, 1100), (0, len(tokens)), (5, 5), (1500, 3700)):
        assert np.array_equal(tokens[first:stop], whole[first:stop])
    valid = corpus.tokens("valid")
    assert np.array_equal(valid[:100], whole[corpus.num_train : corpus.num_train + 100])
    assert np.array_equal(valid[-3:], whole[-3:])


def test_processes_write_the_same_files(tmp_path, monkeypatch) -> None:
    """In processes of their own, which know nothing of patched sizes: units of files."""
    folder = tmp_path / "texts"
    folder.mkdir()
    for number in range(3):
        (folder / f"{number}.txt").write_text(WORDS * (number + 1))
    monkeypatch.setattr(sources, "_UNIT", 100)
    one = text.build(folder, tmp_path / "one", "characters", 0.1)
    two = text.build(folder, tmp_path / "two", "characters", 0.1, processes=2)
    assert len(one.shards) > 2
    assert one.shards == two.shards
    assert one.tokenizer.to_json() == two.tokenizer.to_json()
    bad = folder / "1.txt"
    bad.write_bytes(bad.read_bytes() + b"\xff")
    with pytest.raises(ValueError, match=r"`data` must be UTF-8, .*1\.txt has byte 0xff"):
        text.build(folder, tmp_path / "three", "characters", 0.1, processes=2)
    assert not text.is_corpus(tmp_path / "three")


def test_the_files_of_an_earlier_text_go(tmp_path, small_units) -> None:
    (tmp_path / "text.txt").write_text(WORDS * 100)
    text.build(tmp_path / "text.txt", tmp_path / "corpus", "bytes", 0.1)
    (tmp_path / "text.txt").write_text(WORDS)
    corpus = text.build(tmp_path / "text.txt", tmp_path / "corpus", "bytes", 0.1)
    listed = [shard.name for shard in corpus.shards]
    assert [p.name for p in (tmp_path / "corpus").glob("*.bin")] == listed
    assert text.load(tmp_path / "corpus").shards == corpus.shards


def test_damaged_files_are_named(tmp_path, small_units) -> None:
    (tmp_path / "text.txt").write_text(WORDS * 100)
    corpus = text.build(tmp_path / "text.txt", tmp_path / "corpus", "bytes", 0.1)
    path = tmp_path / "corpus" / corpus.shards[2].name
    path.write_bytes(path.read_bytes()[::-1])
    with pytest.raises(ValueError, match=r"tokens-00002-\w+\.bin is damaged"):
        text.load(tmp_path / "corpus")
    path.unlink()
    with pytest.raises(ValueError, match=r"tokens-00002-\w+\.bin is damaged"):
        text.load(tmp_path / "corpus")
    listed = tmp_path / "corpus" / "corpus.json"
    listed.write_text(listed.read_text().replace(path.name, "../text.txt"))
    with pytest.raises(ValueError, match=r"corpus\.json is damaged"):
        text.load(tmp_path / "corpus")


def test_a_corpus_of_one_file_and_no_list_still_opens(tmp_path) -> None:
    (tmp_path / "text.txt").write_text(WORDS)
    corpus = text.build(tmp_path / "text.txt", tmp_path / "corpus", "bytes", 0.1)
    listed = tmp_path / "corpus" / "corpus.json"
    saved = text.json.loads(listed.read_text())
    [[name, *_]] = saved.pop("shards")
    listed.write_text(text.json.dumps(saved))
    (tmp_path / "corpus" / name).rename(tmp_path / "corpus" / "tokens.bin")
    assert text.load(tmp_path / "corpus").sha256 == corpus.sha256


def test_a_run_takes_a_corpus_that_is_there(tmp_path, capsys) -> None:
    (tmp_path / "text.txt").write_text(WORDS * 20)
    corpus, run = tmp_path / "corpus", tmp_path / "run"
    made = ["data", "text", str(corpus), "--data", str(tmp_path / "text.txt")]
    assert cli.main([*made, "--tokenizer", "bytes", "--processes", "1"]) == 0
    assert f"{20 * len(WORDS.encode()):,} tokens of 256 kinds, files: 1" in capsys.readouterr().out
    options = ["--steps", "2", "--context", "8", "--width", "8", "--num-layers", "1"]
    command = ["train", "text", "--data", str(corpus), "--out", str(run), *options]
    assert cli.main([*command, "--windows", "shuffled", "--batch-size", "2"]) == 0
    assert not (run / "corpus").exists()
    assert checkpoint.load(run).model.config.vocab_size == 256
    assert cli.main(["eval", str(run)]) == 0
    assert cli.main(["info", str(run)]) == 0


def test_wrong_settings_are_named(tmp_path) -> None:
    with pytest.raises(ValueError, match="one of `data` and `dataset` must be given, got neither"):
        build(tmp_path / "out", CorpusConfig())
    with pytest.raises(ValueError, match="got both"):
        build(tmp_path / "out", CorpusConfig(data=tmp_path, dataset="a"))
    with pytest.raises(ValueError, match="`processes` must be >= 0, got -1"):
        CorpusConfig(processes=-1)
    for name in ("split", "column"):
        with pytest.raises(ValueError, match=f"`{name}` belongs to `dataset`"):
            build(tmp_path / "out", CorpusConfig(data=tmp_path, **{name: "text"}))
    (tmp_path / "mine").write_text("keep")
    with pytest.raises(ValueError, match="`out` must be a new folder"):
        build(tmp_path, CorpusConfig(data=tmp_path / "mine"))
    assert (tmp_path / "mine").read_text() == "keep"


def test_a_corpus_never_reads_its_own_output(tmp_path, monkeypatch, capsys) -> None:
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "text.txt").write_text(WORDS)
    monkeypatch.chdir(tmp_path / "texts")
    for out, data in (("c", "."), (".", "."), ("a/c", str(tmp_path)), ("c", "../texts")):
        assert cli.main(["data", "text", out, "--data", data, "--tokenizer", "bytes"]) == 2
        assert "lies inside the text's folder" in capsys.readouterr().err
    assert [path.name for path in Path().iterdir()] == ["text.txt"]
    for _ in range(3):
        assert cli.main(["data", "text", "../c", "--data", ".", "--tokenizer", "bytes"]) == 0
        assert f"{len(WORDS.encode()):,} tokens" in capsys.readouterr().out


def test_a_rebuild_leaves_readers_what_they_read(tmp_path) -> None:
    source, folder = tmp_path / "text.txt", tmp_path / "corpus"
    source.write_text("abcdefgh" * 20)
    corpus = text.build(source, folder, "bytes", 0.1)
    windows = Windows(corpus, 8)
    before = windows.batch(4, (0, 0, 0)).inputs
    source.write_text("ABCDEFGH" * 20)
    with (
        text.being_read(folder),
        text.being_read(folder),
        pytest.raises(ValueError, match=r"another process is at work in .*corpus"),
    ):
        text.build(source, folder, "bytes", 0.1)
    assert windows.batch(4, (0, 0, 0)).inputs.equal(before)
    # of a copy without the lock nothing else is read, and the reader is told
    shutil.copytree(folder, tmp_path / "copy", ignore=shutil.ignore_patterns(".lock"))
    copied = Windows(text.load(tmp_path / "copy"), 8)
    with text.being_read(tmp_path / "copy"):
        text.build(source, tmp_path / "copy", "bytes", 0.1)
    with pytest.raises(FileNotFoundError, match="the corpus was rebuilt or removed"):
        copied.batch(4, (0, 0, 0))


def test_a_build_that_fails_or_is_stopped_changes_nothing(tmp_path) -> None:
    source, folder = tmp_path / "text.txt", tmp_path / "corpus"

    def stop(done: int, total: int) -> None:
        if done > total // 2:
            os.kill(os.getpid(), signal.SIGTERM)

    for _ in range(2):
        source.write_bytes(b"abc" * 20 + b"\xff")
        with pytest.raises(ValueError, match="must be UTF-8"):
            text.build(source, folder, "characters", 0.1)
        source.write_text("abc" * 20)
        with terminable(), pytest.raises(KeyboardInterrupt):
            text.build(source, folder, "characters", 0.1, stop)
        assert not folder.exists()
    built = text.build(source, folder, "characters", 0.1)
    names = sorted(path.name for path in folder.iterdir())
    source.write_bytes(b"xyz" * 20 + b"\xff")
    with pytest.raises(ValueError, match="must be UTF-8"):
        text.build(source, folder, "characters", 0.1)
    assert sorted(path.name for path in folder.iterdir()) == names
    assert text.load(folder).identity == built.identity


def test_what_a_killed_build_left_blocks_no_name(tmp_path) -> None:
    (tmp_path / "text.txt").write_text(WORDS)
    folder = tmp_path / "corpus"
    folder.mkdir()
    for name in (".lock", "tokens-00000-0123456789abcdef.bin", ".tokens-00001.tmp"):
        (folder / name).write_bytes(b"left")
    corpus = build(folder, CorpusConfig(data=tmp_path / "text.txt", tokenizer="bytes"))
    names = {path.name for path in folder.iterdir()}
    assert names == {".lock", "corpus.json", corpus.shards[0].name}


@pytest.mark.parametrize("block", [3, 50, 1 << 22])
def test_an_unknown_character_is_named_by_file_line_and_place(tmp_path, monkeypatch, block) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    known = text.build(_file(tmp_path / "known", "né\r\n"), tmp_path / "known.c", "characters", 0.1)
    _file(folder / "a.txt", "nn\nné")
    _file(folder / "b.txt", "\ufeffné\r\n" * 1 + "né\r\n" * 30 + "nénéXé")
    monkeypatch.setattr(sources, "_BLOCK", block)
    message = r"b\.txt, line 32, character 5: character 'X' \(U\+0058\) is not among the 4"
    for processes in (1, 2):
        with pytest.raises(ValueError, match=message):
            text.build(folder, tmp_path / "c", known.tokenizer, 0.1, processes=processes)
    _file(folder / "b.txt", "\ufeffnX")
    with pytest.raises(ValueError, match=r"b\.txt, line 1, character 2: character 'X'"):
        text.build(folder, tmp_path / "c", known.tokenizer, 0.1)


def _file(path: Path, content: str) -> Path:
    path.write_bytes(content.encode())
    return path
