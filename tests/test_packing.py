"""Packed weights: the same model, and no row depends on the others, to the bit."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import minrnn
from minrnn.ops.rows import can_run_model, linear_rows, pack
from minrnn.packing import PackedModel, PackedWeight, num_weight_bytes, pack_model


@pytest.mark.parametrize("shape", [(1, 1), (31, 5), (32, 64), (33, 7), (100, 96), (513, 300)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_a_packed_product_is_the_product(shape, dtype) -> None:
    N, K = shape
    weight, bias = torch.randn(N, K), torch.randn(N)
    packed = pack(weight, dtype)
    rounded = weight.to(torch.bfloat16).double() if dtype == "bfloat16" else weight.double()
    if dtype == "int8":
        scale = weight.abs().amax(1, keepdim=True).double() / 127
        rounded = (weight / scale.float()).round().double() * scale
        assert (rounded - weight).abs().max() <= 0.5001 * scale.max()
    for M in (1, 2, 3, 4, 5, 9):
        x = torch.randn(M, K)
        expected = F.linear(x.double(), rounded, bias.double())
        # a sum of K products in float32
        tolerance = 1e-6 * K**0.5 * (1 + rounded.abs().max().item())
        torch.testing.assert_close(
            linear_rows(x, packed, bias).double(), expected, rtol=1e-5, atol=tolerance
        )
        torch.testing.assert_close(linear_rows(x, packed), linear_rows(x, packed, 0 * bias))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_no_row_of_a_product_depends_on_the_others(dtype) -> None:
    packed, x = pack(torch.randn(200, 130), dtype), torch.randn(70, 130)
    whole = linear_rows(x, packed)
    threads = torch.get_num_threads()
    try:
        for torch_threads in (1, 2):
            torch.set_num_threads(torch_threads)
            for M in (1, 2, 3, 4, 5, 8, 33, 69):
                rows = torch.randperm(70)[:M]
                assert torch.equal(linear_rows(x[rows], packed), whole[rows])
    finally:
        torch.set_num_threads(threads)


def test_strides_and_dimensions() -> None:
    weight = torch.randn(40, 6)
    x = torch.randn(3, 6, 5).transpose(1, 2)
    torch.testing.assert_close(linear_rows(x, pack(weight)), x @ weight.T)
    assert linear_rows(torch.randn(0, 6), pack(weight)).shape == (0, 40)


@pytest.mark.parametrize("mixer", ["mingru", "minlstm"])
@pytest.mark.parametrize("weights", ["float32", "int8"])
def test_no_row_of_a_model_depends_on_the_others(mixer, weights) -> None:
    # widths that are no multiples of a vector, lengths of prompts and of steps
    config = minrnn.ModelConfig(vocab_size=37, width=44, num_layers=2, mixer=mixer)
    model = pack_model(minrnn.LanguageModel(config), weights)
    with torch.no_grad():
        _, state = model(torch.randint(37, (70, 5)))
        for T in (1, 19):
            ids = torch.randint(37, (70, T))
            whole, after = model(ids, state)
            for M in (1, 2, 3, 7, 16, 33, 64):
                rows = torch.randperm(70)[:M]
                logits, last = model(ids[rows], state.select(rows))
                assert torch.equal(logits, whole[rows])
                for name, x in last.flatten().items():
                    assert torch.equal(x, after.flatten()[name][rows])


@pytest.mark.parametrize("mixer", ["mingru", "minlstm"])
@pytest.mark.parametrize("fields", [{}, {"conv_width": 0}, {"mlp_ratio": 0, "conv_width": 1}])
@pytest.mark.parametrize("candidate", ["g", "identity", "tanh"])
def test_a_packed_model_does_not_depend_on_the_cuts(mixer, fields, candidate) -> None:
    config = minrnn.ModelConfig(
        vocab_size=37, width=24, num_layers=2, mixer=mixer, candidate=candidate, **fields
    )
    model = minrnn.LanguageModel(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    packed, ids = pack_model(model), torch.randint(37, (3, 21))
    whole, last = packed(ids)
    expected, state = model(ids)
    torch.testing.assert_close(whole, expected, rtol=1e-3, atol=1e-4)
    for cuts in ((1,) * 21, (5, 16), (20, 1), (2, 3, 4, 12)):
        after, parts = None, []
        for piece in ids.split(cuts, dim=1):
            logits, after = packed(piece, after)
            parts.append(logits)
        assert after is not None
        assert torch.equal(torch.cat(parts, dim=1), whole)
        for name, x in last.flatten().items():
            assert torch.equal(after.flatten()[name], x)
    # either model goes on from the other's state
    assert {k: x.shape for k, x in last.flatten().items()} == {
        k: x.shape for k, x in state.flatten().items()
    }
    torch.testing.assert_close(packed(ids, state)[0], model(ids, last)[0], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("normalized", [True, False])
def test_both_forms_of_minlstm_are_packed(normalized) -> None:
    config = minrnn.ModelConfig(
        vocab_size=9, width=16, num_layers=1, mixer="minlstm", normalized=normalized
    )
    model, ids = minrnn.LanguageModel(config).eval(), torch.randint(9, (2, 30))
    torch.testing.assert_close(pack_model(model)(ids)[0], model(ids)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mixer", ["mingru", "minlstm", "mamba", "lstm"])
def test_a_packed_model_is_the_model(mixer) -> None:
    config = minrnn.ModelConfig(vocab_size=37, width=48, num_layers=2, mixer=mixer)
    model = minrnn.LanguageModel(config).eval()
    before = copy.deepcopy(model.state_dict())
    packed, ids = pack_model(model), torch.randint(37, (3, 20))
    torch.testing.assert_close(packed(ids)[0], model(ids)[0], rtol=1e-4, atol=1e-5)
    for name, x in model.state_dict().items():
        assert torch.equal(x, before[name])
    assert all(p.requires_grad for p in model.parameters())
    size = [num_weight_bytes(pack_model(model, dtype)) for dtype in ("float32", "bfloat16", "int8")]
    assert size[0] > size[1] > size[2]
    if mixer == "mingru":
        # all but the embedding; packed to whole panels
        assert num_weight_bytes(model) == sum(
            4 * x.numel() for name, x in before.items() if name != "embedding.weight"
        )
        assert 1 <= size[0] / num_weight_bytes(model) < 1.25


@pytest.mark.parametrize("mixer", ["mingru", "minlstm", "mamba", "lstm"])
def test_a_packed_model_keeps_its_weights_when_the_model_is_trained_on(mixer) -> None:
    model = minrnn.LanguageModel(minrnn.ModelConfig(vocab_size=9, width=16, mixer=mixer)).eval()
    packed, ids = pack_model(model), torch.randint(9, (2, 5))
    before = packed(ids)[0]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    assert torch.equal(packed(ids)[0], before)


@pytest.mark.parametrize("mixer", ["mingru", "minlstm"])
def test_a_state_of_another_model_is_named(mixer) -> None:
    fields = {"vocab_size": 9, "width": 16, "mixer": mixer}
    ids = torch.randint(9, (2, 5))
    packed, deeper = (
        pack_model(minrnn.LanguageModel(minrnn.ModelConfig(num_layers=n, **fields))) for n in (1, 2)
    )
    with pytest.raises(ValueError, match=r"whose part '1\..*' has shape None a row, got \("):
        packed(ids, deeper(ids)[1])
    with pytest.raises(ValueError, match=r"whose part '1\..*' has shape \(.*\) a row, got None"):
        deeper(ids, packed(ids)[1])


def test_other_dtypes_stay_as_they_are() -> None:
    model = minrnn.LanguageModel(minrnn.ModelConfig(vocab_size=5, width=8)).double()
    packed = pack_model(model)
    assert isinstance(packed.head.weight, torch.nn.Parameter)
    ids = torch.randint(5, (2, 3))
    assert torch.equal(packed(ids)[0], model.eval()(ids)[0])


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ValueError, match=r"`weight` must have shape \(N, K\), got \(3,\)"):
        pack(torch.ones(3))
    with pytest.raises(TypeError, match=r"`weight` must be float32, got torch.float64"):
        pack(torch.ones(3, 3, dtype=torch.float64))
    with pytest.raises(ValueError, match="`dtype` must be float32, bfloat16 or int8, got 'int4'"):
        pack(torch.ones(3, 3), "int4")
    with pytest.raises(TypeError, match="packed weights can only be multiplied by"):
        torch.add(PackedWeight(torch.ones(3, 3)), 1)
    packed = pack_model(minrnn.LanguageModel(minrnn.ModelConfig(vocab_size=5, width=8)))
    with pytest.raises(RuntimeError, match=r"`ids` must be in \[0, 5\), got 7"):
        packed(torch.tensor([[1, 7]]))
    ids = torch.zeros(2, 2, dtype=torch.long)
    for batch_size in (0, 1, 3):
        with pytest.raises(
            ValueError, match=f"`state` must have batch size B = 2, got {batch_size}"
        ):
            packed(ids, packed.init_state(batch_size))
    with pytest.raises(ValueError, match=r"`ids` must have shape \(B, T\) with T >= 1"):
        packed(torch.tensor([1]))
    with pytest.raises(TypeError, match=r"`ids` must hold integers, got torch\.float32"):
        packed(torch.ones(1, 1))


# 5 columns take as many packed groups of four bytes as 7 do
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_product_of_other_sizes_is_refused(dtype) -> None:
    weight, x = pack(torch.randn(4, 7), dtype), torch.randn(2, 7)
    for wrong in (torch.randn(1, 5), torch.randn(1, 8), torch.tensor(1.0)):
        with pytest.raises(ValueError, match=r"`x` must have shape \(\.\.\., K\), K = 7, got"):
            linear_rows(wrong, weight)
    with pytest.raises(ValueError, match=r"`bias` must have shape \(N,\) = \(4,\), got \(1,\)"):
        linear_rows(x, weight, torch.ones(1))
    with pytest.raises(TypeError, match=r"`x` must be float32, got torch\.float64"):
        linear_rows(x.double(), weight)
    with pytest.raises(RuntimeError, match=r"`x` must have shape \(M, K\), K = 7"):
        torch.ops.minrnn.linear_rows(x[:, :5], weight.panels, weight.scale, None, 4, 7)
    assert linear_rows(x[:0], weight).shape == (0, 4)


class _Adapted(nn.Linear):
    """A layer with the weights of another, and more."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def _adapt(model: minrnn.LanguageModel) -> None:
    model.head.__class__ = _Adapted


