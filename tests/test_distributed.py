"""Time split over processes: values and gradients of the whole, to the last digits of float64."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

import minrnn
from minrnn import MinGRU, MinLSTM, distributed, ops
from minrnn.models import LanguageModel, ModelConfig

B, PART, D = 3, 7, 5


def _part(x: Tensor | None, axis: int = 1) -> Tensor | None:
    """This process's share of the time."""
    if x is None:
        return None
    return x.chunk(dist.get_world_size(), axis)[dist.get_rank()]


def _with_grads(
    run: Callable[..., tuple[Tensor, Tensor]], inputs: list[Tensor], weight: Tensor, last: Tensor
) -> list[Tensor]:
    """Values, and the gradients of the loss sum(weight * y) + sum(last * h_T)."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    y, h_T = run(*inputs)
    ((y * weight).sum() + (h_T * last).sum()).backward()
    return [y.detach(), h_T.detach(), *(x.grad for x in inputs if x.grad is not None)]


def _check_operators() -> None:
    T = PART * dist.get_world_size()
    group = dist.group.WORLD
    for name, gates, options in (
        ("scan", 2, {}),
        ("mingru", 2, {}),
        ("mingru", 2, {"candidate": "tanh"}),
        ("minlstm", 3, {}),
        ("minlstm", 3, {"normalized": False}),
    ):
        for reverse in (False, True):
            for with_reset in (False, True):
                torch.manual_seed(0)
                xs = [torch.randn(B, T, D, dtype=torch.float64) for _ in range(gates)]
                h0 = torch.randn(B, D, dtype=torch.float64)
                weight, last = torch.randn_like(xs[0]), torch.randn_like(h0)
                reset = torch.rand(B, T) < 0.1 if with_reset else None
                rest = {"reverse": reverse, **options}
                whole = getattr(ops, name)
                wanted = _with_grads(
                    lambda *x, whole=whole, rest=rest, reset=reset: whole(*x, reset=reset, **rest),
                    [*xs, h0],
                    weight,
                    last,
                )
                split = getattr(distributed, name)
                first = dist.get_world_size() - 1 if reverse else 0
                found = _with_grads(
                    lambda *x, split=split, rest=rest, reset=reset: split(
                        *x, group=group, reset=_part(reset), **rest
                    ),
                    [*(_part(x) for x in xs), h0],
                    _part(weight),
                    # of the losses of all processes together
                    last / dist.get_world_size(),
                )
                parts = [_part(wanted[0]), wanted[1], *(_part(x) for x in wanted[2:-1])]
                # the gradient of h0 arrives where the sequence begins, zeros elsewhere
                parts.append(wanted[-1] * (dist.get_rank() == first))
                for one, other in zip(found, parts, strict=True):
                    torch.testing.assert_close(one, other, atol=1e-10, rtol=0)


def _check_layers() -> None:
    T = PART * dist.get_world_size()
    for make in (MinGRU, MinLSTM):
        for options in (
            {"batch_first": True, "learn_h0": True},
            {"batch_first": True, "bidirectional": True, "proj_size": 2},
            {"bidirectional": True},
        ):
            torch.manual_seed(0)
            layer = make(4, D, num_layers=2, dtype=torch.float64, **options)
            shape = (B, T) if layer.batch_first else (T, B)
            axis = 1 if layer.batch_first else 0
            x = torch.randn(*shape, 4, dtype=torch.float64)
            reset = torch.rand(shape) < 0.1
            wanted = _of_layer(layer, x, reset)
            distributed.split_time(layer, dist.group.WORLD)
            found = _of_layer(layer, _part(x, axis), _part(reset, axis))
            y, h_n, dx, *grads = found
            torch.testing.assert_close(y, _part(wanted[0], axis), atol=1e-10, rtol=0)
            torch.testing.assert_close(h_n, wanted[1], atol=1e-10, rtol=0)
            torch.testing.assert_close(dx, _part(wanted[2], axis), atol=1e-10, rtol=0)
            _check_sums(grads, wanted[3:])


def _of_layer(layer: Any, x: Tensor, reset: Tensor) -> list[Tensor]:
    x = x.detach().requires_grad_()
    layer.zero_grad(set_to_none=False)
    y, h_n = layer(x, reset=reset)
    h_n = h_n[0] if isinstance(h_n, tuple) else h_n
    share = 1 if layer.time_group is None else dist.get_world_size()
    (y.square().sum() + h_n.square().sum() / share).backward()
    grads = [p.grad.clone() for p in layer.parameters()]
    return [y.detach(), h_n.detach(), x.grad, *grads]


def _check_sums(parts: list[Tensor], wanted: list[Tensor], group: Any = None) -> None:
    """The gradients of all processes add up to those of the whole."""
    for part, whole in zip(parts, wanted, strict=True):
        total = part.clone()
        dist.all_reduce(total, group=group)
        torch.testing.assert_close(total, whole, atol=1e-10, rtol=1e-10)


def _language_model(mixer: str) -> LanguageModel:
    torch.manual_seed(0)
    config = ModelConfig(vocab_size=11, width=8, num_layers=2, mixer=mixer, dropout=0.0)
    return LanguageModel(config).double()


def _check_language_model() -> None:
    """Time split on one dimension of a mesh, the batch on the other."""
    size = dist.get_world_size()
    shape = (size // 2, 2) if size > 2 else (1, size)
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("data", "time"))
    group = mesh.get_group("time")
    row, column = mesh.get_local_rank("data"), mesh.get_local_rank("time")
    for mixer in ("mingru", "minlstm", "none"):
        model = _language_model(mixer)
        ids = torch.randint(
            11, (4, PART * shape[1] + 1), generator=torch.Generator().manual_seed(1)
        )
        state = model(ids[:, :5])[1].map(torch.Tensor.detach)

        def loss(x: Tensor, target: Tensor, state: Any, model: nn.Module = model) -> Any:
            logits, last = model(x, state)
            return nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten()), last

        whole, wanted_last = loss(ids[:, :-1], ids[:, 1:], state)
        wanted = torch.autograd.grad(whole, list(model.parameters()), materialize_grads=True)
        distributed.split_time(model, group)
        rows = torch.arange(4).chunk(shape[0])[row]
        x, target = (y[rows].chunk(shape[1], 1)[column] for y in (ids[:, :-1], ids[:, 1:]))
        part, last = loss(x, target, state.select(rows))
        grads = torch.autograd.grad(part / size, list(model.parameters()), materialize_grads=True)
        _check_sums(list(grads), list(wanted))
        for name, found in last.flatten().items():
            wanted_part = wanted_last.flatten()[name][rows]
            torch.testing.assert_close(found, wanted_part, atol=1e-10, rtol=0)


def _check_bytes() -> None:
    """What is exchanged does not depend on how long the sequence is."""
    counts = []
    for T in (16, 1024):
        model = distributed.split_time(_language_model("mingru"), dist.group.WORLD)
        ids = torch.zeros(2, T, dtype=torch.long)
        with _Exchanged() as exchanged:
            model(ids)[0].sum().backward()
        counts.append(exchanged.bytes)
    assert counts[0] == counts[1] > 0
    # in each of two layers a decay and an end for each channel, forward, and two gradients
    # backward; and the convolution's three steps, and gradients of them and of the last of all
    D = 8 * model.config.expansion
    assert counts[0] == 2 * 8 * (4 * 2 * D + 3 * 3 * 2 * 8)


class _Exchanged:
    """Bytes that this process told the others."""

    def __enter__(self) -> "_Exchanged":
        self.bytes, self.original = 0, dist.all_gather

        def counted(out: list[Tensor], x: Tensor, **options: Any) -> Any:
            self.bytes += x.numel() * x.element_size()
            return self.original(out, x, **options)

        dist.all_gather = counted
        return self

    def __exit__(self, *error: object) -> None:
        dist.all_gather = self.original


def _check_all() -> None:
    _check_operators()
    _check_layers()
    _check_language_model()
    _check_bytes()


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_split_sequence_is_the_whole_one(ranks) -> None:
    on_ranks(ranks, _check_all)


@pytest.mark.parametrize("mixer", ["attention", "mamba", "s4d", "aaren", "gru"])
def test_what_cannot_be_split_is_named(mixer) -> None:
    config = ModelConfig(vocab_size=5, width=8, num_layers=1, num_heads=1, mixer=mixer)
    with pytest.raises(ValueError, match=r"`model` must mix over time by .* its part 'blocks\.0"):
        distributed.split_time(LanguageModel(config), None)


def test_packed_sequences_are_refused() -> None:
    layer = minrnn.MinGRU(4, 5)
    layer.time_group = object()
    packed = nn.utils.rnn.pack_sequence([torch.randn(3, 4)])
    with pytest.raises(ValueError, match="`input` must not be packed"):
        layer(packed)
