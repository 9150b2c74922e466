"""Which files are read as text, and which are named because they are none."""

import gzip
import os
from pathlib import Path

import numpy as np
import pytest

from minrnn import checkpoint
from minrnn.data import text
from minrnn.data.text_files import of
from minrnn.models import LanguageModel, ModelConfig

BOM = b"\xef\xbb\xbf"


def _ids(corpus: text.Corpus) -> np.ndarray:
    return np.concatenate([corpus.tokens("train")[:], corpus.tokens("valid")[:]])


def _corpus(folder: Path) -> Path:
    """A corpus whose ids would pass for UTF-8."""
    source = folder.with_name("source.txt")
    source.write_text("abc" * 20)
    text.build(source, folder, "characters", 0.1)
    return folder


def _run(folder: Path) -> Path:
    checkpoint.save(folder, LanguageModel(ModelConfig(vocab_size=5, width=8, num_layers=1)))
    return folder


def _file(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


NO_TEXT = {
    "corpus": (_corpus, "is a corpus"),
    "ids": (lambda x: next(_corpus(x).glob("*.bin")), "which a command wrote"),
    "listing": (lambda x: _corpus(x) / "corpus.json", "which a command wrote"),
    "run": (_run, "is a run folder"),
    "settings": (lambda x: _run(x) / "config.json", "which a command wrote"),
    "weights": (lambda x: _run(x) / "model.safetensors", "is a safetensors file"),
    "picture": (lambda x: _file(x, b"\x89PNG\r\n\x1a\nabc"), "is a PNG image"),
    "archive": (lambda x: _file(x, gzip.compress(b"abc" * 9)), "is compressed by gzip"),
}


@pytest.mark.parametrize("kind", NO_TEXT)
@pytest.mark.parametrize("tokenizer", ["characters", "bytes"])
def test_what_is_no_text_is_named(tmp_path, kind: str, tokenizer: str) -> None:
    make, said = NO_TEXT[kind]
    (tmp_path / "texts").mkdir()
    path = make(tmp_path / "texts" / "made")
    out = tmp_path / "out"
    with pytest.raises(ValueError, match=rf"`data` must hold text, .*{path.name}.* {said}"):
        text.build(path, out, tokenizer, 0.1)
    # and in a folder among texts
    _file(tmp_path / "texts" / "a.txt", b"text")
    with pytest.raises(ValueError, match=r"`data` must hold text, .*texts/made"):
        text.build(tmp_path / "texts", out, tokenizer, 0.1)
    assert not out.exists()


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16", "utf-32-be"])
def test_other_encodings_are_named_and_read_as_bytes(tmp_path, encoding: str) -> None:
    path = _file(tmp_path / "text.txt", ("to be or not to be\n" * 50).encode(encoding))
    for kind in ("characters", "bpe:300"):
        with pytest.raises(ValueError, match=r"`data` must be UTF-8, .*text\.txt has .*'bytes'"):
            text.build(path, tmp_path / "out", kind, 0.1)
    assert _ids(text.build(path, tmp_path / "out", "bytes", 0.1)).tobytes() == path.read_bytes()


@pytest.mark.parametrize("kind", ["characters", "bytes", "bpe:300"])
def test_a_byte_order_mark_is_left_out(tmp_path, kind: str) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    for number, content in enumerate((BOM + b"first\r\n", b"\0second\n", BOM, BOM + b"third")):
        _file(folder / f"{number}.txt", content)
    corpus = text.build(folder, tmp_path / "corpus", kind, 0.1)
    assert corpus.tokenizer.decode(_ids(corpus).tolist()) == "first\r\n\0second\nthird\n"
    with pytest.raises(ValueError, match=r"`data` must hold text, .*2\.txt is empty"):
        text.build(folder / "2.txt", tmp_path / "none", kind, 0.1)
    one = text.build(_file(tmp_path / "one", BOM + b"x"), tmp_path / "short", kind, 0.5)
    assert (one.num_tokens, one.num_train) == (1, 0)


def test_links_are_followed_and_those_that_cannot_be_are_named(tmp_path) -> None:
    inner = tmp_path / "elsewhere"
    inner.mkdir()
    (tmp_path / "texts").mkdir()
    _file(inner / "b.txt", b"b")
    _file(tmp_path / "texts" / "c.txt", b"c")
    (tmp_path / "texts" / "a").symlink_to(inner)
    (tmp_path / "texts" / "d.txt").symlink_to(inner / "b.txt")
    names = [str(path.relative_to(tmp_path / "texts")) for path in of(tmp_path / "texts")]
    assert names == ["a/b.txt", "c.txt", "d.txt"]
    for target, said in ((tmp_path / "none", "nothing"), (tmp_path, "a folder around it")):
        link = tmp_path / "texts" / "link"
        link.symlink_to(target)
        with pytest.raises(ValueError, match=rf"texts/link is a link to {said}"):
            of(tmp_path / "texts")
        link.unlink()
    os.mkfifo(tmp_path / "texts" / "pipe")
    with pytest.raises(ValueError, match="texts/pipe is not a file"):
        of(tmp_path / "texts")
    with pytest.raises(FileNotFoundError, match="pipe is neither"):
        of(tmp_path / "texts" / "pipe")


def test_a_configuration_of_others_is_text(tmp_path) -> None:
    for name in ("config.json", "metrics.jsonl", "tokens.bin"):
        path = _file(tmp_path / name, b'{"format": "other"}')
        assert of(path) == [path]
    assert len(of(tmp_path)) == 3