def _hook(model: minrnn.LanguageModel) -> None:
    model.blocks[0].register_forward_hook(lambda module, args, out: (2 * out[0], out[1]))


def _parametrize(model: minrnn.LanguageModel) -> None:
    nn.utils.parametrizations.weight_norm(model.head)


def _set_eps(model: minrnn.LanguageModel) -> None:
    model.norm.eps = 0.5


def _set_options(model: minrnn.LanguageModel) -> None:
    rnn = getattr(model.blocks[0].mixer, "rnn", None)
    if isinstance(rnn, minrnn.MinGRU):
        rnn.candidate = "tanh"
    if isinstance(rnn, minrnn.MinLSTM):
        rnn.normalized = False


@pytest.mark.parametrize("edit", [_adapt, _hook, _parametrize, _set_eps, _set_options])
@pytest.mark.parametrize("mixer", ["mingru", "minlstm", "lstm"])
def test_an_edited_model_is_packed_with_its_edits(mixer, edit) -> None:
    model = minrnn.LanguageModel(minrnn.ModelConfig(vocab_size=5, width=8, mixer=mixer)).eval()
    plain, ids = pack_model(model), torch.randint(5, (2, 6))
    edit(model)
    packed = pack_model(model)
    torch.testing.assert_close(packed(ids)[0], model(ids)[0], atol=1e-5, rtol=1e-4)
    assert isinstance(plain, PackedModel) == (mixer != "lstm" and can_run_model(ids.device))
    assert not isinstance(packed, PackedModel)


def test_a_packed_model_loads_no_weights() -> None:
    model = minrnn.LanguageModel(minrnn.ModelConfig(vocab_size=5, width=8)).eval()
    packed = PackedModel(model)
    with pytest.raises(TypeError, match="a PackedModel loads no weights: load them into the model"):
        packed.load_state_dict(packed.state_dict())
