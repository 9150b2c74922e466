"""Adapters of PEFT: what is saved with one opens again, here and there, with equal outputs."""

import json
from pathlib import Path

import peft
import pytest
import torch
from hf_models import FAST, language_model, opened, same
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
from transformers.utils import is_peft_available

import minrnn
from minrnn.hf import MinRNNForCausalLM, adapters

# of PEFT and of transformers, which it asks
pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Setting .save_embedding_layers.:UserWarning"),
]
IDS = torch.arange(14).remainder(10).view(2, 7)
KINDS = {
    "all-linear": {"target_modules": "all-linear"},
    "dora": {"target_modules": "all-linear", "use_dora": True},
    # the weights of MinGRU are in no nn.Linear
    "recurrent": {
        "target_modules": ["narrow"],
        "target_parameters": ["rnn.weight_ih_l0", "rnn.weight_hr_l0"],
    },
    "head": {"target_modules": ["head", "embedding"]},
    "whole modules": {"target_modules": "all-linear", "modules_to_save": ["head", "embedding"]},
}


def _options(kind: str = "all-linear", **fields: object) -> peft.LoraConfig:
    return peft.LoraConfig(task_type="CAUSAL_LM", r=2, **KINDS[kind], **fields)


def _base(folder: Path) -> MinRNNForCausalLM:
    return opened(folder, language_model())


@torch.no_grad()
def _logits(model: torch.nn.Module) -> torch.Tensor:
    found = model.eval()(IDS)
    return found[0] if isinstance(found, tuple) else found.logits


@torch.no_grad()
def _drawn(model: torch.nn.Module) -> torch.Tensor:
    """Draw the weights of the adapter, which are zero at first; the logits with it."""
    for name, x in model.named_parameters():
        if "lora_" in name:
            x.add_(0.3 * torch.randn_like(x))
    return _logits(model)


