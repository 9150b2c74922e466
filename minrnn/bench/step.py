"""How long does one step take where a stream is served symbol by symbol?"""

from collections.abc import Callable, Iterator
from copy import deepcopy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from minrnn.bench import measure, peers, truth
from minrnn.bench.compare import Checked, Entrant, Table, check, timed_rows
from minrnn.bench.measure import Call
from minrnn.layers import MinGRU, MinGRUCell, MinLSTM, MinLSTMCell

# (B, T, D) with features = channels
SHAPES = ((1, 1, 256), (64, 1, 256))
QUICK_SHAPES = SHAPES[:1]
CELLS: tuple[tuple[Callable[..., nn.Module], ...], ...] = (
    (MinGRUCell, nn.GRUCell, MinGRU, nn.GRU),
    (MinLSTMCell, nn.LSTMCell, MinLSTM, nn.LSTM),
)
# whose state is a pair
PAIRED = (nn.LSTM, nn.LSTMCell, MinLSTM, MinLSTMCell)
SECONDS, QUICK_SECONDS = 2.0, 0.2


def measured(quick: bool = False, device: torch.device = measure.CPU) -> Iterator[Table]:
    """Tables of one step from a state, in inference mode: cells, and layers with T = 1.

    Args:
        quick: one stream only, fewer rounds.
        device: where.
    """
    for kinds in CELLS:
        for shape in QUICK_SHAPES if quick else SHAPES:
            checked = dict(_checked(kind, shape, device) for kind in kinds)
            seconds = QUICK_SECONDS if quick else SECONDS
            rows = timed_rows(checked, lambda calls: Call(calls.forward), {}, {}, seconds, device)
            yield Table(f"{next(iter(checked))} in inference mode", shape, "ms", rows)


def _checked(kind: Any, shape: tuple[int, int, int], device: torch.device) -> tuple[str, Checked]:
    B, _, width = shape
    torch.manual_seed(0)
    module = kind(width, width).to(device)
    x, h = torch.randn(B, width).to(device), torch.rand(B, width).to(device)
    name = kind.__name__ if kind.__module__.startswith("minrnn") else f"nn.{kind.__name__}"
    name += "" if name.endswith("Cell") else ", T = 1"
    load = partial(_bind, module, x, h)
    return name, check(Entrant(name, load, lambda: [_answer(module, x, h)]))


def _bind(module: nn.Module, x: Tensor, h: Tensor) -> peers.Calls:
    """One step as a loop over steps has it: states come as they went."""
    cell = hasattr(module, "weight_ih")
    x, h = (x, h) if cell else (x[None], h[None])
    state: Any = (h, h.clone()) if isinstance(module, PAIRED) else h

    def forward() -> Any:
        with torch.inference_mode():
            return module(x, state)

    def read(result: Any) -> list[Tensor]:
        # a cell gives h or (h, c), a layer y and one of these
        y = result if isinstance(result, Tensor) else result[0]
        return [y.clone() if cell else y[0].clone()]

    return peers.Calls(forward, forward, read)


def _answer(module: Any, x: Tensor, h: Tensor) -> Tensor:
    """h after the step in float64: ours by its equation, torch's by its cell."""
    end = "" if hasattr(module, "weight_ih") else "_l0"
    x, h = x.double(), h.double()
    if isinstance(module, (MinGRU, MinGRUCell, MinLSTM, MinLSTMCell)):
        name, gates = peers.our_gates(deepcopy(module).double(), x, end)
        a, b = truth.coefficients(name, gates)
        return a * h + b
    kind = nn.LSTMCell if isinstance(module, PAIRED) else nn.GRUCell
    cell = kind(x.shape[1], h.shape[1], device=x.device, dtype=torch.float64)
    cell.load_state_dict({name.removesuffix("_l0"): w for name, w in module.state_dict().items()})
    return cell(x, (h, h))[0] if kind is nn.LSTMCell else cell(x, h)
