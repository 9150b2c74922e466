"""Text to ids on disk to batches, of any size, and the two Shakespeares."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch

from minrnn.data import shakespeare, sources, text, tokenizers
from minrnn.data.tokenizers import Bytes, Characters
from minrnn.data.windows import Order, Windows, permuted
from minrnn.evaluation import evaluate
from minrnn.losses import next_symbol
from minrnn.models import LanguageModel, ModelConfig
from minrnn.tasks import TextTask

SHARED = Path(__file__).parents[1].parent / "shared" / "data" / "tinyshakespeare.txt"
MIXED = "a,é—漢🎭\r\n\tz" * 50


def _build(tmp_path: Path, content: bytes, kind: str = "characters", valid: float = 0.1):
    source = tmp_path / "text.txt"
    source.write_bytes(content)
    return text.build(source, tmp_path / "corpus", kind, valid)


def _all_ids(corpus: text.Corpus) -> np.ndarray:
    return np.concatenate([corpus.tokens("train")[:], corpus.tokens("valid")[:]])


@pytest.mark.parametrize("kind", ["characters", "bytes"])
@pytest.mark.parametrize("block", [1, 3, 7, 1 << 22])
def test_any_utf8_comes_back(tmp_path, monkeypatch, kind: str, block: int) -> None:
    # blocks of a few bytes cut characters in two
    monkeypatch.setattr(sources, "_BLOCK", block)
    corpus = _build(tmp_path, MIXED.encode(), kind)
    ids = _all_ids(corpus)
    assert corpus.tokenizer.decode(ids.tolist()) == MIXED
    assert corpus.num_tokens == len(ids) == len(MIXED if kind == "characters" else MIXED.encode())
    assert corpus.num_train == int(0.9 * len(ids))
    assert corpus.sha256 == hashlib.sha256(ids.tobytes()).hexdigest()


def test_corpus_is_opened_again(tmp_path) -> None:
    built = _build(tmp_path, MIXED.encode())
    loaded = text.load(tmp_path / "corpus")
    assert loaded.tokenizer.to_json() == built.tokenizer.to_json()
    assert (loaded.num_tokens, loaded.num_train) == (built.num_tokens, built.num_train)
    assert np.array_equal(_all_ids(loaded), _all_ids(built))


def test_ids_take_the_smallest_type(tmp_path) -> None:
    few = _build(tmp_path, b"abc" * 10)
    assert few.tokens("train").dtype == np.uint8
    many = "".join(chr(0x4E00 + n) for n in range(300))
    assert _build(tmp_path, many.encode()).tokens("train").dtype == np.uint16


@pytest.mark.parametrize("block", [2, 1 << 22])
def test_invalid_utf8_is_named_by_its_offset(tmp_path, monkeypatch, block: int) -> None:
    monkeypatch.setattr(sources, "_BLOCK", block)
    content = "né".encode() * 4 + b"\xff" + b"abc"
    with pytest.raises(ValueError, match=r"text\.txt has byte 0xff at offset 12 "):
        _build(tmp_path, content)
    assert not (tmp_path / "corpus" / "corpus.json").exists()
    corpus = _build(tmp_path, content, "bytes")
    assert _all_ids(corpus).tobytes() == content


def test_a_character_cut_off_by_the_end_is_named(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"has byte 0xe6 at offset 3 \(unexpected end of data\)"):
        _build(tmp_path, b"abc" + "漢".encode()[:2])


def test_a_folder_is_read_in_order_of_its_paths(tmp_path) -> None:
    source = tmp_path / "texts"
    (source / "b").mkdir(parents=True)
    (source / "b" / "1.txt").write_text("second")
    (source / "a.txt").write_text("first\n")
    (source / "c.txt").write_text("")
    (source / ".hidden").write_text("never")
    corpus = text.build(source, tmp_path / "corpus", "bytes", 0.5)
    assert Bytes().decode(_all_ids(corpus).tolist()) == "first\nsecond\n"


def test_missing_and_empty_texts_are_named(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match=r"`data` must name a file or folder, .*none"):
        text.build(tmp_path / "none", tmp_path / "corpus", "bytes", 0.1)
    with pytest.raises(ValueError, match=r"`data` must hold text, .*text\.txt is empty"):
        _build(tmp_path, b"")
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match=r"`data` must hold text, the folder .* has no files"):
        text.build(tmp_path / "folder", tmp_path / "corpus", "bytes", 0.1)


def test_short_texts_are_named(tmp_path) -> None:
    corpus = _build(tmp_path, b"abcdefghij" * 10)
    corpus.check_windows(89)
    with pytest.raises(ValueError, match=r"train part must have at least 91 symbols .* got 90"):
        corpus.check_windows(90)
    with pytest.raises(ValueError, match=r"valid part must have at least 2 symbols .* got 1"):
        _build(tmp_path, b"abcdefghij").check_windows(2)


def test_damaged_corpora_are_named(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match="`folder` must hold a corpus"):
        text.load(tmp_path)
    _build(tmp_path, b"abc" * 10)
    [tokens] = (tmp_path / "corpus").glob("tokens*.bin")
    tokens.write_bytes(tokens.read_bytes()[:-1])
    with pytest.raises(ValueError, match="is damaged: its content does not fit its checksum"):
        text.load(tmp_path / "corpus")
    (tmp_path / "corpus" / "corpus.json").write_text("{")
    with pytest.raises(ValueError, match=r"corpus\.json is damaged"):
        text.load(tmp_path / "corpus")


def test_random_batches_depend_on_the_seed_alone(tmp_path) -> None:
    corpus = _build(tmp_path, MIXED.encode())
    first, again = (Windows(corpus, 8).batch(4, (1, 2)) for _ in range(2))
    other = Windows(corpus, 8).batch(4, (1, 3))
    assert first.inputs.equal(again.inputs)
    assert not first.inputs.equal(other.inputs)
    # each target is the input one step later, and all come from the training part
    assert first.targets[:, :-1].equal(first.inputs[:, 1:])
    train = corpus.tokens("train")[:].tolist()
    row = first.inputs[0].tolist()
    assert any(train[n : n + 8] == row for n in range(len(train)))


def test_every_place_of_the_training_part_is_drawn(tmp_path) -> None:
    corpus = _build(tmp_path, bytes(range(40)), "bytes", 0.5)
    drawn = Windows(corpus, 4).batch(500, (0,))
    assert set(drawn.inputs[:, 0].tolist()) == set(range(16))
    assert drawn.targets.max() == 19


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 31, 1000, 4096])
def test_a_permutation_is_one_and_depends_on_its_key(count) -> None:
    index = np.arange(count)
    found = permuted(index, count, (3, 1))
    assert sorted(found) == index.tolist()
    if count > 30:
        assert not np.array_equal(found, permuted(index, count, (3, 2)))
        assert not np.array_equal(found, permuted(index, count, (4, 1)))
        # neighbours do not stay neighbours
        assert (np.abs(np.diff(found)) == 1).mean() < 0.2


def test_a_shuffled_pass_reads_each_window_once_whatever_the_batch(tmp_path) -> None:
    corpus = _build(tmp_path, bytes(range(256)) * 8, "bytes", 0.5)
    count = (corpus.num_train - 1) // 10
    orders = []
    for size, parts in ((4, 1), (2, 2), (8, 1)):
        windows = Windows(corpus, 10, "shuffled", size * parts)
        steps = -(-2 * count // windows.batch_size)
        order = [
            place
            for step in range(steps)
            for part in range(parts)
            for place in windows.places(size, (5, step, part)).tolist()
        ]
        orders.append(order[: 2 * count])
    assert orders[0] == orders[1] == orders[2]
    first, second = orders[0][:count], orders[0][count:]
    assert sorted(first) == sorted(second) == [10 * n for n in range(count)]
    assert first != second
    assert first != sorted(first)


def test_consecutive_windows_go_on_where_the_last_ended(tmp_path) -> None:
    corpus = _build(tmp_path, bytes(range(100)), "bytes", 0.2)
    windows = Windows(corpus, 6, "consecutive", 3)
    # 79 symbols and one to tell after the last: three streams of 26, four windows in each
    ids = [windows.batch(3, (0, step, 0)).inputs for step in range(5)]
    assert [windows.goes_on(step) for step in range(6)] == [False, True, True, True, False, True]
    assert torch.cat(ids[:4], dim=1)[0].tolist() == list(range(24))
    assert ids[4].equal(ids[0])
    assert [row[0].item() for row in ids[0]] == [0, 26, 52]
    # a share of the batch, and a batch in parts, hold the same rows
    assert windows.batch(3, (0, 1, 0), slice(1, 3)).inputs.equal(ids[1][1:])
    assert windows.batch(1, (0, 1, 2)).inputs.equal(ids[1][2:])
    with pytest.raises(ValueError, match="each of `batch_size` = 20 streams"):
        Windows(corpus, 6, "consecutive", 20)


@pytest.mark.parametrize("order", ["shuffled", "consecutive"])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_windows_of_another_batch_size_are_refused(tmp_path, order: Order, size: int) -> None:
    corpus = _build(tmp_path, bytes(range(100)), "bytes", 0.2)
    task = TextTask(Windows(corpus, 6, order, 3))
    with pytest.raises(ValueError, match=rf"must be that of the {order} windows, 3, got {size}"):
        task.batch(size, (0, 0, 0))
    assert len(task.batch(3, (0, 0, 0)).inputs) == 3
    assert len(TextTask(Windows(corpus, 6)).batch(size, (0, 0, 0)).inputs) == size


@pytest.mark.parametrize(("context", "count", "limit"), [(7, 3, 0), (50, 64, 0), (7, 3, 23)])
def test_streams_hold_every_target_once(tmp_path, context, count, limit) -> None:
    corpus = _build(tmp_path, bytes(range(200)), "bytes", 0.5)
    batches = list(corpus.streams(context, count, limit))
    assert all(batch.inputs.shape == (count, context) for batch in batches)
    inputs, targets, mask = (
        torch.cat([getattr(batch, name) for batch in batches], dim=1)
        for name in ("inputs", "targets", "mask")
    )
    # row by row, each stream without a gap, and the streams behind each other
    wanted = torch.arange(100, 100 + (limit or 99))
    assert inputs[mask].equal(wanted)
    assert targets[mask].equal(wanted + 1)


def test_streams_are_evaluated_as_they_are_read(tmp_path) -> None:
    corpus = _build(tmp_path, bytes(range(200)), "bytes", 0.5)
    torch.manual_seed(0)
    model = LanguageModel(ModelConfig(vocab_size=256, width=8, num_layers=1)).double()
    # one stream in windows of 7 is one window of all
    [whole] = corpus.windows(99, 1)
    wanted = evaluate(model, next_symbol, [whole])
    found = evaluate(model, next_symbol, corpus.streams(7, 1), streams=True)
    assert found == pytest.approx(wanted, rel=1e-12)
    task = TextTask(Windows(corpus, 7, "consecutive", 4))
    assert task.validates_streams
    assert evaluate(model, next_symbol, task.validation(4), streams=True) != found
    # without its state, each window begins anew
    assert evaluate(model, next_symbol, corpus.streams(7, 1)) != pytest.approx(wanted, rel=1e-9)


@pytest.mark.parametrize(("context", "batch_size", "limit"), [(7, 3, 0), (50, 64, 0), (7, 3, 23)])
def test_windows_hold_every_target_once(tmp_path, context, batch_size, limit) -> None:
    corpus = _build(tmp_path, bytes(range(100)), "bytes", 0.5)
    batches = list(corpus.windows(context, batch_size, limit))
    targets = [b.targets[b.mask] for b in batches]
    inputs = [b.inputs[b.mask] for b in batches]
    last = 50 + (limit or 49)
    assert [t for x in targets for t in x.tolist()] == list(range(51, last + 1))
    assert [t for x in inputs for t in x.tolist()] == list(range(50, last))
    assert all(len(b.inputs) <= batch_size for b in batches)


def test_unknown_characters_are_named() -> None:
    known = Characters("abc")
    with pytest.raises(
        ValueError, match=r"character 'é' \(U\+00E9\) at place 2 is not among the 3"
    ):
        known.encode("abé")
    with pytest.raises(ValueError, match="each character once, got 'aa'"):
        Characters("aa")
    with pytest.raises(ValueError, match="must be of kind 'characters', 'bytes' or 'bpe'"):
        tokenizers.from_json({"kind": "words"})


def test_bytes_stream_whole_characters_only() -> None:
    assert list(Bytes().stream("é!".encode())) == ["", "é", "!", ""]
    assert "".join(Bytes().stream(b"a\xff")) == "a�"


def test_plays_are_clean() -> None:
    plays = shakespeare.plays()
    assert plays.count("ACT I\n") >= 37
    assert not set("*_#\\") & set(plays)
    assert "BERNARDO:\nWho's there?\n\nFRANCISCO:\nNay, answer me" in plays
    # paragraphs whose underscores have no partner
    assert "HERMIA:\n[Awaking]\nHelp me, Lysander" in plays
    assert "PAGE:\n[Within]\nWho's there?" in plays
    assert "[Enter Ghost]\n\nMARCELLUS:\nPeace, break thee off" in plays


def test_tiny_shakespeare_is_checked(tmp_path) -> None:
    wrong = tmp_path / "wrong.txt"
    wrong.write_text("not to be")
    with pytest.raises(ValueError, match=r"is not tiny Shakespeare: its sha256 must be 86c4e6aa"):
        shakespeare.tiny_shakespeare(wrong)
    with pytest.raises(FileNotFoundError, match=r"`path` must name a file, .*none does not exist"):
        shakespeare.tiny_shakespeare(tmp_path / "none")


def test_split_has_the_numbers_of_the_papers(tmp_path) -> None:
    corpus = _build(tmp_path, b"a" * 1_115_394)
    assert corpus.num_train == 1_003_854
    assert corpus.num_tokens - corpus.num_train == 111_540


def test_tiny_shakespeare_is_read_as_in_the_papers(tmp_path) -> None:
    if not SHARED.is_file():
        pytest.skip(f"needs tiny Shakespeare itself at {SHARED}")
    assert len(shakespeare.tiny_shakespeare(SHARED)) == 1_115_394
    corpus = text.build(SHARED, tmp_path / "corpus", "characters", 0.1)
    assert (corpus.num_train, corpus.num_tokens) == (1_003_854, 1_115_394)
    assert corpus.tokenizer.vocab_size == 65