def _close(found: torch.Tensor, expected: torch.Tensor) -> None:
    # merged weights are rounded: outputs of about 10 differ by about 1e-5
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("saved_base", [True, False])
def test_a_model_with_an_adapter_opens(kind: str, saved_base: bool, tmp_path) -> None:
    model = _base(tmp_path / "base")
    if not saved_base:
        # nothing on disk has its weights
        model = type(model)(model.config)
        model.name_or_path = model.config.name_or_path = ""
    before = _logits(model)
    model.add_adapter(_options(kind), "mine")
    expected = _drawn(model)
    assert (expected - before).abs().max() > 0.1
    model.save_pretrained(tmp_path / "adapted")
    for opening in (AutoModelForCausalLM, MinRNNForCausalLM):
        again = opening.from_pretrained(tmp_path / "adapted")
        assert same(again.state_dict(), model.state_dict())
        _close(_logits(again), expected)
    again.save_pretrained(tmp_path / "twice")
    twice = AutoModelForCausalLM.from_pretrained(tmp_path / "twice")
    assert same(twice.state_dict(), model.state_dict())
    with pytest.raises(
        ValueError, match=r"`folder` must hold a model, .* holds an adapter of PEFT"
    ):
        minrnn.load(tmp_path / "adapted")
    merged = again.merged()
    _close(_logits(merged), expected)
    _close(_logits(again), expected)
    # over the adapter's files, which are gone then
    merged.save_pretrained(tmp_path / "adapted")
    _close(_logits(minrnn.load(tmp_path / "adapted").model), expected)
    _close(_logits(AutoModelForCausalLM.from_pretrained(tmp_path / "adapted")), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_a_peft_model_round_trips(kind: str, tmp_path) -> None:
    model = peft.get_peft_model(_base(tmp_path / "base"), _options(kind))
    expected = _drawn(model)
    inner = model.get_base_model()
    with pytest.raises(ValueError, match=r"have the weights of the conf.* inside a PeftModel save"):
        inner.save_pretrained(tmp_path / "inner")
    assert not (tmp_path / "inner").exists()
    model.save_pretrained(tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    _close(_logits(peft.PeftModel.from_pretrained(base, tmp_path / "adapter")), expected)
    with pytest.raises(
        ValueError, match=r"`folder` must hold a model, .* holds an adapter of PEFT"
    ):
        minrnn.load(tmp_path / "adapter")
    merged = model.merge_and_unload()
    assert type(merged) is MinRNNForCausalLM
    merged.save_pretrained(tmp_path / "merged")
    _close(_logits(minrnn.load(tmp_path / "merged").model), expected)
    with pytest.raises(ValueError, match="`merged` needs an adapter of `add_adapter`"):
        merged.merged()


def test_an_adapter_in_the_format_of_peft_is_saved(tmp_path) -> None:
    model = _base(tmp_path / "base")
    model.add_adapter(_options(), "mine")
    expected = _drawn(model)
    model.save_pretrained(tmp_path / "adapted")
    names = load_file(tmp_path / "adapted" / "adapter_model.safetensors")
    assert "base_model.model.blocks.0.mlp.widen.lora_A.weight" in names
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    _close(_logits(peft.PeftModel.from_pretrained(base, tmp_path / "adapted")), expected)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    base.load_adapter(str(tmp_path / "adapted"))
    _close(_logits(base), expected)


def test_minrnn_save_replaces_an_adapter(tmp_path) -> None:
    model = _base(tmp_path / "base")
    model.add_adapter(_options())
    model.save_pretrained(tmp_path / "run")
    ours = language_model("minlstm")
    minrnn.save(tmp_path / "run", ours)
    assert same(minrnn.load(tmp_path / "run").model.state_dict(), ours.state_dict())
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    assert same(again.state_dict(), ours.state_dict())


ROWS = [FAST(text)["input_ids"] for text in ("badcab", "facade")]


def _trainer(base: Path, folder: Path, native: bool) -> Trainer:
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(base)
    if native:
        model.add_adapter(_options())
    else:
        model = peft.get_peft_model(model, _options())
    arguments = TrainingArguments(
        str(folder),
        max_steps=4,
        save_steps=2,
        learning_rate=1e-2,
        label_smoothing_factor=0.1,
        logging_steps=1,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    return Trainer(model, arguments, train_dataset=[{"input_ids": x, "labels": x} for x in ROWS])


@pytest.mark.parametrize("native", [True, False])
def test_checkpoints_of_trainer_open_and_resume(native: bool, tmp_path) -> None:
    base = _base(tmp_path / "base")
    first = _trainer(tmp_path / "base", tmp_path / "run", native)
    first.train()
    trained = _logits(first.model)
    assert (trained - _logits(base)).abs().max() > 0.01
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "checkpoint-4")
    _close(_logits(again), trained)
    again.merged().save_pretrained(tmp_path / "merged")
    _close(_logits(minrnn.load(tmp_path / "merged").model), trained)
    second = _trainer(tmp_path / "base", tmp_path / "run", native)
    second.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    _close(_logits(second.model), trained)
    # the adapter does nothing at first, and labels are shifted before they are smoothed
    ids = torch.tensor(ROWS)
    with torch.no_grad():
        surprise = -base(ids).logits[:, :-1].log_softmax(-1)
    target = surprise.gather(2, ids[:, 1:, None]).mean()
    expected = 0.9 * target.item() + 0.1 * surprise.mean().item()
    assert first.state.log_history[0]["loss"] == pytest.approx(expected, rel=1e-4)


def test_damaged_adapters_and_a_missing_peft_are_named(tmp_path, monkeypatch) -> None:
    assert is_peft_available()
    model = _base(tmp_path / "base")
    model.add_adapter(_options())
    folder = tmp_path / "adapted"
    model.save_pretrained(folder)
    settings = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(settings | {"use_dora": True}))
    with pytest.raises(ValueError, match=r"does not fit its adapter_config\.json: it lacks blocks"):
        AutoModelForCausalLM.from_pretrained(folder)
    monkeypatch.setattr(adapters, "is_peft_available", lambda: False)
    with pytest.raises(ImportError, match=r"holds an adapter: pip install 'minrnn"):
        AutoModelForCausalLM.from_pretrained(folder)
