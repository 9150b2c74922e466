"""Direct calls of `torch.ops.minrnn`: an error or the right numbers, never foreign memory."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import FUSED, GATES
from torch import Tensor

from minrnn.ops import operators, rows, selective

OPS = torch.ops.minrnn
FUZZ = Path(__file__).parent / "fuzz_operators.py"


# in a process of its own, so that a crash is a failure and not the end; `make sanitize` runs more
def test_spoiled_arguments_are_refused_or_harmless(tmp_path: Path) -> None:
    log = tmp_path / "round"
    log.touch()
    command = [sys.executable, str(FUZZ), "--rounds", "300", "--log", str(log)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"round {log.read_text()}: {done.stdout}{done.stderr}"
    assert " 0 wrong" in done.stdout


def _model(**changes) -> tuple:
    nothing = torch.empty(0)
    one, gates, down, head = (
        torch.ones(4),
        *(rows.pack(torch.randn(*size)).panels for size in ((4, 4), (4, 2), (3, 4))),
    )
    weights = [*[nothing] * 5, one, gates, *[nothing] * 2, down, *[nothing] * 9]
    args = {
        "ids": torch.zeros(1, 2, dtype=torch.long),
        "embedding": torch.randn(3, 4),
        "weights": [*weights, one, head, nothing, nothing],
        "states": [torch.zeros(1, 2), nothing],
        "sizes": [2, 2, 0, 0],
        "candidate": "g",
        "normalized": True,
    }
    return tuple((args | changes).values())


def test_model_refuses_what_is_not_its_own() -> None:
    assert OPS.run_model(*_model())[0].shape == (1, 2, 3)
    weights = _model()[2]
    for changes, message in (
        ({"weights": [torch.zeros(1)], "states": []}, "a norm and a head at least"),
        ({"weights": weights[:-3]}, "are|packed|weights"),
        ({"weights": [*weights, weights[0]]}, "`|packed|weights"),
        ({"candidate": "relu"}, "`candidate` must be one of 'g', 'identity', 'tanh', got relu"),
        ({"sizes": [2, 4, 0, 0]}, "2 or 3 gates"),
        ({"sizes": [2, 2, 0]}, "`sizes` must be four"),
        ({"sizes": [-2, 2, 0, 0]}, "D >= 1"),
        ({"sizes": [2, 2, 1 << 62, 0]}, "conv_width >= 0"),
        ({"states": [torch.zeros(2, 2), torch.empty(0)]}, "`states` must be contiguous"),
        ({"states": [torch.zeros(1, 2)]}, "two states for each block"),
        ({"ids": torch.full((1, 2), 3)}, r"`ids` must be in \[0, 3\), got 3"),
        ({"ids": torch.zeros(1, 0, dtype=torch.long)}, "B >= 1, T >= 1"),
    ):
        with pytest.raises(RuntimeError, match=message):
            OPS.run_model(*_model(**changes))


def test_freed_memory_is_refused() -> None:
    x, freed = torch.zeros(1, 4, 3), torch.zeros(1, 4, 3)
    freed.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="its storage is too small for its shape"):
        OPS.mingru(x, freed, None, "g", None, None, False)
    with pytest.raises(RuntimeError, match="its storage is too small for its shape"):
        OPS.scan_backward(x, x[:, 0], freed, None, x, None, None, False)


def _spoiled_recurrences() -> list[tuple[str, tuple]]:
    x, state = torch.zeros(1, 4, 6), torch.zeros(1, 6)
    bounds = torch.tensor([0, 9, 4])
    calls: list[tuple[str, tuple]] = []
    for name in GATES:
        gates = [x] * len(GATES[name])
        options = {"scan": (), "mingru": ("g",), "minlstm": ("g", True)}[name]
        saved = gates[:1] if name == "scan" else gates
        calls += [
            (name, (*gates[:-1], x[:, :1], None, *options, None, None, False)),
            (name, (*gates[:-1], x.double(), None, *options, None, None, False)),
            (name, (*gates, state[:, :5], *options, None, None, False)),
            (name, (*gates, None, *options, x[..., 0], None, False)),
            (name, (*gates, None, *options, None, bounds, False)),
            (name, (*gates, None, *options, None, bounds.float(), False)),
            (f"{name}_backward", (x, state[0], *saved, None, x, *options, None, None, False)),
            (f"{name}_backward", (x[:, 1:], state, *saved, None, x, *options, None, None, False)),
        ]
    for name, plain in FUSED.items():
        options = ("relu", False) if plain == "mingru" else ("relu", True, False)
        calls += [(name, (x, None, *options, None, None, False))]
        calls += [(name, (x[..., :5], None, "g", *options[1:], None, None, False))]
    return calls


@pytest.mark.filterwarnings("ignore:minrnn runs on pure torch")
@pytest.mark.parametrize(("name", "args"), _spoiled_recurrences())
def test_every_backend_refuses_the_same(name: str, args: tuple) -> None:
    by_name = {op.name: op.forward for op in operators.OPERATORS}
    by_name |= {f"{op.name}_backward": op.backward for op in operators.OPERATORS}
    pure_torch = operators._pure_torch(name, by_name[name])
    kinds = (RuntimeError, ValueError, TypeError)
    for run in (getattr(OPS, name), pure_torch):
        with pytest.raises(kinds, match="must"):
            run(*args)
    if args[-2] is None or args[-2].is_floating_point():
        meta = [x.to("meta") if isinstance(x, Tensor) else x for x in args]
        with pytest.raises(kinds, match="must"):
            getattr(OPS, name)(*meta)


def test_selective_scan_refuses_on_every_backend() -> None:
    u, A, side, h0 = torch.ones(2, 3, 4), -torch.ones(4, 5), torch.ones(2, 3, 5), torch.ones(2, 20)
    for args in ((u, u, A, side, side, h0[:1]), (u, u[:1], A, side, side, h0)):
        with pytest.raises(RuntimeError, match="expected u, dt"):
            OPS.selective_scan(*args, False)
        with pytest.raises(ValueError, match="must have shape"):
            selective._forward(*args, False)
        with pytest.raises((ValueError, RuntimeError), match="must have shape"):
            OPS.selective_scan(*(x.to("meta") for x in args), False)
    with pytest.raises(ValueError, match="`dy` must have shape"):
        selective._backward(u[:1], h0, u, u, A, side, side, h0, False)
