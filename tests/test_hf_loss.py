"""Losses in transformers: those of the rows alone, however they are padded, packed or weighted."""

from pathlib import Path

import pytest
import torch
from hf_models import FAST, GROWING, PROMPTS, for_transformers, language_model
from torch.nn import functional as F
from transformers import (
    DataCollatorForLanguageModeling,
    DataCollatorWithFlattening,
    Trainer,
    TrainingArguments,
)

from minrnn.hf import MinRNNForCausalLM

ROWS = [FAST(text)["input_ids"] for text in PROMPTS]
# of each row: where its tokens are
PLACES = {
    "left": [range(11 - len(row), 11) for row in ROWS],
    "right": [range(len(row)) for row in ROWS],
    "both": [range(3, 6), range(5, 6), range(11), range(1, 4)],
    "inside": [[0, 4, 5], [7], range(11), [2, 3, 10]],
}


def _model(mixer: str = "mingru") -> MinRNNForCausalLM:
    # double precision: the same sums in another order differ by about 1e-15
    return for_transformers(language_model(mixer)).double()


def _sums(model: MinRNNForCausalLM, rows: list[list[int]] = ROWS) -> list[tuple[float, int]]:
    """The loss of each row alone, as a sum, and the number of tokens that are predicted."""
    found = []
    for row in rows:
        ids = torch.tensor(row)
        logits = model(ids[None]).logits[0, :-1].float()
        found.append((F.cross_entropy(logits, ids[1:], reduction="sum").item(), len(row) - 1))
    return found


def _mean(model: MinRNNForCausalLM, rows: list[list[int]] = ROWS) -> float:
    sums, counts = zip(*_sums(model, rows), strict=True)
    return sum(sums) / sum(counts)


def _batch(places: str, padding: int = 10) -> dict[str, torch.Tensor]:
    ids, mask = torch.full((4, 11), padding), torch.zeros(4, 11, dtype=torch.long)
    for row, at in enumerate(PLACES[places]):
        ids[row, list(at)], mask[row, list(at)] = torch.tensor(ROWS[row]), 1
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("places", PLACES)
@pytest.mark.parametrize("mixer", ["mingru", "minlstm", *GROWING])
def test_the_loss_of_padded_rows_is_that_of_the_rows_alone(mixer: str, places: str) -> None:
    model = _model(mixer)
    expected = pytest.approx(_mean(model), rel=1e-6)
    batch = _batch(places)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    masked = ids.masked_fill(mask == 0, -100)
    for options in ({"labels": masked}, {"labels": ids}, {"labels": masked, "use_cache": True}):
        assert model(**batch, **options).loss.item() == expected
        # the id of padding says it as well, alone or where the mask does not
        assert model(ids, **options).loss.item() == expected
        assert model(ids, torch.ones_like(mask), **options).loss.item() == expected
    noise = torch.where(mask.bool(), ids, torch.randint(10, ids.shape))
    assert model(noise, mask, labels=noise).loss.item() == expected
    assert model(noise, mask, labels=noise, logits_to_keep=1).loss.item() == expected
    embedded = model.embedding(noise)
    given = model(inputs_embeds=embedded, attention_mask=mask, labels=noise)
    assert given.loss.item() == expected
    # the next token of each step, where the caller shifts
    next_ids = torch.full_like(ids, -100)
    for row, at in enumerate(PLACES[places]):
        next_ids[row, list(at)[:-1]] = torch.tensor(ROWS[row][1:], dtype=torch.long)
    assert model(**batch, shift_labels=next_ids).loss.item() == expected


def test_padding_predicts_what_the_last_token_before_it_does() -> None:
    model = _model()
    batch = _batch("inside")
    for use_cache in (True, False):
        logits = model(**batch, use_cache=use_cache).logits
        alone = model(torch.tensor([ROWS[3]])).logits[0]
        steps = [0, 0, 1, *[1] * 6, 2]
        torch.testing.assert_close(logits[3, [2, 2, 3, *range(4, 10), 10]], alone[steps])
        # before the first token nothing is known of it
        torch.testing.assert_close(logits[1, :7], model.head.bias.expand(7, 10))
    hidden = model(torch.full((2, 3), 10))
    torch.testing.assert_close(hidden.logits, model.head.bias.expand(2, 3, 10))
    without = model(torch.full((2, 3), 10), use_cache=False)
    torch.testing.assert_close(without.logits, hidden.logits)


