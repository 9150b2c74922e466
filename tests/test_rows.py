"""Rows, masks and ids: what selects is read as in torch's indexing, or refused by name."""

import time
from collections.abc import Callable

import numpy as np
import pytest
import torch

import minrnn
from minrnn.acting import WindowActor
from minrnn.data.batch import Batch
from minrnn.data.tokenizers import Bytes, Characters
from minrnn.data.trajectories import Trajectories
from minrnn.decision import DecisionConfig, DecisionModel
from minrnn.models import LanguageModel, ModelConfig
from minrnn.packing import pack_model
from minrnn.sampling import Sampling, draw
from minrnn.serve.engine import Engine
from minrnn.serve.requests import Request
from minrnn.serve.worker import Worker
from minrnn.state import State
from minrnn.stream import Stream


def _of_state(rows: object) -> list[int]:
    part = torch.arange(3)
    state = State({"a": part, "inner": State({"b": part[:, None] * 1.0})}).select(rows)
    assert state.inner("inner").tensor("b")[:, 0].tolist() == state.tensor("a").tolist()
    return state.tensor("a").tolist()


def _of_actor(rows: object) -> list[int]:
    model = DecisionModel(DecisionConfig(observation_size=1, action_size=1))
    actor = WindowActor(model.eval(), steps=2)
    actor.act(torch.arange(3.0)[:, None].expand(3, model.num_features))
    actor.select(rows)
    return actor.past[:, 0, 0].int().tolist()


def _of_trajectories(rows: object) -> list[int]:
    ones, number = np.ones((6, 1), np.float32), np.repeat(np.arange(3, dtype=np.float32), 2)
    ends, terminated = np.array([2, 4, 6]), np.array([True, False, True])
    data = Trajectories(number[:, None], ones, number, ends, terminated).take(rows)
    assert (data.terminated == (data.observations[::2, 0] != 1)).all()
    return data.observations[::2, 0].astype(int).tolist()


SELECTING: dict[str, Callable[[object], list[int]]] = {
    "State": _of_state,
    "WindowActor": _of_actor,
    "Trajectories": _of_trajectories,
}
by_kind = pytest.mark.parametrize("selected", SELECTING.values(), ids=SELECTING)
GOOD = {
    "list": ([2, 0, 0], [2, 0, 0]),
    "tuple": ((1,), [1]),
    "range": (range(2), [0, 1]),
    "array": (np.array([2, 1], dtype=np.int32), [2, 1]),
    "tensor": (torch.tensor([2, 1]), [2, 1]),
    "mask": (torch.tensor([True, False, True]), [0, 2]),
    "mask-array": (np.array([False, False, True]), [2]),
    "mask-list": ([True, False, True], [0, 2]),
}


@by_kind
@pytest.mark.parametrize(("rows", "expected"), GOOD.values(), ids=GOOD)
def test_rows_and_masks_select_as_in_torch(selected, rows: object, expected: list[int]) -> None:
    assert selected(rows) == expected


BAD = {
    "negative": ([0, -1], ValueError, r"must be in \[0, [BE]\) = \[0, 3\), got -1"),
    "outside": (torch.tensor([0, 3]), ValueError, r"must be in \[0, [BE]\) = \[0, 3\), got 3"),
    "short-mask": ([True, False], ValueError, r"as a mask must have [BE] = 3 entries, got 2"),
    "scalar": (torch.tensor(1), ValueError, r"must have one axis, \(N,\), got shape \(\)"),
    "int": (1, ValueError, r"must have one axis, \(N,\), got shape \(\)"),
    "two-axes": ([[0, 1]], ValueError, r"must have one axis, \(N,\), got shape \(1, 2\)"),
    "floats": ([0.0, 1.0], TypeError, "must hold integers or bools, got .*float"),
    "nan": (torch.tensor([float("nan")]), TypeError, "must hold integers or bools, got .*float"),
}


