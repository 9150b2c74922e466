"""Byte pair encoding: any text comes back, however it is cut, and the command trains on it."""

import codecs
import json
import os
import signal
import sys
import threading
import time
from itertools import repeat
from pathlib import Path

import numpy as np
import pytest
from training import python

import minrnn
from minrnn import cli
from minrnn.data import bpe, sources, text, tokenizers, words
from minrnn.data.bpe import BPE
from minrnn.stream import Sampling, generate

WORDS = (
    "the cat and the hat, that other thing; né 漢字 🎭 the end.\r\n\n\n\tthen\x00 there  is <pad>\n"
)


@pytest.fixture(scope="module")
def learnt() -> BPE:
    """Symbols of a small text."""
    return bpe.learn([WORDS * 20], 290)


def _corpus(tmp_path: Path, content: str, kind: str = "bpe:300", valid: float = 0.1):
    source = tmp_path / "text.txt"
    source.write_bytes(content.encode())
    return text.build(source, tmp_path / "corpus", kind, valid)


def _ids(corpus: text.Corpus) -> list[int]:
    return np.concatenate([corpus.tokens("train")[:], corpus.tokens("valid")[:]]).tolist()


def test_merges_by_hand() -> None:
    made = BPE(["t h", "th e", "Ġ the"])
    # inside words only, and a space belongs to the word behind it
    assert made.encode("the then bathe").tolist() == [257, 258, 110, 32, 98, 97, 257]
    assert made.byte_lengths.tolist() == [1] * 256 + [2, 3, 4]


def test_any_text_comes_back(learnt: BPE) -> None:
    unseen = "".join(map(chr, [*range(0x250), 0x2028, 0x3000, 0xFFFD, 0x10FFFF])) + " zzz 'll\xa0x"
    for content in (WORDS, unseen, "", "t", "🎭" * 9, " " * 50 + "\n", unseen[::-1]):
        ids = learnt.encode(content)
        assert ids.dtype == np.int64
        assert learnt.decode(ids.tolist()) == content
        assert "".join(learnt.stream(ids.tolist())) == content
        assert learnt.byte_lengths[ids].sum() == len(content.encode())
    assert len(learnt.encode(WORDS)) < 0.6 * len(WORDS.encode())


def test_streams_hold_whole_characters_only() -> None:
    made = BPE(["æ ¼", "ð Ł"])
    ids = made.encode("漢🎭!").tolist()
    assert len(ids) == 2 + 3 + 1
    assert list(made.stream(ids)) == ["", "漢", "", "", "🎭", "!", ""]
    assert "".join(made.stream([0xFF, 97, 0xE6])) == "�a�"


def test_learning_is_exact_and_limited(learnt: BPE) -> None:
    assert learnt.vocab_size == 290
    assert bpe.learn([WORDS * 20], 290).merges == learnt.merges
    # in blocks of any size, the same
    assert bpe.learn(list(WORDS * 20), 290).merges == learnt.merges
    # no pair comes twice: none is merged
    assert bpe.learn(["abcdefg"], 300).vocab_size == 256
    assert bpe.learn([], 300).vocab_size == 256


def test_how_a_text_is_cut_changes_no_id(learnt: BPE, monkeypatch) -> None:
    whole = learnt.encode(WORDS * 10).tolist()
    assert whole == learnt.fast.encode(WORDS * 10).ids
    monkeypatch.setattr(words, "PIECE", 64)
    assert learnt.encode(WORDS * 10).tolist() == whole
    blocks = [WORDS * 3, "", WORDS, *(WORDS * 6)]
    assert np.concatenate(list(learnt.encode_blocks(blocks))).tolist() == whole


LONG = {
    "letters": "漢字" * 300,
    "one letter": "t" * 500,
    "spaces": "the" + " " * 300 + "the",
    "blank lines": "the" + "\n" * 300 + "  the",
    "ends in spaces": "the" + " \t" * 200,
    "marks": "the" + "'!" * 200 + "'s the",
    "quotes": "'" * 201 + "the 're" + "'" * 200,
    "space before": "a " + "漢" * 400 + "。the",
    "digits": "12" * 200 + "٣" * 200 + "the",
    "thai": "กัน" * 200,
    "words": WORDS * 10,
}