def test_gradients_of_padded_rows_are_those_of_the_rows_alone() -> None:
    model = _model("minlstm")
    batch = _batch("left")
    model(**batch, labels=batch["input_ids"]).loss.backward()
    padded = {name: x.grad.clone() for name, x in model.named_parameters()}
    model.zero_grad()
    # 14 tokens are predicted, none of the row of one
    for row in (row for row in ROWS if len(row) > 1):
        ids = torch.tensor([row])
        (model(ids, labels=ids).loss * (len(row) - 1) / 14).backward()
    for name, x in model.named_parameters():
        torch.testing.assert_close(padded[name], x.grad, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("mixer", ["mingru", "hyena"])
def test_packed_rows_do_not_see_each_other(mixer: str) -> None:
    model = _model(mixer)
    batch = dict(DataCollatorWithFlattening()([{"input_ids": row} for row in ROWS]))
    assert batch["input_ids"].shape == (1, sum(map(len, ROWS)))
    found = model(**batch)
    assert found.loss.item() == pytest.approx(_mean(model), rel=1e-6)
    # labels that do not leave out the first token of a sequence
    ids, positions = batch["input_ids"], batch["position_ids"]
    assert model(ids, position_ids=positions, labels=ids).loss.item() == pytest.approx(
        _mean(model), rel=1e-6
    )
    logits = model(ids, position_ids=positions).logits
    alone = torch.cat([model(torch.tensor([row])).logits for row in ROWS], dim=1)
    torch.testing.assert_close(logits, alone, rtol=1e-9, atol=1e-10)
    # several rows of several sequences, padded on the left
    both = torch.cat([torch.full((1, 2), 10), ids], dim=1).repeat(2, 1)
    twice = torch.cat([torch.ones(1, 2, dtype=torch.long), positions], dim=1)
    found = model(both, position_ids=twice, labels=both)
    assert found.loss.item() == pytest.approx(_mean(model), rel=1e-6)
    # positions of one sequence a row change nothing
    whole = model(ids, position_ids=torch.arange(ids.shape[1])[None])
    assert whole.logits.equal(model(ids).logits)


def test_packed_rows_have_no_one_state() -> None:
    model = _model()
    ids, positions = torch.randint(10, (1, 6)), torch.tensor([[0, 1, 2, 0, 1, 2]])
    assert model(ids, position_ids=positions).past_key_values is None
    past = model(ids).past_key_values
    for name, value in (("use_cache", True), ("past_key_values", past)):
        with pytest.raises(ValueError, match=f"`{name}` must be None where `position_ids` start"):
            model(ids, position_ids=positions, **{name: value})
    for name in ("seq_idx", "cu_seq_lens_q"):
        with pytest.raises(ValueError, match=f"`{name}` must come with `position_ids`"):
            model(ids, **{name: torch.tensor([0, 3, 6])})
    with pytest.raises(ValueError, match=r"`position_ids` must have shape .* = \(1, 6\), got \(1,"):
        model(ids, position_ids=positions[:, 1:])
    for name in ("labels", "shift_labels"):
        with pytest.raises(
            ValueError, match=rf"`{name}` must have shape .* = \(1, 6\), got \(1, 5"
        ):
            model(ids, **{name: ids[:, 1:]})


def test_a_loss_may_be_divided_by_the_items_of_several_batches() -> None:
    model = _model()
    ids = torch.randint(10, (3, 8))
    mean = model(ids, labels=ids).loss
    for items in (50, torch.tensor(50)):
        shared = model(ids, labels=ids, num_items_in_batch=items).loss
        torch.testing.assert_close(shared, mean * 21 / 50)
    # Trainer counts the first token of each padded row, which nothing predicts
    batch = _batch("left")
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    counted = labels[:, 1:].ne(-100).sum()
    assert counted == 14 + 3
    found = model(**batch, labels=labels, num_items_in_batch=counted).loss.item()
    assert found == pytest.approx(_mean(model), rel=1e-6)
    # a batch without a prediction adds nothing
    none = model(ids[:, :1], labels=ids[:, :1], num_items_in_batch=5).loss
    assert none.item() == 0.0


def test_a_loss_function_of_the_user_gets_what_is_predicted() -> None:
    model = _model()
    taken = {}
    model.loss_function = lambda **given: taken.update(given) or given["logits"].sum()
    batch = _batch("inside")
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    model(**batch, labels=labels, num_items_in_batch=7)
    assert taken["logits"].shape == (4, 11, 10)
    assert taken["labels"][3].tolist() == [-100] * 3 + [ROWS[3][1]] + [-100] * 6 + [ROWS[3][2]]
    assert taken["num_items_in_batch"] == pytest.approx(7 * 14 / 16)


def _trainer(model: MinRNNForCausalLM, folder: Path, rows: object, **fields: object) -> Trainer:
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=1,
        learning_rate=0.0,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        save_strategy="no",
        **{"per_device_train_batch_size": 4, **fields},
    )
    data = [{"input_ids": row} for row in rows]
    collator = DataCollatorForLanguageModeling(FAST, mlm=False)
    return Trainer(model, arguments, collator, data, eval_dataset=data)


