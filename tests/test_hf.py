"""transformers over our models: the same tokens, states and files."""

import json
from typing import get_args

import pytest
import torch
from hf_models import (
    FAST,
    GROWING,
    LETTERS,
    PROMPTS,
    for_transformers,
    language_model,
    opened,
    same,
)
from training import trained, write_text
from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer

import minrnn
from minrnn import Batch, LanguageModel, ModelConfig, Sampling, checkpoint, losses
from minrnn.hf import MinRNNConfig, MinRNNForCausalLM
from minrnn.models import MixerName

MIXERS = get_args(MixerName)
# of double precision: sums of other shapes may be taken in another order
CLOSE = {"rtol": 1e-9, "atol": 1e-10}


def _greedy(model: LanguageModel, prompt: str, length: int = 16) -> str:
    pieces = minrnn.generate(model, LETTERS, prompt, length=length, sampling=Sampling(0))
    return prompt + "".join(pieces)


@pytest.mark.parametrize("mixer", MIXERS)
def test_greedy_tokens_are_ours_padded_or_not(mixer: str, tmp_path) -> None:
    ours = language_model(mixer)
    theirs = opened(tmp_path, ours).double()
    ours.double()
    assert type(theirs) is MinRNNForCausalLM
    expected = [_greedy(ours, prompt) for prompt in PROMPTS]
    one = theirs.generate(**FAST(PROMPTS[0], return_tensors="pt"), max_new_tokens=16)
    assert FAST.decode(one[0]) == expected[0]
    batch = FAST(PROMPTS, padding=True, return_tensors="pt")
    for options in ({}, {"use_cache": False}):
        ids = theirs.generate(**batch, max_new_tokens=16, **options)
        assert FAST.batch_decode(ids, skip_special_tokens=True) == expected
    drawn = {text.removeprefix(prompt) for text, prompt in zip(expected, PROMPTS, strict=True)}
    assert len(drawn) > 1


@pytest.mark.parametrize("mixer", MIXERS)
def test_each_step_of_a_padded_batch_predicts_what_ours_does_alone(mixer: str) -> None:
    ours = language_model(mixer).double()
    theirs = for_transformers(ours).double()
    batch = FAST(PROMPTS, padding=True, return_tensors="pt")
    options = {"max_new_tokens": 16, "do_sample": True, "temperature": 9.0, "output_logits": True}
    found = theirs.generate(**batch, **options, return_dict_in_generate=True)
    # (4, 16, 10), which `generate` turns to float32
    logits = torch.stack(found.logits, dim=1)
    assert found.sequences[:, 11:].unique().numel() > 5
    for row, prompt in enumerate(PROMPTS):
        ids = found.sequences[row, -len(prompt) - 16 :]
        alone = ours(ids[None])[0][0, -17:-1]
        torch.testing.assert_close(logits[row], alone.float(), rtol=1e-6, atol=1e-6)
    # with padding as a symbol it would be something else
    wrong = ours(found.sequences[1:2].masked_fill(found.sequences[1:2] == 10, 0))[0][0, 10]
    assert (logits[1, 0] - wrong).abs().max() > 0.1


@pytest.mark.parametrize("mixer", MIXERS)
def test_padding_on_either_side_is_never_read(mixer: str) -> None:
    model = for_transformers(language_model(mixer)).double()
    rows = [torch.randint(10, (n,)) for n in (7, 3, 7, 1, 5)]
    starts = [0, 4, 0, 6, 1]
    ids, mask = torch.full((5, 7), 10), torch.zeros(5, 7, dtype=torch.long)
    for number, (row, start) in enumerate(zip(rows, starts, strict=True)):
        ids[number, start : start + len(row)] = row
        mask[number, start : start + len(row)] = 1
    noise = torch.where(mask.bool(), ids, torch.randint(10, (5, 7)))
    for use_cache in (True, False):
        padded = model(ids, mask, use_cache=use_cache)
        read = mask.bool()
        other = model(noise, mask, use_cache=use_cache).logits
        torch.testing.assert_close(padded.logits[read], other[read], **CLOSE)
        for number, (row, start) in enumerate(zip(rows, starts, strict=True)):
            alone = model(row[None], use_cache=True)
            mine = padded.logits[number, start : start + len(row)]
            torch.testing.assert_close(mine, alone.logits[0], **CLOSE)
            if use_cache:
                state = padded.past_key_values.select([number]).state.flatten()
                for name, x in alone.past_key_values.state.flatten().items():
                    torch.testing.assert_close(state[name], x, **CLOSE)


