"""Byte pair encoding: any text comes back, however it is cut, and the command trains on it."""

import codecs
import json
import sys
from pathlib import Path

import numpy as np
import pytest

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
    # nowhere to cut: still all of it
    assert learnt.decode(learnt.encode("the" * 100).tolist()) == "the" * 100


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
