"""Who is right: every answer is held to float64 before any time is taken."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from minrnn.ops import reference, scans

# Largest error of h or a gradient over its largest entry. Real-space forms in float32 stay below
# 1e-5 at every shape here; a wrong index or a lost term is of the order of 1.
TOLERANCE = 1e-4
# Log space loses digits in proportion to T, in its gradients more than in its values. Its formula
# is held to `TOLERANCE` in float64; in float32 a wrong one would be off by about 1, it by less.
LOG_SPACE_TOLERANCE = 0.1
# steps and channels that the float64 answer is itself confirmed on, by the reference loop
CONFIRMED_STEPS = 256
CONFIRMED_CHANNELS = 8
# steps of a long sequence that are taken at a time
PIECE = 1 << 16


def inputs(
    recurrence: str, shape: tuple[int, int, int], device: torch.device | str = "cpu"
) -> list[Tensor]:
    """What the recurrence takes, float32 from a fixed seed, and the gradient dh behind it.

    Pre-activations are normal; a = sigmoid(-k) and b = sigmoid(k) * g(v) for the plain scan, so
    that log space has a logarithm of everything. The same numbers on every device.
    """
    generator = torch.Generator().manual_seed(0)
    count = {"scan": 2, "mingru": 2, "minlstm": 3}[recurrence]
    drawn = [torch.randn(shape, generator=generator).to(device) for _ in range(count + 1)]
    *gates, v, dh = drawn
    if recurrence == "scan":
        g = torch.where(v >= 0, v + 0.5, torch.sigmoid(v))
        return [torch.sigmoid(-gates[0]), torch.sigmoid(gates[0]) * g, dh]
    return [*gates, v, dh]


def coefficients(recurrence: str, gates: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """a and b of h_t = a_t * h_{t-1} + b_t, in the dtype of the gates, by plain torch."""
    if recurrence == "scan":
        return gates[0], gates[1]
    *gates, v = gates
    # the gate of a minLSTM: f' = f / (f + i) is a sigmoid too
    k = -gates[0] if recurrence == "mingru" else F.logsigmoid(gates[0]) - F.logsigmoid(gates[1])
    candidate = torch.where(v >= 0, v + 0.5, torch.sigmoid(v))
    return torch.sigmoid(k), torch.sigmoid(-k) * candidate


def recurrence64(recurrence: str, gates: Sequence[Tensor]) -> Tensor:
    """h in float64, differentiable, by the tree scan: a loop over long T would take too long."""
    return scans.blelloch(*coefficients(recurrence, [x.double() for x in gates]))[0]


def answer(recurrence: str, gates: Sequence[Tensor], dh: Tensor) -> list[Tensor]:
    """[h, gradients of the gates] in float64 for every element.

    The tree scan that gives them is itself held to `minrnn.ops.reference` on the first steps and
    channels.

    Raises:
        ArithmeticError: it is not what the reference says.
    """
    *few, few_dh = _beginning([*gates, dh])
    run = getattr(reference, recurrence)
    wanted = _with_gradients(lambda *x: run(*x)[0], few, few_dh)
    found = _with_gradients(lambda *x: recurrence64(recurrence, x), few, few_dh)
    _confirm(recurrence, found, wanted)
    return _with_gradients(lambda *x: recurrence64(recurrence, x), gates, dh)


def values(recurrence: str, gates: Sequence[Tensor]) -> Tensor:
    """h in float64, by the tree scan in pieces that hand the state on: for T in the millions.

    Raises:
        ArithmeticError: it is not what the reference says, on the first steps and channels.
    """
    state, h = None, []
    for piece in zip(*(x.split(PIECE, dim=1) for x in gates), strict=True):
        a, b = coefficients(recurrence, [x.double() for x in piece])
        h_piece, state = scans.blelloch(a, b, state)
        h.append(h_piece)
    found = torch.cat(h, dim=1)
    few = [x.double() for x in _beginning(gates)]
    _confirm(recurrence, _beginning([found]), [getattr(reference, recurrence)(*few)[0]])
    return found


def _beginning(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [x[:1, :CONFIRMED_STEPS, :CONFIRMED_CHANNELS] for x in tensors]


def _confirm(recurrence: str, found: Sequence[Tensor], wanted: Sequence[Tensor]) -> None:
    if not error(found, wanted) < 1e-12:
        raise ArithmeticError(f"float64 {recurrence} is not what the reference says")


def error(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """The largest |found - wanted| over the largest |wanted|, of the worst tensor.

    A missing tensor, another shape, or a NaN is an infinite error.

    Example:
        >>> x = torch.tensor([1.0, 4.0])
        >>> error([x + 1], [x]), error([x * torch.nan], [x]), error([], [x])
        (0.25, inf, inf)
    """
    if len(found) != len(wanted):
        return math.inf
    worst = 0.0
    for x, y in zip(found, wanted, strict=True):
        if x.shape != y.shape:
            return math.inf
        if y.numel():
            scale = max(y.abs().max().item(), 1e-30)
            off = ((x.double() - y).abs().max() / scale).item()
            worst = max(worst, math.inf if math.isnan(off) else off)
    return worst


def _with_gradients(
    run: Callable[..., Tensor], gates: Sequence[Tensor], dh: Tensor
) -> list[Tensor]:
    leaves = [x.detach().double().requires_grad_() for x in gates]
    h = run(*leaves)
    return [h.detach(), *torch.autograd.grad(h, leaves, dh.double())]