@pytest.mark.parametrize("mixer", ["mingru", "minlstm", "mamba", *GROWING])
def test_beams_go_on_from_the_states_that_they_come_from(mixer: str, monkeypatch) -> None:
    model = for_transformers(language_model(mixer)).double()
    batch = FAST(PROMPTS, padding=True, return_tensors="pt")
    orders = []
    reorder = MinRNNForCausalLM._reorder_cache
    monkeypatch.setattr(
        model, "_reorder_cache", lambda past, rows: orders.append(rows) or reorder(past, rows)
    )
    options = {"max_new_tokens": 12, "num_beams": 3, "return_dict_in_generate": True}
    found = model.generate(**batch, **options, output_scores=True)
    assert any(not rows.equal(torch.arange(12)) for rows in orders)
    # each step reads everything again, and no state is handed on
    again = model.generate(**batch, **options, output_scores=True, use_cache=False)
    assert found.sequences.equal(again.sequences)
    torch.testing.assert_close(found.sequences_scores, again.sequences_scores)
    one = model.generate(**batch, max_new_tokens=12, num_beams=1)
    assert one.equal(model.generate(**batch, max_new_tokens=12, do_sample=False))
    assert not one.equal(found.sequences)


def test_a_seed_fixes_what_is_sampled() -> None:
    model = for_transformers(language_model())
    batch = FAST(PROMPTS, padding=True, return_tensors="pt")

    def drawn(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return model.generate(**batch, max_new_tokens=20, do_sample=True, top_k=5, top_p=0.9)

    assert drawn(0).equal(drawn(0))
    assert not drawn(0).equal(drawn(1))
    several = model.generate(**batch, max_new_tokens=3, do_sample=True, num_return_sequences=2)
    assert several.shape == (8, 14)


def test_a_streamer_gets_the_text(capsys) -> None:
    model = for_transformers(language_model())
    ids = FAST("abc def", return_tensors="pt")
    out = model.generate(**ids, max_new_tokens=30, streamer=TextStreamer(FAST))
    assert capsys.readouterr().out == FAST.decode(out[0]) + "\n"


@pytest.mark.parametrize("mixer", MIXERS)
def test_folders_open_both_ways_bit_for_bit(mixer: str, tmp_path) -> None:
    ours = language_model(mixer)
    theirs = opened(tmp_path / "ours", ours)
    assert same(ours.state_dict(), theirs.state_dict())
    theirs.save_pretrained(tmp_path / "theirs")
    model, tokenizer = minrnn.load(tmp_path / "theirs")
    assert model.config == ours.config
    assert tokenizer.to_json() == LETTERS.to_json()
    assert same(ours.state_dict(), model.state_dict())
    ids = torch.randint(10, (2, 9))
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "theirs")
    assert same(again.state_dict(), model.state_dict())
    torch.testing.assert_close(again.double()(ids).logits, model.double()(ids)[0], **CLOSE)
    assert again.config.to_diff_dict() == theirs.config.to_diff_dict()


def test_a_new_model_starts_as_ours_does(tmp_path) -> None:
    torch.manual_seed(3)
    ours = LanguageModel(ModelConfig(10, width=16, longest_memory=100))
    torch.manual_seed(3)
    config = MinRNNConfig(vocab_size=10, width=16, longest_memory=100)
    theirs = AutoModelForCausalLM.from_config(config)
    assert same(ours.state_dict(), theirs.state_dict())
    theirs.half().save_pretrained(tmp_path)
    assert minrnn.load(tmp_path).model.head.weight.dtype == torch.float16
    opened = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert opened.dtype == torch.float16
    assert same(theirs.state_dict(), opened.state_dict())


def test_trainings_open_and_are_never_written_to(tmp_path) -> None:
    run = trained(write_text(tmp_path / "text.txt"), tmp_path / "run")
    config = json.loads((run / "config.json").read_text())
    assert (config["model_type"], config["format"]) == ("minrnn", checkpoint.FORMAT)
    ours, tokenizer = minrnn.load(run)
    theirs, fast = (auto.from_pretrained(run) for auto in (AutoModelForCausalLM, AutoTokenizer))
    prompt = "7 and 7 are "
    sampling = Sampling(0)
    text = "".join(minrnn.generate(ours, tokenizer, prompt, length=20, sampling=sampling))
    ids = theirs.generate(**fast(prompt, return_tensors="pt"), max_new_tokens=20)
    assert fast.decode(ids[0]) == prompt + text
    with pytest.raises(ValueError, match=r"`folder` must not hold a training, .*run does"):
        theirs.save_pretrained(run)
    theirs.save_pretrained(tmp_path / "saved")
    assert not {"text", "split"} & set(checkpoint.read_config(tmp_path / "saved"))
    assert same(minrnn.load(tmp_path / "saved").model.state_dict(), ours.state_dict())