@pytest.mark.parametrize("name", LONG)
@pytest.mark.parametrize("piece", [16, 33, 100])
def test_ids_are_those_of_the_whole_however_long_a_word(monkeypatch, name, piece: int) -> None:
    content = LONG[name]
    learnt = bpe.learn([WORDS * 20, content], 330)
    whole = learnt.fast.encode(content).ids
    monkeypatch.setattr(words, "PIECE", piece)
    for size in (1, 7, 50, len(content)):
        # a file may end in an empty block
        blocks = [content[n : n + size] for n in range(0, len(content), size)]
        blocks = [x for block in blocks for x in (block, "")]
        assert np.concatenate(list(learnt.encode_blocks(blocks))).tolist() == whole


def test_a_word_beyond_what_is_read_at_a_time_has_its_ids() -> None:
    content = "the" + "漢字字" * 40_000 + " the"
    learnt = bpe.learn(["the the 漢字字漢字 漢字字字漢"] * 50, 290)
    assert learnt.encode(content).tolist() == learnt.fast.encode(content).ids


def test_what_is_learnt_from_is_bounded(monkeypatch) -> None:
    monkeypatch.setattr(words, "_LEARNT", 3000)
    monkeypatch.setattr(words, "PIECE", 1000)
    # few different words: all of the text
    assert "".join(words.sample([WORDS * 500])) == WORDS * 500
    # all different
    content = "".join(chr(0x4E00 + n) for n in range(20_000))
    for separator in ("", "。", " "):
        text_ = separator.join(content[n : n + 9] for n in range(0, len(content), 9))
        kept = "\n".join(words.sample([text_], len(text_.encode()))).split("\n")
        found = {word.strip("。") for word in kept}
        assert 2000 < len("".join(found).encode()) <= 3000
        assert max(map(len, kept)) <= 64
        # from all of it, not from its beginning alone
        places = sorted(text_.index(word) for word in found if word.strip())
        assert places[len(places) // 2] > len(text_) // 5
        assert places[-1] > 0.8 * len(text_)


MEMORY = """
import resource
from minrnn.data import bpe, words
words._LEARNT = 1 << 17
run = "".join(chr(0x4E00 + n * n % 20011) for n in range(350_000))
lines = "\u3002".join(run[n : n + 9] for n in range(0, len(run), 9))
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
bpe.learn(["a b"], 300).encode("a b")
before = peak()
for content in (run, lines):
    learnt = bpe.learn([content], 300)
    assert sum(len(ids) for ids in learnt.encode_blocks([content])) > 1e4
print(peak() - before, len(run.encode()) / 2**20)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in other units elsewhere")
def test_memory_does_not_go_by_the_text() -> None:
    done = python(MEMORY)
    assert done.returncode == 0, done.stderr
    grown, size = map(float, done.stdout.split())
    # a hundred times the size without a bound
    assert grown < 50 * size


def test_learning_heeds_signals() -> None:
    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
    read = []
    with pytest.raises(KeyboardInterrupt):
        bpe._run(repeat("the"), lambda texts: read.extend(bool(time.sleep(0.01)) for _ in texts))
    waits = threading.Event()
    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        bpe._run([], lambda texts: bool(waits.wait(100)))
    waits.set()


@pytest.mark.parametrize("block", [1, 7, 1 << 22])
def test_a_corpus_has_the_ids_of_the_whole_text(tmp_path, monkeypatch, block: int) -> None:
    monkeypatch.setattr(sources, "_BLOCK", block)
    corpus = _corpus(tmp_path, WORDS * 20)
    assert 256 < corpus.tokenizer.vocab_size <= 300
    assert _ids(corpus) == corpus.tokenizer.encode(WORDS * 20).tolist()
    assert corpus.tokens("train").dtype == np.uint16
    assert text.load(tmp_path / "corpus").tokenizer.to_json() == corpus.tokenizer.to_json()
    first = corpus.tokenizer.byte_lengths[corpus.tokens("valid")[:1]][0]
    after = corpus.tokenizer.decode(corpus.tokens("valid")[:].tolist()).encode()
    assert corpus.num_bytes() == len(after) - first


def test_what_is_validated_on_is_not_learnt_from(tmp_path) -> None:
    train, valid = "abab " * 200, "xyxy " * 200
    corpus = _corpus(tmp_path, train + valid, valid=0.5)
    assert any(set(merge) <= set("ab ") for merge in corpus.tokenizer.merges)
    assert not any(set(merge) & set("xy") for merge in corpus.tokenizer.merges)


def test_wrong_kinds_and_merges_are_named(tmp_path) -> None:
    for kind in ("bpe:0", "bpe:x", "bpe:100", "bpe:256", "bpe", "bpe:", "bpe:-300", "bpe:३००", "w"):
        with pytest.raises(ValueError, match=rf"`tokenizer` must be 'characters', .* got '{kind}'"):
            _corpus(tmp_path, WORDS, kind)
    for merges in (["t he"], ["t h", "th"], ["a b c"], ["a  b"]):
        with pytest.raises(ValueError, match="`merges` must each join two symbols known before"):
            BPE(merges)
    with pytest.raises(ValueError, match="must be of kind 'characters', 'bytes' or 'bpe'"):
        tokenizers.from_json({"kind": "bpe", "merges": [["t", "h"]]})
    (tmp_path / "broken.txt").write_bytes(b"abc " * 150 + b"\xff")
    with pytest.raises(ValueError, match=r"has byte 0xff at offset 600 .* 'bytes' accepts it"):
        text.build(tmp_path / "broken.txt", tmp_path / "corpus", "bpe:300", 0.1)


def test_a_missing_package_is_named(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    source = tmp_path / "text.txt"
    source.write_text(WORDS)
    out = tmp_path / "run"
    args = ["train", "text", "--data", str(source), "--out", str(out), "--tokenizer", "bpe:300"]
    assert cli.main(args) == 2
    said = capsys.readouterr().err
    assert "needs the package tokenizers" in said
    assert said.endswith("pip install 'minrnn[hf]'\n")
    assert not out.exists()
    # what is read only needs no package
    assert BPE(["t h"]).decode([256, 101]) == "the"


def test_the_command_trains_on_pairs(tmp_path, capsys) -> None:
    source, out = tmp_path / "text.txt", tmp_path / "run"
    source.write_text("To be, or not to be, that is the question: 漢字.\n" * 60)
    small = ["--context", "8", "--width", "16", "--num-layers", "1", "--steps", "4"]
    small += ["--batch-size", "4", "--eval-every", "2"]
    args = ["train", "text", "--data", str(source), "--out", str(out), *small]
    assert cli.main([*args, "--tokenizer", "bpe:100"]) == 2
    assert "with V > 256 symbols, got 'bpe:100'" in capsys.readouterr().err
    assert cli.main([*args, "--tokenizer", "bpe:280"]) == 0
    capsys.readouterr()
    assert cli.main(["eval", str(out)]) == 0
    figures = json.loads(capsys.readouterr().out)
    corpus = text.load(out / "corpus")
    assert figures["symbols"] == corpus.num_tokens - corpus.num_train - 1
    bits = figures["bits"] * figures["symbols"]
    assert figures["bits_per_byte"] == pytest.approx(bits / corpus.num_bytes(), rel=1e-12)
    assert figures["bits_per_byte"] < figures["bits"]
    model, tokenizer = minrnn.load(out)
    assert model.config.vocab_size == tokenizer.vocab_size == 280
    pieces = list(generate(model, tokenizer, "To be", length=30, sampling=Sampling(seed=0)))
    assert len(pieces) == 31
    decoder = codecs.getincrementaldecoder("utf-8")()
    assert decoder.decode("".join(pieces).encode(), final=True) == "".join(pieces)
