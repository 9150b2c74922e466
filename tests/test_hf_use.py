"""What people do with a model in transformers: go on, train, a pipeline; and get wrong."""

import json
from pathlib import Path

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
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DataCollatorForLanguageModeling,
    DynamicCache,
    Trainer,
    TrainingArguments,
    pipeline,
)

import minrnn
from minrnn.hf import MinRNNConfig, MinRNNForCausalLM


@pytest.mark.parametrize("mixer", ["mingru", "minlstm", "lstm", "mamba", "aaren", "h3", "s4d"])
def test_memory_is_the_same_after_10_and_200_tokens(mixer: str) -> None:
    model = for_transformers(language_model(mixer))
    ids = FAST(PROMPTS, padding=True, return_tensors="pt")

    def state_bytes(steps: int) -> int:
        found = model.generate(**ids, max_new_tokens=steps, return_dict_in_generate=True)
        assert found.sequences.shape == (4, 11 + steps)
        assert len(found.past_key_values.parts) == 1
        return found.past_key_values.num_bytes

    assert state_bytes(10) == state_bytes(200) == 4 * model.blocks.init_state(1).num_bytes


@pytest.mark.parametrize("mixer", ["mingru", "mamba", *GROWING])
def test_a_text_goes_on_from_its_states(mixer: str) -> None:
    model = for_transformers(language_model(mixer)).double()
    first = FAST(PROMPTS, padding=True, return_tensors="pt")
    found = model.generate(**first, max_new_tokens=5, return_dict_in_generate=True)
    # the last symbol that was drawn is not read yet
    assert found.past_key_values.get_seq_length() == 11 + 5 - 1
    mask = torch.cat([first["attention_mask"], torch.ones(4, 5, dtype=torch.long)], dim=1)
    whole = model.generate(**first, max_new_tokens=12)
    on = model.generate(
        found.sequences,
        attention_mask=mask,
        past_key_values=found.past_key_values,
        max_new_tokens=7,
    )
    assert on.equal(whole)


@pytest.mark.parametrize("mixer", ["minlstm", *GROWING])
def test_rows_are_padded_anew_in_each_piece(mixer: str) -> None:
    model = for_transformers(language_model(mixer)).double()
    first, second = torch.randint(10, (3, 4)), torch.randint(10, (3, 5))
    masks = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1], [0, 0, 0, 0]])
    more = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 0, 1, 1], [0, 1, 0, 1, 0]])
    cache = model(first, masks).past_key_values
    both = model(second, torch.cat([masks, more], dim=1), past_key_values=cache)
    for row in range(3):
        read = torch.cat([first[row][masks[row] == 1], second[row][more[row] == 1]])
        alone = model(read[None]).logits[0, -int(more[row].sum()) :]
        mine = both.logits[row][more[row] == 1]
        torch.testing.assert_close(mine, alone, rtol=1e-9, atol=1e-10)


def _examples() -> list[dict[str, list[int]]]:
    texts = ["abcdefgh\n", "bad cab\n", "abcabcabcabc\n", "face\n"] * 8
    return [{"input_ids": FAST(text)["input_ids"]} for text in texts]


def _arguments(folder: Path, **fields: object) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=8,
        learning_rate=2e-2,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **fields,
    )


def test_trainer_lowers_the_loss_and_saves_what_opens(tmp_path) -> None:
    torch.manual_seed(0)
    model = MinRNNForCausalLM(MinRNNConfig(vocab_size=10, width=16, num_layers=1, dropout=0.0))
    model.config.tokenizer = LETTERS.to_json()
    trainer = Trainer(
        model=model,
        args=_arguments(tmp_path, max_steps=60, save_steps=20),
        train_dataset=_examples(),
        eval_dataset=_examples()[:4],
        data_collator=DataCollatorForLanguageModeling(FAST, mlm=False),
        processing_class=FAST,
    )
    trainer.train()
    history = [step["loss"] for step in trainer.state.log_history if "loss" in step]
    assert history[0] > 2.2
    assert history[-1] < 0.7 * history[0]
    assert trainer.evaluate()["eval_loss"] < 0.7 * history[0]
    loaded = minrnn.load(tmp_path / "checkpoint-60")
    assert same(loaded.model.state_dict(), model.state_dict())
    assert loaded.tokenizer.to_json() == LETTERS.to_json()
    middle = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-20")
    assert not same(middle.state_dict(), model.state_dict())
    # it goes on from there to the same end
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-20"))
    assert same(loaded.model.state_dict(), trainer.model.state_dict())