@by_kind
@pytest.mark.parametrize(("rows", "error", "message"), BAD.values(), ids=BAD)
def test_other_rows_are_named(selected, rows: object, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        selected(rows)


@pytest.mark.parametrize("rows", [[], (), torch.tensor([]), [False] * 3, np.zeros(0, int)], ids=str)
def test_no_row_is_a_selection_too(rows: object) -> None:
    assert _of_state(rows) == []
    with pytest.raises(ValueError, match="`episodes` must select at least one episode, got none"):
        _of_trajectories(rows)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (torch.tensor([1, 0, 1], dtype=torch.uint8), r"bools, got torch\.uint8"),
        ([True, 2], r"integers or bools, not both, got \[True, 2\]"),
        (["1"], r"must be \(N,\) integers or \(B,\) bools, got \['1'\]"),
        (None, r"must be \(N,\) integers or \(B,\) bools, got None"),
    ],
)
def test_what_may_be_a_mask_or_numbers_is_refused(rows: object, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        _of_state(rows)


def test_rows_are_checked_in_a_compiled_graph() -> None:
    select = torch.compile(
        lambda x, rows: State({"h": x}).select(rows).tensor("h"), backend="eager", fullgraph=True
    )
    x = torch.arange(3.0)
    assert select(x, torch.tensor([2, 0])).tolist() == [2.0, 0.0]
    with pytest.raises(RuntimeError, match=r"`rows` must be in \[0, 3\)"):
        select(x, torch.tensor([2, -1]))


def test_parts_that_have_no_batch_are_named() -> None:
    with pytest.raises(ValueError, match="`parts` must have the batch first, h has no axis"):
        State({"h": torch.tensor(1.0)})
    with pytest.raises(TypeError, match=r"`parts` must hold tensors and States, got h = \[1\]"):
        State({"h": [1]})


@pytest.mark.parametrize("packed", [False, True])
def test_ids_are_integers(packed: bool) -> None:
    model = LanguageModel(ModelConfig(vocab_size=5, width=8)).eval()
    model = pack_model(model) if packed else model
    expected = model(torch.tensor([[1, 0, 4]]))[0]
    for dtype in (torch.uint8, torch.int16, torch.int32, torch.uint16):
        assert model(torch.tensor([[1, 0, 4]], dtype=dtype))[0].equal(expected)
    for ids in (torch.tensor([[True, False]]), torch.ones(1, 2), torch.ones(1, 2) * 1j):
        with pytest.raises(TypeError, match="`ids` must hold integers, got torch"):
            model(ids)


@pytest.mark.parametrize(
    ("ids", "error", "message"),
    [
        ([1, -1], ValueError, r"`ids` must be in \[0, V\) = \[0, 5\), got -1"),
        ([1, 5], ValueError, r"`ids` must be in \[0, V\) = \[0, 5\), got 5"),
        ([], ValueError, "`ids` must hold at least one symbol"),
        (torch.tensor(1), ValueError, r"`ids` must have shape \(T,\), got \(\)"),
        ([[1, 2]], ValueError, r"`ids` must have shape \(T,\), got \(1, 2\)"),
        ([True, False], TypeError, r"`ids` must hold integers, got torch\.bool"),
        ([float("nan")], TypeError, r"`ids` must hold integers, got torch\.float32"),
    ],
)
def test_ids_of_a_stream_are_checked(ids: object, error: type, message: str) -> None:
    stream = Stream(LanguageModel(ModelConfig(vocab_size=5, width=8)).eval())
    with pytest.raises(error, match=message):
        stream.prime(ids)


@pytest.mark.parametrize(
    "tokenizer", [Characters("abc"), Bytes(), minrnn.data.bpe.BPE(["a b"])], ids=lambda t: t.kind
)
def test_only_ids_are_decoded(tokenizer: object) -> None:
    for bad in (-1, tokenizer.vocab_size):
        for decode in (tokenizer.decode, lambda ids: list(tokenizer.stream(ids))):
            with pytest.raises(ValueError, match=rf"`ids` must be in \[0, V\) = .*, got {bad}"):
                decode([0, bad])


def test_a_mask_of_numbers_is_refused() -> None:
    ids = torch.ones(2, 3, dtype=torch.int64)
    with pytest.raises(TypeError, match=r"`mask` must be bool, got torch\.int64"):
        Batch(ids, ids, ids)
    with pytest.raises(
        ValueError, match=r"`targets` must begin with the shape \(B, T\) = \(2, 3\)"
    ):
        Batch(ids, ids[:1], ids.bool())


def test_each_row_is_drawn_by_its_own_sampling() -> None:
    sampling = Sampling(temperature=0)
    with pytest.raises(ValueError, match=r"must have B entries .* got 1 and 1 for \(2, 4\)"):
        draw(torch.randn(2, 4), [sampling], [sampling.uniforms()])


class _Heard:
    """A listener that counts what it hears."""

    def __init__(self) -> None:
        self.reasons: list[str] = []

    def read(self, prompt: object) -> None:
        pass

    def drawn(self, symbol: object) -> bool:
        return False

    def ended(self, ending: object) -> None:
        self.reasons.append(ending.reason)


@pytest.mark.parametrize(
    ("prompt", "state", "count", "error", "message"),
    [
        (torch.tensor([1, 5]), None, 1, ValueError, r"`ids` must be in \[0, V\) = \[0, 5\), got 5"),
        (torch.tensor([-1]), None, 1, ValueError, r"`ids` must be in \[0, V\) = .*, got -1"),
        (torch.tensor([[1]]), None, 1, ValueError, r"`ids` must have shape \(T,\), got \(1, 1\)"),
        (torch.tensor([]), None, 1, ValueError, "`ids` must hold at least one symbol, got none"),
        (torch.tensor([1.0]), None, 1, TypeError, r"`ids` must hold integers, got torch\.float32"),
        (torch.tensor([True]), None, 1, TypeError, r"`ids` must hold integers, got torch\.bool"),
        (torch.tensor([1]), 2, 1, ValueError, "`state` must have one row, got 2"),
        (torch.tensor([1]), None, 2, ValueError, "`listeners` must be one for each of 1 .* got 2"),
    ],
)
def test_a_bad_request_ends_no_other(prompt, state, count: int, error: type, message: str) -> None:
    model = LanguageModel(ModelConfig(vocab_size=5, width=8)).eval()
    engine, heard = Engine(model), _Heard()
    engine.submit(Request(torch.tensor([1]), length=3), [heard])
    state = None if state is None else model.init_state(state)
    bad = Request(prompt, length=3, state=state)
    with pytest.raises(error, match=message):
        engine.submit(bad, [_Heard()] * count)
    worker = Worker(engine)
    with pytest.raises(error, match=message):
        worker.submit(bad, [_Heard()] * count)
    while engine.busy:
        time.sleep(0.01)
    worker.close()
    assert (heard.reasons, worker.num_errors) == (["length"], 0)
