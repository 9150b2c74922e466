"""Our tokenizers as fast ones: the same ids for every text, and a run's by `AutoTokenizer`."""

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

import minrnn
from minrnn import Bytes, Characters, LanguageModel, ModelConfig
from minrnn.data.bpe import learn
from minrnn.data.tokenizers import Tokenizer
from minrnn.hf import MinRNNTokenizer

MIXED = "a,é—漢🎭\r\n\tz<pad> [UNK]'s  b\x00\xa0\u2028 End.\n\n"
KINDS: dict[str, Tokenizer] = {
    "characters": Characters("".join(dict.fromkeys(MIXED))),
    "bytes": Bytes(),
    "bpe": learn([MIXED * 9], 290),
}


@pytest.fixture(params=KINDS)
def ours(request: pytest.FixtureRequest) -> Tokenizer:
    return KINDS[request.param]


def _saved(folder: Path, tokenizer: Tokenizer | None) -> Path:
    size = 5 if tokenizer is None else tokenizer.vocab_size
    minrnn.save(folder, LanguageModel(ModelConfig(size, width=8, num_layers=1)), tokenizer)
    return folder


def _texts() -> list[str]:
    texts = [MIXED, MIXED[::-1], MIXED * 30, "<pad>", "<pad>a<pad>", " ", "\n\n", "  a", "a ", ""]
    return texts + [MIXED[n:] + MIXED[:n] for n in range(len(MIXED))] + list(MIXED)


def test_ids_and_texts_are_ours(ours: Tokenizer) -> None:
    fast = MinRNNTokenizer(ours)
    assert fast.is_fast
    assert fast.vocab_size == fast.pad_token_id == ours.vocab_size
    for text in _texts():
        ids = ours.encode(text).tolist()
        assert fast(text)["input_ids"] == ids
        assert fast.decode(ids) == fast.decode(ids, skip_special_tokens=True) == text
    assert fast(_texts())["input_ids"] == [ours.encode(text).tolist() for text in _texts()]


def test_bytes_that_are_no_text_are_replaced_alike() -> None:
    for ids in ([0xFF, 97, 0xE6], [0xE6, 0xBC, 0x41], [0xF0, 0x9F, 0x8E], [0xED, 0xA0, 0x80]):
        assert MinRNNTokenizer(Bytes()).decode(ids) == Bytes().decode(ids)


def test_padding_is_on_the_left_and_masked(ours: Tokenizer) -> None:
    fast = MinRNNTokenizer(ours)
    batch = fast(["a,", "z"], padding=True, return_tensors="pt")
    assert batch["input_ids"].tolist()[1] == [fast.pad_token_id, ours.encode("z")[0]]
    assert batch["attention_mask"].tolist() == [[1, 1], [0, 1]]
    assert fast.batch_decode(batch["input_ids"], skip_special_tokens=True) == ["a,", "z"]


def test_a_run_opens(ours: Tokenizer, tmp_path) -> None:
    opened = AutoTokenizer.from_pretrained(_saved(tmp_path / "run", ours))
    assert type(opened) is MinRNNTokenizer
    opened.save_pretrained(tmp_path / "saved")
    again = MinRNNTokenizer.from_pretrained(tmp_path / "saved")
    for text in _texts():
        ids = ours.encode(text).tolist()
        assert opened(text)["input_ids"] == again(text)["input_ids"] == ids
        assert opened.decode(ids) == again.decode(ids) == text
    assert again.padding_side == "left"
    assert again.pad_token_id == ours.vocab_size
    assert len(again) == ours.vocab_size + 1


def test_files_beside_a_run_change_nothing(ours: Tokenizer, tmp_path) -> None:
    folder = _saved(tmp_path, ours)
    AutoTokenizer.from_pretrained(folder).save_pretrained(folder)
    assert AutoTokenizer.from_pretrained(folder)(MIXED)["input_ids"] == ours.encode(MIXED).tolist()
    assert minrnn.load(folder).tokenizer.to_json() == ours.to_json()


def test_unknown_characters_and_missing_tokenizers_are_named(tmp_path) -> None:
    fast = MinRNNTokenizer(Characters("abc"))
    for text in ("abé", ["a", "bé"]):
        with pytest.raises(ValueError, match=r"character 'é' \(U\+00E9\) is not among the 3 "):
            fast(text)
    with pytest.raises(ValueError, match="`tokenizer` must be given: no run has none"):
        MinRNNTokenizer()
    with pytest.raises(ValueError, match=r"`tokenizer` must be given: .*config\.json has none"):
        MinRNNTokenizer.from_pretrained(_saved(tmp_path, None))
    config = json.loads((tmp_path / "config.json").read_text())
    config["tokenizer"] = {"kind": "words"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="must be of kind 'characters', 'bytes' or 'bpe'"):
        MinRNNTokenizer.from_pretrained(tmp_path)


def test_added_tokens_are_read_and_padding_is_not(ours: Tokenizer, tmp_path) -> None:
    fast = MinRNNTokenizer(ours, eos_token="<eos>")
    fast.add_special_tokens({"additional_special_tokens": ["<tool>"]})
    fast.add_tokens(["word"])
    size = ours.vocab_size
    # padding has the first id, whatever else is added
    assert (fast.pad_token_id, fast.eos_token_id, len(fast)) == (size, size + 1, size + 4)
    assert fast("<eos>word<tool>")["input_ids"] == [size + 1, size + 3, size + 2]
    parts = [ours.encode(text).tolist() for text in ("<pad>", MIXED)]
    expected = [*parts[0], size + 1, *parts[1], size + 2]
    text = f"<pad><eos>{MIXED}<tool>"
    fast.save_pretrained(tmp_path)
    for each in (fast, MinRNNTokenizer.from_pretrained(tmp_path)):
        assert each(text)["input_ids"] == expected
        assert each.tokenize(text) == each.convert_ids_to_tokens(expected)
        assert each.decode(expected) == text
        assert each.decode(expected, skip_special_tokens=True) == f"<pad>{MIXED}"
        batch = each([text, "<eos>"], padding=True)["input_ids"]
        assert batch == [expected, [size] * (len(expected) - 1) + [size + 1]]
        assert each(MIXED)["input_ids"] == parts[1]


def test_special_tokens_may_be_read_as_text(ours: Tokenizer) -> None:
    fast = MinRNNTokenizer(ours, eos_token="z<p")
    ids = ours.encode(MIXED).tolist()
    assert fast(MIXED, split_special_tokens=True)["input_ids"] == ids
    assert fast(MIXED)["input_ids"] != ids
    # as many do who have no token for padding
    fast.pad_token = fast.eos_token
    assert fast("z<pad>")["input_ids"] == [ours.vocab_size + 1, *ours.encode("ad>").tolist()]
    both = MinRNNTokenizer(ours, eos_token="<eos>", pad_token="<eos>")
    assert both("<eos>")["input_ids"] == [both.pad_token_id] == [ours.vocab_size]


def test_an_unknown_character_beside_an_added_token_is_named() -> None:
    fast = MinRNNTokenizer(Characters("abc"), eos_token="<eos>")
    assert fast("a<eos>")["input_ids"] == [0, 4]
    with pytest.raises(ValueError, match=r"character 'é' \(U\+00E9\) is not among the 3 "):
        fast("<eos>é")
    with pytest.raises(ValueError, match=r"character '<' \(U\+003C\) is not among the 3 "):
        fast("a<eos>", split_special_tokens=True)
    with pytest.raises(ValueError, match=r"character '<' \(U\+003C\) is not among the 3 "):
        fast("a<pad>")