def test_a_pipeline_continues_texts(tmp_path) -> None:
    ours = language_model()
    opened(tmp_path, ours)
    pipe = pipeline("text-generation", model=str(tmp_path), device="cpu")
    made = pipe(PROMPTS, max_new_tokens=16, do_sample=False, batch_size=4)
    for prompt, (found,) in zip(PROMPTS, made, strict=True):
        sampling = minrnn.Sampling(0)
        pieces = minrnn.generate(ours, LETTERS, prompt, length=16, sampling=sampling)
        assert found["generated_text"] == prompt + "".join(pieces)


def test_the_auto_classes_know_the_model(tmp_path) -> None:
    opened(tmp_path, language_model("minlstm"))
    config = AutoConfig.from_pretrained(tmp_path)
    assert type(config) is MinRNNConfig
    assert (config.vocab_size, config.hidden_size, config.num_hidden_layers) == (10, 16, 2)
    assert config.model_config == language_model("minlstm").config


def test_wrong_inputs_are_named() -> None:
    model = for_transformers(language_model())
    ids = torch.randint(10, (2, 4))
    mask = torch.ones(2, 4, dtype=torch.long)
    cache = model(ids).past_key_values
    mixed = model(ids, torch.tensor([[1, 1, 1, 1], [0, 1, 1, 1]]))
    assert mixed.past_key_values.state.batch_size == 2
    for arguments, message in (
        ({}, "one of `input_ids` and `inputs_embeds` must be given, got both or none"),
        ({"input_ids": ids[:, :0]}, r"shape \(B, T\) with T >= 1, got \(2, 0\)"),
        ({"input_ids": ids[0]}, r"shape \(B, T\) with T >= 1, got \(4,\)"),
        ({"input_ids": ids, "attention_mask": mask[:, 1:]}, r"\(2, 4\), got \(2, 3\)"),
        ({"input_ids": ids, "attention_mask": mask[:1]}, r"\(2, 4\), got \(1, 4\)"),
        ({"inputs_embeds": ids}, r"`inputs_embeds` must have shape .* got \(2, 4\)"),
        ({"input_ids": ids[:1], "past_key_values": cache}, "must have B = 1 rows, got 2"),
        ({"input_ids": ids, "output_attentions": True}, "`output_attentions` must be False"),
        ({"input_ids": ids, "output_hidden_states": True}, "`output_hidden_states` must be Fal"),
    ):
        with pytest.raises(ValueError, match=message):
            model(**arguments)
    with pytest.raises(TypeError, match=r"must be a StateCache, .* got DynamicCache"):
        model(ids, past_key_values=DynamicCache())
    growing = for_transformers(language_model("attention"))
    parts = growing(ids, torch.tensor([[1, 1, 1, 1], [0, 1, 1, 1]])).past_key_values
    with pytest.raises(ValueError, match="`state` must be of one shape, the rows have 2"):
        _ = parts.state


def test_wrong_configurations_and_folders_are_named(tmp_path) -> None:
    with pytest.raises(ValueError, match="`width` must be >= 1, got 0"):
        MinRNNConfig(width=0)
    with pytest.raises(ValueError, match=r"`mixer` must be one of 'mingru', .* got 'gpt'"):
        MinRNNConfig(model={"mixer": "gpt"})
    with pytest.raises(ValueError, match="the run must be of a language model"):
        MinRNNConfig(decision_model={})
    with pytest.raises(ValueError, match=r"`config\.vocab_size` must be >= 1, got 0"):
        MinRNNForCausalLM(MinRNNConfig())
    model = for_transformers(language_model())
    other = {name: x for name, x in model.state_dict().items() if name != "norm.weight"}
    for weights in (other, other | {"norm.weight": torch.zeros(3)}, model.state_dict() | other):
        if "norm.weight" in weights and weights["norm.weight"].shape == (16,):
            weights["norm.bias"] = torch.zeros(16)
        with pytest.raises(ValueError, match=r"have the weights .*: norm\.(weight|bias) must have"):
            model.save_pretrained(tmp_path / "not", state_dict=weights)
    with pytest.raises(ValueError, match=r"`push_to_hub` must be False, got True; call model\.pu"):
        model.save_pretrained(tmp_path, push_to_hub=True)
    model.save_pretrained(tmp_path / "not", is_main_process=False)
    assert not (tmp_path / "not").exists()


def test_damaged_and_lacking_weights_are_named(tmp_path) -> None:
    opened(tmp_path, language_model())
    weights = tmp_path / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-4] + b"\x00\x00\x80\x41")
    with pytest.raises(ValueError, match="is damaged: its content does not fit its checksum"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    weights.write_bytes(whole)
    config = json.loads((tmp_path / "config.json").read_text())
    config["model"]["num_layers"] = 3
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"does not fit its configuration: it lacks blocks\.2\."):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    config["model"]["num_layers"] = 1
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"its configuration: no part is named blocks\.1\."):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    save_file(load_file(weights), weights)
    with pytest.raises(ValueError, match=r"must have format 'minrnn\.run/1', got None"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
