"""What `minrnn.save` takes comes back by `minrnn.load` as it was; all else is refused unwritten."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import minrnn
from minrnn.data.tokenizers import BPE, Bytes, Characters
from minrnn.decision import DecisionConfig, DecisionModel
from minrnn.models import LanguageModel, ModelConfig
from minrnn.packing import pack_model

IDS = torch.tensor([[0, 2, 1, 1], [2, 2, 0, 1]])


def _model(**fields: object) -> LanguageModel:
    return LanguageModel(ModelConfig(vocab_size=3, width=12, num_layers=2, **fields)).eval()


def _changed(change: Callable[[LanguageModel], object]) -> LanguageModel:
    model = _model()
    change(model)
    return model


def _logits(model: nn.Module) -> Tensor:
    # parts of several dtypes meet under autocast only
    several = len({x.dtype for x in model.parameters()}) > 1
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=several):
        return model(IDS)[0]


def _halve_matrices(model: LanguageModel) -> None:
    for part in model.modules():
        if isinstance(part, nn.Linear):
            part.bfloat16()


def _share_block(model: LanguageModel) -> None:
    model.blocks[1] = model.blocks[0]


MADE: dict[str, Callable[[], nn.Module]] = {
    "float64": lambda: _model(mixer="minlstm").double(),
    "bfloat16": lambda: _model(mixer="mamba").bfloat16(),
    "float16-S4D": lambda: _model(mixer="s4d").half(),
    "matrices-in-half": lambda: _changed(_halve_matrices),
    "norms-in-float": lambda: _changed(lambda m: (m.bfloat16().norm.float(), m.head.float())),
    "tied": lambda: _changed(lambda m: setattr(m.head, "weight", m.embedding.weight)),
    "one-block-twice": lambda: _changed(_share_block),
    "compiled": lambda: torch.compile(_model(), backend="eager"),
    "part-compiled": lambda: _changed(
        lambda m: setattr(m, "norm", torch.compile(m.norm, backend="eager"))
    ),
    "DataParallel": lambda: nn.DataParallel(_model()),
    "both": lambda: torch.compile(nn.DataParallel(_model()), backend="eager"),
}


# torch's, of its slower kernel
@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
@pytest.mark.parametrize("make", MADE.values(), ids=MADE)
def test_what_is_saved_comes_back_as_it_was(make: Callable[[], nn.Module], tmp_path: Path) -> None:
    model = make()
    state = torch.get_rng_state()
    minrnn.save(tmp_path, model)
    assert torch.get_rng_state().equal(state)
    loaded = minrnn.load(tmp_path).model
    assert _logits(loaded).equal(_logits(model))
    own, theirs = list(model.state_dict().values()), list(loaded.state_dict().values())
    assert [x.dtype for x in theirs] == [x.dtype for x in own]
    assert all(x.equal(y) for x, y in zip(own, theirs, strict=True))
    assert len(list(loaded.parameters())) == len(list(model.parameters()))


def test_buffers_keep_their_dtype(tmp_path: Path) -> None:
    model = DecisionModel(DecisionConfig(observation_size=2, action_size=1)).bfloat16()
    model.observation_mean = torch.tensor([1e-3, 1 + 1e-3])
    minrnn.save(tmp_path, model)
    loaded = minrnn.load(tmp_path).model
    assert loaded.observation_mean.equal(model.observation_mean)
    assert loaded.head.weight.dtype == loaded.observation_std.dtype == torch.bfloat16


def test_a_model_inside_ddp_is_saved(tmp_path: Path) -> None:
    torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=_store(tmp_path))
    try:
        model = _model()
        minrnn.save(tmp_path / "run", nn.parallel.DistributedDataParallel(model))
    finally:
        torch.distributed.destroy_process_group()
    assert _logits(minrnn.load(tmp_path / "run").model).equal(_logits(model))


def _store(folder: Path) -> torch.distributed.FileStore:
    return torch.distributed.FileStore(str(folder / "store"), 1)


class _Twice(LanguageModel):
    def forward(self, ids: Tensor, state=None):
        return super().forward(ids, super().forward(ids, state)[1])


REFUSED: dict[str, tuple[Callable[[], nn.Module], type, str]] = {
    "module": (lambda: nn.Linear(2, 2), TypeError, "LanguageModel or DecisionModel, .* got Linear"),
    "packed": (lambda: pack_model(_model()), TypeError, "must be a LanguageModel .* PackedModel"),
    "packed-parts": (
        lambda: pack_model(_model(mixer="gru")),
        ValueError,
        r"blocks\.0\.conv\.pointwise\.weight must be \(12, 12\), got nothing",
    ),
    "head": (
        lambda: _changed(lambda m: setattr(m, "head", nn.Linear(12, 4))),
        ValueError,
        r"head\.weight must be \(3, 12\), got \(4, 12\)",
    ),
    "norm": (
        lambda: _changed(lambda m: setattr(m, "norm", nn.LayerNorm(12, bias=False))),
        ValueError,
        "norm must be RMSNorm, got LayerNorm",
    ),
    "candidate": (
        lambda: _changed(lambda m: setattr(m.blocks[0].mixer.rnn, "candidate", "tanh")),
        ValueError,
        r"blocks\.0\.mixer\.rnn\.candidate must be g, got tanh",
    ),
    "eps": (
        lambda: _changed(lambda m: setattr(m.norm, "eps", 0.5)),
        ValueError,
        r"norm\.eps must be None, got 0\.5",
    ),
    "parametrized": (
        lambda: _changed(lambda m: nn.utils.parametrizations.weight_norm(m.head)),
        ValueError,
        r"head\.weight must be \(3, 12\), got nothing",
    ),
    "more": (
        lambda: _changed(lambda m: setattr(m, "extra", nn.Linear(2, 2))),
        ValueError,
        r"extra\.weight must be absent, got \(2, 2\)",
    ),
    "subclass": (lambda: _Twice(_model().config), ValueError, "its forward is another"),
    "meta": (lambda: _model().to("meta"), ValueError, "must have weights, .* on the device meta"),
}


@pytest.mark.parametrize(("make", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_other_models_are_refused_unwritten(make, error: type, message: str, tmp_path) -> None:
    minrnn.save(tmp_path / "run", before := _model())
    for folder in ("run", "new"):
        with pytest.raises(error, match=message):
            minrnn.save(tmp_path / folder, make())
    assert not (tmp_path / "new").exists()
    assert _logits(minrnn.load(tmp_path / "run").model).equal(_logits(before))


def test_sharded_weights_are_refused(tmp_path: Path) -> None:
    torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=_store(tmp_path))
    try:
        model = _model()
        mesh = torch.distributed.init_device_mesh("cpu", (1,))
        torch.distributed.fsdp.fully_shard(model, mesh=mesh)
        with pytest.raises(ValueError, match=r"must be whole in this process, .* is sharded"):
            minrnn.save(tmp_path / "run", model)
    finally:
        torch.distributed.destroy_process_group()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("tokenizer", "error", "message"),
    [
        (Characters("abcd"), ValueError, "must have the model's V = 3 symbols, got 4"),
        (Bytes(), ValueError, "must have the model's V = 3 symbols, got 256"),
        (BPE(["a b"]), ValueError, "must have the model's V = 3 symbols, got 257"),
        ("abc", TypeError, "`tokenizer` must be Characters, Bytes or BPE of minrnn, got str"),
    ],
)
def test_other_tokenizers_are_refused(tokenizer, error: type, message: str, tmp_path) -> None:
    with pytest.raises(error, match=message):
        minrnn.save(tmp_path / "run", _model(), tokenizer)
    assert not (tmp_path / "run").exists()
    decisions = DecisionModel(DecisionConfig(observation_size=2, action_size=1))
    with pytest.raises((ValueError, TypeError), match=r"`tokenizer` (belongs|must be)"):
        minrnn.save(tmp_path / "run", decisions, tokenizer)


def test_a_model_of_several_dtypes_is_not_packed_as_one() -> None:
    model = _changed(_halve_matrices)
    packed = pack_model(model)
    assert _logits(packed).equal(_logits(model))
    assert [x.dtype for x in packed.parameters()] == [x.dtype for x in model.parameters()]
