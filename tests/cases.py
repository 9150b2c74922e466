"""What every backend of the operators has to pass: the table of cases, inputs, tolerances.

A case is chosen for its reason. Each runs for `scan`, `mingru` and `minlstm`, whose values and
gradients must be those of the reference in float64.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, bfloat16, float16, float32, float64, int32, int64

from minrnn import ops
from minrnn.ops import reference

GATES = {"scan": ("a", "b"), "mingru": ("k", "v"), "minlstm": ("f", "i", "v")}
# operators of `torch.ops.minrnn` whose gates lie side by side in one tensor, and what they compute
FUSED = {"mingru_fused": "mingru", "minlstm_fused": "minlstm"}

# Largest error allowed, |x - expected| / (1 + |expected|), for a tensor of this dtype, whatever
# the dtype of the others: h_T and dh0 of a half precision run are float32 and held to that. The
# measured numbers are the worst of twenty seeds of the table below in pure torch, against float64;
# always the gradient of a decay, which in half precision is read off the rounded h.
TOLERANCES = {
    # measured 2.3e-15
    float64: 4e-15,
    # measured 3.4e-6; h alone 8.2e-7
    float32: 5e-6,
    # measured 6.4e-3; h alone 3.4e-3, which is the rounding of the result
    bfloat16: 8e-3,
    # measured 7.7e-4; h alone 4.2e-4
    float16: 1e-3,
}


@dataclass(frozen=True)
class Case:
    """One call of an operator: sizes, dtype, memory layout, options, and why it is here."""

    dtype: torch.dtype
    B: int
    T: int
    D: int
    reason: str
    layout: str = "contiguous"
    h0: bool = True
    candidate: str = "g"
    normalized: bool = True
    reset: bool = False
    cu_seqlens: tuple[int, ...] | None = None
    index: torch.dtype = int64
    reverse: bool = False

    def __str__(self) -> str:
        options = {
            self.layout: self.layout != "contiguous",
            "zero_state": not self.h0,
            self.candidate: self.candidate != "g",
            "unnormalized": not self.normalized,
            "reset": self.reset,
            "packed": self.cu_seqlens is not None,
            "reverse": self.reverse,
        }
        sizes = f"{self.dtype}-B{self.B}-T{self.T}-D{self.D}".removeprefix("torch.")
        return "-".join([sizes, *[option for option, is_set in options.items() if is_set]])


_BOUNDS = (0, 0, 3, 10, 10, 10, 16, 17, 17)

CASES = (
    Case(float32, 3, 65, 9, "no size fits a vector, a block or a power of two"),
    Case(float32, 2, 1, 8, "a single step, what streaming runs"),
    Case(float32, 2, 2, 7, "the smallest tree; a vector less one"),
    Case(float32, 2, 0, 4, "no step: h_T is h0, dh0 is dh_T"),
    Case(float32, 0, 1, 4, "an empty batch"),
    Case(float32, 1, 700, 1, "long and thin: errors add up, no channel to vectorise over"),
    Case(float32, 2, 64, 64, "halves of one projection, as the layers pass them", "halves"),
    Case(float32, 3, 13, 63, "time before batch, as nn.GRU keeps it", "time_first"),
    Case(float32, 2, 5, 65, "channels that do not lie side by side", "channels_apart"),
    Case(float32, 3, 8, 5, "one row for the whole batch, stride 0", "one_row"),
    Case(float32, 2, 17, 8, "one gate for all channels, stride 0", "one_channel", h0=False),
    Case(float64, 2, 33, 5, "double; the vanilla cell", candidate="identity", normalized=False),
    Case(bfloat16, 2, 64, 16, "rounded inputs, float32 arithmetic and state", "halves"),
    Case(float16, 3, 31, 8, "the same without h0; tanh", h0=False, candidate="tanh"),
    Case(float32, 3, 40, 6, "resets, at both ends too", reset=True, normalized=False),
    Case(float32, 3, 41, 6, "resets met from the other side", reset=True, reverse=True),
    Case(float32, 1, 17, 6, "four of eight sequences empty", cu_seqlens=_BOUNDS, index=int32),
    Case(float32, 1, 0, 4, "two sequences without a step", cu_seqlens=(0, 0, 0)),
    Case(bfloat16, 1, 17, 6, "all at once", reset=True, cu_seqlens=_BOUNDS, reverse=True),
)


# small enough for finite differences
SMALL_CASES = (
    Case(float64, 2, 4, 2, "with h0"),
    Case(float64, 2, 3, 2, "without", h0=False, candidate="identity", normalized=False),
    Case(float64, 2, 5, 2, "backwards", candidate="tanh", reset=True, reverse=True),
    Case(float64, 1, 5, 2, "packed", reset=True, cu_seqlens=(0, 0, 2, 5)),
)


# for what traces an operator without running it
TRACED_CASES = (
    Case(float64, 2, 5, 3, "dense, a state in double"),
    Case(float32, 2, 5, 3, "strides that are not the result's", "time_first", reset=True),
    Case(bfloat16, 1, 5, 3, "all options", reset=True, cu_seqlens=(0, 0, 2, 5), reverse=True),
)


class Inputs(NamedTuple):
    """Arguments of an operator, and the gradients that come back to its two results."""

    gates: dict[str, Tensor]
    h0: Tensor | None
    options: dict[str, Any]
    dh: Tensor
    dh_T: Tensor

    def double(self) -> "Inputs":
        """The same numbers in float64."""
        gates = {name: x.double() for name, x in self.gates.items()}
        h0 = None if self.h0 is None else self.h0.double()
        return Inputs(gates, h0, self.options, self.dh.double(), self.dh_T.double())


def make_inputs(name: str, case: Case) -> Inputs:
    """Arguments for `operator(name)` as `case` wants them, on the default device.

    They are random, and the same on every device.
    """
    name = FUSED.get(name, name)
    B, T, D = case.B, case.T, case.D
    state_dtype = float64 if case.dtype == float64 else float32
    rows = B if case.cu_seqlens is None else len(case.cu_seqlens) - 1
    gates = {gate: 2 * _drawn(torch.randn, B, T, D) for gate in GATES[name]}
    if name == "scan":
        # decays of both signs, some near 1
        gates["a"] = torch.tanh(gates["a"])
    options: dict[str, Any] = {"reverse": case.reverse}
    if name != "scan":
        options["candidate"] = case.candidate
    if name == "minlstm":
        options["normalized"] = case.normalized
    if case.reset:
        options["reset"] = _drawn(torch.rand, B, T) < 0.3
        options["reset"][0, 0] = options["reset"][-1, -1] = True
    if case.cu_seqlens is not None:
        options["cu_seqlens"] = torch.tensor(case.cu_seqlens, dtype=case.index)
    sequences = [x.to(case.dtype) for x in (*gates.values(), _drawn(torch.randn, B, T, D))]
    *placed, dh = _lay_out(sequences, case.layout)
    state = _drawn(torch.randn, 2, rows, D, dtype=state_dtype)
    h0 = state[0] if case.h0 else None
    return Inputs(dict(zip(gates, placed, strict=True)), h0, options, dh, state[1])


def _drawn(draw: Callable[..., Tensor], *size: int, **options: Any) -> Tensor:
    return draw(*size, device="cpu", **options).to(torch.get_default_device())


def _lay_out(tensors: list[Tensor], layout: str) -> list[Tensor]:
    B, T, D = tensors[0].shape
    if layout == "halves":
        return list(torch.cat(tensors, dim=2).chunk(len(tensors), dim=2))
    place = {
        "contiguous": lambda x: x,
        "time_first": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
        "channels_apart": lambda x: torch.stack([x, x], dim=3)[..., 0],
        "one_row": lambda x: x[:1].expand(B, T, D),
        "one_channel": lambda x: x[..., :1].expand(B, T, D),
    }[layout]
    return [place(x) for x in tensors]


def run(op: Callable[..., tuple[Tensor, Tensor]], inputs: Inputs) -> dict[str, Tensor]:
    """Both results of an operator and the gradient of every floating input, by name."""
    # a detached view keeps its strides
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.gates.items()}
    gates = list(leaves.values())
    if inputs.h0 is not None:
        leaves["h0"] = inputs.h0.detach().requires_grad_()
    h, h_T = op(*gates, leaves.get("h0"), **inputs.options)
    # without steps, h depends on nothing, and the reference says so
    pairs = [(y, dy) for y, dy in ((h, inputs.dh), (h_T, inputs.dh_T)) if y.requires_grad]
    grads = torch.autograd.grad(
        [y for y, _ in pairs],
        list(leaves.values()),
        [dy for _, dy in pairs],
        materialize_grads=True,
    )
    named = {f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)}
    return {"h": h.detach(), "h_T": h_T.detach(), **named}


def operator(name: str) -> Callable[..., tuple[Tensor, Tensor]]:
    """`minrnn.ops.name`; one of FUSED with the arguments of what it computes, joining the gates."""
    if name not in FUSED:
        return getattr(ops, name)
    num = len(GATES[FUSED[name]])

    def joined(
        *args: Any,
        reset: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        reverse: bool = False,
        **options: Any,
    ) -> tuple[Tensor, Tensor]:
        gates, h0 = torch.cat(args[:num], dim=2), args[num]
        layout = (reset, cu_seqlens, reverse)
        return getattr(torch.ops.minrnn, name)(gates, h0, *options.values(), False, *layout)

    return joined


def in_pieces(op: Callable[..., tuple[Tensor, Tensor]], cuts: list[int]) -> Callable[..., Any]:
    """`op` over the spans between `cuts`, each from the state that the one before left."""

    def whole(
        *args: Any, reset: Tensor | None = None, reverse: bool = False, **options: Any
    ) -> tuple[Tensor, Tensor]:
        *gates, state = args
        h = []
        spans = [slice(*ends) for ends in pairwise(cuts)]
        for span in reversed(spans) if reverse else spans:
            part = [x[:, span] for x in gates]
            cut = None if reset is None else reset[:, span]
            y, state = op(*part, state, reset=cut, reverse=reverse, **options)
            h.append(y)
        return torch.cat(h[::-1] if reverse else h, dim=1), state

    return whole


def expected(name: str, inputs: Inputs) -> dict[str, Tensor]:
    """What `run` must give, from the reference in float64."""
    return run(getattr(reference, FUSED.get(name, name)), inputs.double())


def assert_close(actual: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """Every tensor has the wanted shape, and the wanted values up to its dtype's tolerance."""
    assert actual.keys() == wanted.keys()
    for name, x in actual.items():
        limit = TOLERANCES[x.dtype]
        torch.testing.assert_close(
            x.double(), wanted[name].double(), rtol=limit, atol=limit, msg=f"{{}}: {name}".format
        )
