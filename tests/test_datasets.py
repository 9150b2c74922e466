"""Texts of Hugging Face datasets: local ones, since nothing is downloaded in tests."""

import json
import re
from pathlib import Path

import datasets
import pytest

from minrnn import cli
from minrnn.data import sources, text, tokenizers
from minrnn.runs.corpora import CorpusConfig, build

ROWS = [f"Row {n} is {n * n}." + "\n" * (n % 2) for n in range(2500)]
WHOLE = "".join(row if row.endswith("\n") else row + "\n" for row in ROWS)


@pytest.fixture
def saved(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    made = datasets.DatasetDict({"train": datasets.Dataset.from_dict({"text": ROWS, "n": ROWS})})
    made.save_to_disk(tmp_path / "saved")
    return tmp_path / "saved"


def _text(corpus: text.Corpus) -> str:
    ids = [*corpus.tokens("train")[:].tolist(), *corpus.tokens("valid")[:].tolist()]
    return corpus.tokenizer.decode(ids)


def test_rows_become_lines_in_units(saved, tmp_path) -> None:
    units = sources.of_dataset(str(saved), "train", "text", rows=1200)
    assert [unit.size for unit in units] == [1200, 1200, 100]
    told: list[tuple[int, int]] = []
    corpus = text.build(
        units, tmp_path / "corpus", "characters", 0.1, lambda *done: told.append(done)
    )
    assert _text(corpus) == WHOLE
    assert len(corpus.shards) == 3
    # read for its characters, and for the ids
    assert told[-1] == (5000, 5000)
    both = text.build(units, tmp_path / "both", "characters", 0.1, processes=2)
    assert both.shards == corpus.shards


def test_byte_pairs_are_learnt_from_the_first_rows(saved, tmp_path) -> None:
    corpus = build(tmp_path / "corpus", CorpusConfig(dataset=str(saved), tokenizer="bpe:300"))
    assert corpus.tokenizer.vocab_size == 300
    assert _text(corpus) == WHOLE


def test_the_command_reads_data_files(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "files").mkdir()
    lines = (json.dumps({"body": row}) for row in ROWS[:50])
    (tmp_path / "files" / "a.jsonl").write_text("\n".join(lines))
    command = ["data", "text", str(tmp_path / "corpus"), "--dataset", str(tmp_path / "files")]
    assert cli.main([*command, "--column", "body", "--tokenizer", "bytes"]) == 0
    assert _text(text.load(tmp_path / "corpus")).startswith("Row 0 is 0.\nRow 1 is 1.\n")
    assert cli.main([*command, "--column", "text"]) == 2
    assert "`column` must be one of body, got 'text'" in capsys.readouterr().err


def test_what_is_not_there_is_named(saved, tmp_path, monkeypatch) -> None:
    with pytest.raises(ValueError, match="`split` must be one of train, got 'test'"):
        build(tmp_path / "out", CorpusConfig(dataset=str(saved), split="test"))
    with pytest.raises(ValueError, match="`column` must be one of text, n, got 'body'"):
        build(tmp_path / "out", CorpusConfig(dataset=str(saved), column="body"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConnectionError, match="Couldn't reach 'nobody/nothing-of-this-name'"):
        build(tmp_path / "out", CorpusConfig(dataset="nobody/nothing-of-this-name"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (['{"text": "a"}', '{"text": null}'], r"'text' of .* has null in row 1"),
        (['{"text": 5}'], r"'text' of .* has int in row 0"),
        (['{"text": ["a"]}'], r"'text' of .* has list in row 0"),
        (
            ['{"text": "a"}', '{"text": "a \\ud800 b"}'],
            "surrogate pair in string is invalid.*row 1",
        ),
        (['{"text": "a"}', '{"text": '], r"`dataset` must hold rows, .* cannot be read: .* row 1"),
    ],
)
def test_rows_that_are_no_texts_are_named(lines, said: str, tmp_path, monkeypatch, capfd) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "a.jsonl").write_text("\n".join(lines))
    command = ["data", "text", str(tmp_path / "corpus"), "--dataset", str(tmp_path / "files")]
    assert cli.main([*command, "--tokenizer", "bytes"]) == 2
    last = capfd.readouterr().err.splitlines()[-1]
    assert last.startswith("minrnn data text: ")
    assert re.search(said, last)


def test_an_unknown_character_is_named_by_its_row(saved, tmp_path) -> None:
    (tmp_path / "known").write_text("Row 0123456789is.\n")
    known = text.build(tmp_path / "known", tmp_path / "known.c", "characters", 0.1).tokenizer
    units = sources.of_dataset(str(saved), "train", "text", rows=1200)
    with pytest.raises(ValueError, match=r"row 0, character 3: character ' ' .* is not among"):
        text.build(units, tmp_path / "c", tokenizers.Characters("Row"), 0.1)
    digits = tokenizers.Characters(known.vocabulary.replace("9", ""))
    with pytest.raises(
        ValueError, match=r"saved, split 'train', row 3, character 9: character '9'"
    ):
        text.build(units, tmp_path / "c", digits, 0.1)