def _logged(trainer: Trainer) -> float:
    trainer.train()
    return next(step["loss"] for step in trainer.state.log_history if "loss" in step)


def test_trainer_logs_the_loss_of_the_rows_alone(tmp_path) -> None:
    model = _model()
    trainer = _trainer(model, tmp_path, ROWS)
    expected = pytest.approx(_mean(model), rel=1e-5)
    assert _logged(trainer) == expected
    assert trainer.evaluate()["eval_loss"] == expected
    # each update is the mean over its tokens, not over its batches
    rows = [row for row in ROWS if len(row) == 3] * 2 + [ROWS[2]] * 4
    split = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    assert _logged(_trainer(model, tmp_path, rows, **split)) == pytest.approx(
        _mean(model, rows), rel=1e-5
    )
    # and may come from a function of the user
    trainer = _trainer(model, tmp_path, ROWS)
    trainer.compute_loss_func = lambda outputs, labels, num_items_in_batch: outputs.logits.mean()
    assert _logged(trainer) == pytest.approx(model(**_batch("left")).logits.mean().item(), rel=1e-4)


def _smoothed(model: MinRNNForCausalLM, rows: list[list[int]], epsilon: float) -> float:
    losses = []
    for row in rows:
        surprise = -model(torch.tensor([row])).logits[0, :-1].float().log_softmax(-1)
        target = surprise.gather(1, torch.tensor(row)[1:, None])[:, 0]
        losses.append((1 - epsilon) * target + epsilon * surprise.mean(1))
    return torch.cat(losses).mean().item()


# of torch.compile, where it leaves a graph
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
@pytest.mark.parametrize("wrapped", ["plain", "subclass", "compiled"])
def test_smoothed_labels_are_those_of_the_next_token(wrapped: str, tmp_path) -> None:
    model = _model()
    if wrapped == "subclass":
        # as FSDP does
        model.__class__ = type("FSDPMinRNNForCausalLM", (MinRNNForCausalLM,), {})
    elif wrapped == "compiled":
        model.compile(backend="eager")
    rows = [ROWS[0], ROWS[3], ROWS[0][::-1]]
    trainer = _trainer(model, tmp_path, rows, label_smoothing_factor=0.1)
    expected = pytest.approx(_smoothed(model, rows, 0.1), rel=1e-5)
    assert _logged(trainer) == expected


def test_rows_that_trainer_smooths_may_be_padded_on_the_right(tmp_path, monkeypatch) -> None:
    model = _model()
    monkeypatch.setattr(FAST, "padding_side", "right")
    rows = [row for row in ROWS if len(row) > 1]
    trainer = _trainer(model, tmp_path, rows, label_smoothing_factor=0.2)
    assert _logged(trainer) == pytest.approx(_smoothed(model, rows, 0.2), rel=1e-5)
