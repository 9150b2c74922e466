"""What `train` uses of the process is afterwards its caller's again."""

import copy
import signal
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from test_updates import CONFIG, MODEL, Uneven

from minrnn import checkpoint
from minrnn.models import LanguageModel
from minrnn.runs import text as runs
from minrnn.train import Event, train
from minrnn.train_config import TrainConfig
from tests.training import text_config, write_text


@pytest.fixture(autouse=True)
def _no_state() -> None:
    """Each test begins in a process that has not used Accelerate, and leaves one."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def _train(folder: Path, config: TrainConfig = CONFIG, model: LanguageModel | None = None) -> None:
    checkpoint.write_config(folder, {"model": checkpoint.dataclasses.asdict(MODEL)})
    model = LanguageModel(MODEL) if model is None else model
    train(model, Uneven(), config, folder)


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("fails", [False, True])
def test_the_accelerator_of_the_caller_still_works(tmp_path, precision, fails) -> None:
    ours = Accelerator(cpu=True, mixed_precision="bf16", gradient_accumulation_steps=3)
    layer = torch.nn.Linear(2, 2)
    prepared, optimizer = ours.prepare(layer, torch.optim.SGD(layer.parameters()))
    states = [dict(one._shared_state) for one in (AcceleratorState, GradientState, PartialState)]
    if fails:
        with pytest.raises(ValueError, match="`time_ranks` = 2 must divide"):
            _train(tmp_path, replace(CONFIG, precision=precision, time_ranks=2))
    else:
        _train(tmp_path, replace(CONFIG, precision=precision))
    for one, before in zip((AcceleratorState, GradientState, PartialState), states, strict=True):
        assert one._shared_state == before
    assert (ours.mixed_precision, ours.gradient_accumulation_steps) == ("bf16", 3)
    assert ours.state is not None
    with ours.accumulate(prepared):
        ours.backward(prepared(torch.ones(1, 2)).sum())
        optimizer.step()
    # a second one is made as if there had been no training
    assert Accelerator(cpu=True, mixed_precision="bf16").mixed_precision == "bf16"


def test_a_process_that_has_no_accelerator_has_none_afterwards(tmp_path) -> None:
    _train(tmp_path)
    assert not PartialState._shared_state
    assert Accelerator(cpu=True, mixed_precision="bf16").mixed_precision == "bf16"


def test_random_numbers_go_on_as_if_nothing_was_trained(tmp_path) -> None:
    model = LanguageModel(MODEL)
    torch.manual_seed(1)
    _ = torch.rand(3)
    wanted = torch.rand(3)
    torch.manual_seed(1)
    _ = torch.rand(3)
    _train(tmp_path, model=model)
    assert torch.equal(torch.rand(3), wanted)
    run = runs.start(text_config(write_text(tmp_path / "text.txt"), tmp_path / "run", steps=5))
    torch.manual_seed(1)
    _ = torch.rand(3)
    runs.go_on(run)
    assert torch.equal(torch.rand(3), wanted)


def test_a_model_computes_in_its_own_precision_afterwards(tmp_path) -> None:
    model = LanguageModel(MODEL)
    (tmp_path / "1").mkdir()
    (tmp_path / "2").mkdir()
    _train(tmp_path / "1", replace(CONFIG, precision="bf16"), model)
    assert "forward" not in vars(model)
    ids = torch.randint(7, (2, 5))
    assert torch.equal(copy.deepcopy(model)(ids)[0], model(ids)[0])
    # trained once more, it is float32 that it is trained in
    twin = LanguageModel(MODEL)
    twin.load_state_dict(model.state_dict())
    _train(tmp_path / "2", CONFIG, model)
    (tmp_path / "twin").mkdir()
    _train(tmp_path / "twin", CONFIG, twin)
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_compiled_model_is_saved_as_the_model_inside(tmp_path) -> None:
    model = LanguageModel(MODEL)
    compiled = torch.compile(model, backend="eager")
    _train(tmp_path, CONFIG, compiled)
    loaded = checkpoint.load(tmp_path).model
    for one, other in zip(loaded.parameters(), model.parameters(), strict=True):
        assert torch.equal(one, other)
    _train(tmp_path, replace(CONFIG, steps=8), LanguageModel(MODEL))


def test_nothing_else_of_the_process_changes(tmp_path) -> None:
    handlers = [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)]
    filters, threads = list(warnings.filters), torch.get_num_threads()
    facts = (torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_default_device())
    _train(tmp_path)
    assert [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert (list(warnings.filters), torch.get_num_threads()) == (filters, threads)
    after = (torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_default_device())
    assert after == facts


def test_metrics_can_be_watched(tmp_path) -> None:
    """Each line is in the file when its step is reported."""
    seen = []

    def report(event: Event) -> None:
        lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
        seen.append(len(lines))

    checkpoint.write_config(tmp_path, {"model": checkpoint.dataclasses.asdict(MODEL)})
    train(LanguageModel(MODEL), Uneven(), replace(CONFIG, steps=3, eval_every=3), tmp_path, report)
    # the progress of the validation is reported too
    assert list(dict.fromkeys(seen)) == [1, 2, 3, 4]


@pytest.mark.parametrize(("launcher", "own"), [("bf16", "no"), ("fp16", "bf16"), ("fp8", "no")])
def test_a_precision_that_accelerate_was_asked_for_is_not_ignored(
    tmp_path, monkeypatch, launcher, own
) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launcher)
    with pytest.raises(ValueError, match=f"`precision` must be '{launcher}', as .*, got '{own}'"):
        _train(tmp_path, replace(CONFIG, precision=own))
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    _train(tmp_path, replace(CONFIG, precision=own, steps=1))