def test_older_runs_open(tmp_path) -> None:
    ours = language_model()
    minrnn.save(tmp_path, ours)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["model_type"], config["architectures"], config["model"]["longest_memory"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    theirs = MinRNNForCausalLM.from_pretrained(tmp_path)
    assert same(ours.state_dict(), theirs.state_dict())
    assert theirs.generation_config.pad_token_id == 10


def test_weights_can_be_tied(tmp_path) -> None:
    config = MinRNNConfig(vocab_size=10, width=16, tie_word_embeddings=True)
    model = MinRNNForCausalLM(config)
    assert model.head.weight is model.embedding.weight
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.head.weight is again.embedding.weight
    assert same(again.state_dict(), model.state_dict())
    assert same(minrnn.load(tmp_path).model.state_dict(), model.state_dict())
    ids = torch.randint(10, (2, 9))
    ours = minrnn.load(tmp_path).model.double()(ids)[0]
    torch.testing.assert_close(again.double()(ids).logits, ours, **CLOSE)
    again.resize_token_embeddings(12, mean_resizing=False)
    assert again.head.weight is again.embedding.weight
    assert again(ids).logits.shape == (2, 9, 12)


@pytest.mark.parametrize("mean", [True, False])
def test_symbols_can_be_added(mean: bool, tmp_path) -> None:
    model = opened(tmp_path / "ours", language_model()).double()
    ids = torch.randint(10, (2, 9))
    before = model(ids).logits
    model.resize_token_embeddings(13, mean_resizing=mean)
    assert (model.config.vocab_size, model.config.model["vocab_size"]) == (13, 13)
    logits = model(torch.cat([ids, torch.full((2, 1), 12)], dim=1)).logits
    torch.testing.assert_close(logits[:, :9, :10], before, **CLOSE)
    if not mean:
        assert model.embedding.weight[10:].abs().max() < 0.2
    model.save_pretrained(tmp_path / "more")
    loaded = minrnn.load(tmp_path / "more")
    assert loaded.model.config.vocab_size == 13
    # it has symbols that the old tokenizer has not
    assert loaded.tokenizer is None


def test_checkpointing_gives_the_same_gradients(monkeypatch) -> None:
    model = for_transformers(language_model(dropout=0.1)).double().train()
    ids = FAST(PROMPTS, padding=True, return_tensors="pt")
    labels = ids["input_ids"].masked_fill(ids["attention_mask"] == 0, -100)
    calls = []
    forward = type(model.blocks[0]).forward
    monkeypatch.setattr(
        type(model.blocks[0]), "forward", lambda *args: calls.append(1) or forward(*args)
    )

    def gradients() -> tuple[dict[str, torch.Tensor], int]:
        model.zero_grad()
        calls.clear()
        torch.manual_seed(5)
        model(**ids, labels=labels).loss.backward()
        return {name: x.grad.clone() for name, x in model.named_parameters()}, len(calls)

    plain, once = gradients()
    model.activation_checkpointing_enable()
    spared, twice = gradients()
    assert (once, twice) == (2, 4)
    for name, x in plain.items():
        torch.testing.assert_close(spared[name], x, **CLOSE)
    assert model(**ids, use_cache=True).past_key_values is None


def test_labels_give_our_loss_and_logits_can_be_left_out() -> None:
    model = for_transformers(language_model()).double()
    ids = torch.randint(10, (3, 8))
    given = model(ids, labels=ids)
    batch = Batch(ids[:, :-1], ids[:, 1:], torch.ones(3, 7, dtype=torch.bool))
    expected = losses.next_symbol(model(batch.inputs).logits, batch)
    # transformers computes the loss in single precision
    torch.testing.assert_close(given.loss.double(), expected, rtol=1e-6, atol=0.0)
    assert given.past_key_values is None
    last = model(ids, logits_to_keep=2).logits
    torch.testing.assert_close(last, given.logits[:, -2:], **CLOSE)
    some = model(ids, logits_to_keep=torch.tensor([1, 6])).logits
    torch.testing.assert_close(some, given.logits[:, [1, 6]], **CLOSE)
    embedded = model(inputs_embeds=model.embedding(ids))
    torch.testing.assert_close(embedded.logits, given.logits, **CLOSE)
