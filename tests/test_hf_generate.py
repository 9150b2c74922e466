"""`generate` in its other modes: rows that end early, scores, prompts padded anyhow, a chat."""

import pytest
import torch
from hf_models import FAST, PROMPTS, for_transformers, language_model

from minrnn.hf import MinRNNForCausalLM

PAD = 10
END = 3


def _model(mixer: str = "mingru") -> MinRNNForCausalLM:
    # double precision: near ties would be decided by the order of sums
    return for_transformers(language_model(mixer)).double()


def _tokens(rows: torch.Tensor) -> list[list[int]]:
    return [[token for token in row if token != PAD] for row in rows.tolist()]


def _ending_after(model: MinRNNForCausalLM, lengths: list[int]) -> dict[str, object]:
    """Options by which row n of the batch ends after lengths[n] tokens."""

    def process(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores = scores.clone()
        step = ids.shape[1] - 11
        for row in range(len(scores)):
            if step == lengths[row] - 1:
                scores[row, END] = scores[row].max() + 1
            else:
                scores[row, END] = -torch.inf
        return scores

    return {"logits_processor": [process], "eos_token_id": END, "max_new_tokens": 6}


@pytest.mark.parametrize("lengths", [[2, 9, 9, 9], [9, 2, 9, 9], [9, 4, 9, 1], [3, 2, 5, 1]])
@pytest.mark.parametrize("normalized", [True, False])
def test_scores_of_rows_that_end_early(lengths: list[int], normalized: bool) -> None:
    model = _model()
    batch = FAST(PROMPTS, padding=True, return_tensors="pt")
    options = _ending_after(model, lengths)
    found = model.generate(
        **batch, **options, output_scores=True, return_dict_in_generate=True, do_sample=False
    )
    made = found.sequences[:, 11:]
    assert [len(row) for row in _tokens(made)] == [min(n, 6) for n in lengths]
    scores = model.compute_transition_scores(
        found.sequences, found.scores, normalize_logits=normalized
    )
    assert scores.shape == made.shape
    for step, logits in enumerate(found.scores):
        logits = logits.log_softmax(-1) if normalized else logits
        for row, token in enumerate(made[:, step].tolist()):
            expected = 0.0 if token == PAD else logits[row, token].item()
            # in single precision, of logits of about 10
            assert scores[row, step].item() == pytest.approx(expected, rel=1e-5, abs=1e-5)
    # a row alone has the scores that it has among others
    one = FAST(PROMPTS[3], return_tensors="pt")
    alone = model.generate(
        **one, max_new_tokens=1, output_logits=True, return_dict_in_generate=True
    )
    one_score = model.compute_transition_scores(alone.sequences, alone.logits)
    assert one_score.item() == pytest.approx(alone.logits[0].max().item(), rel=1e-5)


@pytest.mark.parametrize("end", [0, 3, 9])
def test_scores_of_beams_add_up(end: int) -> None:
    model = _model("minlstm")
    batch = FAST(PROMPTS, padding=True, return_tensors="pt")
    options = {"num_beams": 3, "num_return_sequences": 2, "eos_token_id": end, "max_new_tokens": 8}
    found = model.generate(**batch, **options, output_scores=True, return_dict_in_generate=True)
    scores = model.compute_transition_scores(found.sequences, found.scores, found.beam_indices)
    made = (found.sequences[:, 11:] != PAD).sum(1)
    torch.testing.assert_close(scores.sum(1) / made, found.sequences_scores, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mixer", ["mingru", "attention"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_cache": False},
        {"min_new_tokens": 5},
        {"repetition_penalty": 1.7},
        {"no_repeat_ngram_size": 2},
        {"num_beams": 3, "num_return_sequences": 2},
        {"bad_words_ids": [[1, 2], [4]]},
    ],
    ids=str,
)
def test_rows_are_what_they_are_alone(mixer: str, options: dict[str, object]) -> None:
    model = _model(mixer)
    options = {"eos_token_id": END, "max_new_tokens": 8, "do_sample": False} | options
    count = options.get("num_return_sequences", 1)
    expected = []
    for prompt in PROMPTS:
        one = FAST(prompt, return_tensors="pt")
        expected += _tokens(model.generate(**one, **options)[:, len(prompt) :])
    # with padding after a prompt transformers looks for what followed padding
    for side in ("left",) if "no_repeat_ngram_size" in options else ("left", "right"):
        batch = FAST(PROMPTS, padding=True, padding_side=side, return_tensors="pt")
        found = model.generate(**batch, **options)[:, 11:]
        assert len(found) == 4 * count
        assert _tokens(found) == expected
        # `generate` finds the padding by its id
        assert _tokens(model.generate(batch["input_ids"], **options)[:, 11:]) == expected


@pytest.mark.parametrize("mixer", ["mingru", "attention"])
def test_a_chat_continues_from_the_states_of_rows_that_ended(mixer: str) -> None:
    model = _model(mixer)
    batch = FAST(PROMPTS, padding=True, return_tensors="pt")
    options = _ending_after(model, [2, 9, 4, 9])
    first = model.generate(**batch, **options, return_dict_in_generate=True)
    question = torch.randint(10, (4, 3))
    ids = torch.cat([first.sequences, question], dim=1)
    # whatever the caller's mask says of the padding after an end
    for mask in ((ids != PAD).long(), torch.cat([batch["attention_mask"], torch.ones(4, 9)], 1)):
        more = {"attention_mask": mask, "max_new_tokens": 5}
        on = model.generate(ids, past_key_values=first.past_key_values, **more)[:, -5:]
        again = model.generate(ids, **more)[:, -5:]
        for row in range(4):
            alone = ids[row][ids[row] != PAD][None]
            expected = model.generate(alone, max_new_tokens=5)[:, -5:]
            assert on[row].tolist() == again[row].tolist() == expected[0].tolist()


def test_texts_stop_at_strings_of_their_own() -> None:
    model = _model()
    one = FAST("abc", return_tensors="pt")
    free = FAST.decode(model.generate(**one, max_new_tokens=12)[0, 3:])
    stopped = model.generate(**one, max_new_tokens=12, stop_strings=[free[2:4]], tokenizer=FAST)
    assert FAST.decode(stopped[0, 3:]) == free[: free.index(free[2:4]) + 2]


def test_assisted_generation_is_refused() -> None:
    one = FAST("abc", return_tensors="pt")
    for options in ({"assistant_model": _model()}, {"prompt_lookup_num_tokens": 3}):
        with pytest.raises(ValueError, match="assisted generation is not supported with stateful"):
            _model().generate(**one, max_new_tokens=5, **options)
