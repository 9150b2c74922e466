"""How fast does a packed batch of unequal lengths train, beside nn.GRU and nn.LSTM?"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence, unpack_sequence

from minrnn.bench import measure, peers, truth
from minrnn.bench.compare import Checked, Entrant, Table, check, timed_rows
from minrnn.bench.measure import Call
from minrnn.layers import MinGRU, MinLSTM

# sequences, their shortest and longest, and features = channels of each direction
SIZES, QUICK_SIZES = (64, 20, 2000, 256), (16, 20, 200, 64)
# each layer is held to float64 on so many of the shortest
CHECKED = 8
PAIRS: tuple[tuple[type, type], ...] = ((MinGRU, nn.GRU), (MinLSTM, nn.LSTM))
SECONDS, QUICK_SECONDS = 30.0, 1.0


def measured(quick: bool = False, device: torch.device = measure.CPU) -> Iterator[Table]:
    """Tables of forward with backward through two bidirectional layers, all sequences packed.

    Args:
        quick: fewer and shorter sequences.
        device: where.
    """
    B, low, high, width = QUICK_SIZES if quick else SIZES
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(low, high + 1, (B,), generator=generator).tolist()
    series = [torch.randn(T, width, generator=generator).to(device) for T in lengths]
    few = sorted(series, key=len)[:CHECKED]
    memory = measure.tell_allocator(keep=True) if device.type == "cpu" else ""
    for ours, theirs in PAIRS:
        checked: dict[str, Checked] = {}
        for kind in (ours, theirs):
            name = kind.__name__ if kind is ours else f"nn.{kind.__name__}"
            layer = _build(kind, width).to(device)
            right = check(Entrant(name, partial(_bind, layer, few), partial(_answer, layer, few)))
            calls = None if right.calls is None else _bind(layer, series)
            checked[name] = right._replace(calls=calls)
        steps, longest = sum(lengths), max(lengths)
        rows = timed_rows(checked, _both, {}, {}, QUICK_SECONDS if quick else SECONDS, device)
        notes = [f"{steps / row.value * 1e3:,.0f} steps/s" if row.value else "" for row in rows]
        rows = tuple(replace(r, note=r.note or n) for r, n in zip(rows, notes, strict=True))
        title = f"{ours.__name__} packed, {min(lengths)} to {longest} steps, "
        title += f"{steps / (B * longest):.0%} of the padded batch; 2 layers, 2 directions"
        yield Table(title, (B, longest, width), "ms", rows, memory)


def _both(calls: peers.Calls) -> Call:
    return Call(calls.both)


def _build(kind: Callable[..., nn.Module], width: int) -> nn.Module:
    torch.manual_seed(0)
    return kind(width, width, num_layers=2, bidirectional=True)


def _cotangent(data: Tensor, width: int) -> Tensor:
    """Of the output; the same for the same steps, whichever sequence they stand in."""
    return torch.cos(torch.arange(width, dtype=data.dtype) * data[:, :1])


def _bind(layer: nn.Module, series: Sequence[Tensor]) -> peers.Calls:
    """Calls of the layer on the packed series; the gradients are those of x and every weight."""
    packed = pack_sequence(list(series), enforce_sorted=False)
    leaf = packed.data.clone().requires_grad_()
    leaves = [leaf, *layer.parameters()]
    cotangent = _cotangent(packed.data, 2 * packed.data.shape[1])

    def forward() -> PackedSequence:
        with torch.no_grad():
            return layer(packed)[0]

    def both() -> tuple[Any, ...]:
        output = layer(packed._replace(data=leaf))[0]
        return output, *torch.autograd.grad(output.data, leaves, cotangent)

    def read(result: Any) -> list[Tensor]:
        # series by series, as they would come one at a time
        if isinstance(result, PackedSequence):
            return [torch.cat(unpack_sequence(result)).detach()]
        output, dx, *grads = result
        dx = torch.cat(unpack_sequence(packed._replace(data=dx)))
        return [torch.cat(unpack_sequence(output)).detach(), dx, *grads]

    return peers.Calls(forward, both, read)


def _answer(layer: nn.Module, series: Sequence[Tensor]) -> list[Tensor]:
    """Output and gradients in float64, each sequence alone; ours by its equation."""
    wide = _build(type(layer), series[0].shape[1]).to(series[0].device).double()
    wide.load_state_dict(layer.state_dict())
    leaf = torch.cat(list(series)).double().requires_grad_()
    outputs = [_alone(wide, x) for x in leaf.split([len(x) for x in series])]
    y = torch.cat(outputs)
    cotangent = _cotangent(torch.cat(list(series)), y.shape[1]).double()
    grads = torch.autograd.grad(y, [leaf, *wide.parameters()], cotangent)
    return [y.detach(), *grads]


def _alone(layer: Any, x: Tensor) -> Tensor:
    """The output of one sequence (T, width); no kernel of ours computes it."""
    if not isinstance(layer, (MinGRU, MinLSTM)):
        return layer(x)[0]
    for n in range(layer.num_layers):
        directions = []
        for end in ("", "_reverse"):
            turned = x.flip(0) if end else x
            h = truth.recurrence64(*peers.our_gates(layer, turned[None], f"_l{n}{end}"))[0]
            directions.append(h.flip(0) if end else h)
        x = torch.cat(directions, dim=1)
    return x
