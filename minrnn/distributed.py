"""Sequences whose time is split over processes: each has a part, and what crosses is one state.

Process r of R holds the steps of the r-th part, all parts of equal length. What a part does to a
state is one multiplication and one addition for each channel, whatever its length:

    h_out = A h_in + e;    A the product of its decays, e where it ends from zeros

So each process runs its part from zeros, tells the others A and e, and knows from theirs the state
that its part begins with; then it runs the part again, from that state. Backwards it is the same
with the parts in the other order: dh_in = A dh_out + g, g what the part's own outputs say. Forward
and backward exchange 2 B D numbers a process each, and a convolution its halo; none depends on T.
Blelloch 1990, section 1.4, with processes in place of processors.

Gradients are those of the sum of the losses of all processes. States (`h0`, and those returned)
are the same on every process, and the gradient of `h0` arrives on the process that begins.
"""

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from minrnn.ops import torch_kernels
from minrnn.ops.checks import check_gates, check_layout

# operator -> (gates, options) -> its decays
_DECAYS: dict[str, Callable[..., Tensor]] = {
    "scan": lambda a, b: a,
    "mingru": lambda k, v, candidate: torch_kernels.mingru_decay(k),
    "minlstm": lambda f, i, v, candidate, normalized: torch_kernels.minlstm_decay(f, i, normalized),
}


def scan(
    a: Tensor,
    b: Tensor,
    h0: Tensor | None = None,
    *,
    group: "dist.ProcessGroup",
    reset: Tensor | None = None,
    reverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """Run `minrnn.scan` over a sequence of which each process of `group` holds a part.

        h_t = a_t * h_{t-1} + b_t

    Args:
        a: (B, T, D), the decays of this process's T steps.
        b: (B, T, D), what each step adds.
        h0: (B, D), the state before the first step of all, the same on every process.
        group: the processes, in the order of their parts.
        reset: (B, T) bool, as in `minrnn.scan`.
        reverse: run from the last step of all to the first.

    Returns:
        h: (B, T, D), the states after this process's steps.
        h_T: (B, D), the state after the last step of all, the same on every process.

    Raises:
        ValueError: a shape, device or bound does not fit.
        TypeError: an argument is no tensor, or its dtype does not fit.
    """
    check_gates({"a": a, "b": b})
    check_layout(a, h0, reset, None)
    return split("scan", (a, b), h0, (), reset, reverse, group)


def mingru(
    k: Tensor,
    v: Tensor,
    h0: Tensor | None = None,
    *,
    group: "dist.ProcessGroup",
    candidate: str = "g",
    reset: Tensor | None = None,
    reverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """Run `minrnn.mingru` over a sequence of which each process of `group` holds a part.

        z_t = sigmoid(k_t)
        h_t = (1 - z_t) * h_{t-1} + z_t * candidate(v_t)

    Feng et al. 2024, arXiv:2410.01201, section 3.1. Arguments, results and errors as in `scan`
    here and in `minrnn.mingru`.
    """
    check_gates({"k": k, "v": v}, candidate)
    check_layout(k, h0, reset, None)
    return split("mingru", (k, v), h0, (candidate,), reset, reverse, group)


def minlstm(
    f: Tensor,
    i: Tensor,
    v: Tensor,
    h0: Tensor | None = None,
    *,
    group: "dist.ProcessGroup",
    candidate: str = "g",
    normalized: bool = True,
    reset: Tensor | None = None,
    reverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """Run `minrnn.minlstm` over a sequence of which each process of `group` holds a part.

        h_t = f'_t * h_{t-1} + i'_t * candidate(v_t)

    Feng et al. 2024, arXiv:2410.01201, section 3.2. Arguments, results and errors as in `scan`
    here and in `minrnn.minlstm`.
    """
    check_gates({"f": f, "i": i, "v": v}, candidate)
    check_layout(f, h0, reset, None)
    return split("minlstm", (f, i, v), h0, (candidate, normalized), reset, reverse, group)


def split(
    name: str,
    gates: tuple[Tensor, ...],
    h0: Tensor | None,
    options: tuple[Any, ...],
    reset: Tensor | None,
    reverse: bool,
    group: "dist.ProcessGroup",
) -> tuple[Tensor, Tensor]:
    """The operator `name` of `minrnn.ops` over a split sequence; arguments are checked already."""
    return _Split.apply(name, options, reset, reverse, group, h0, *gates)


class _Split(torch.autograd.Function):
    """An operator over a part, between the two exchanges."""

    @staticmethod
    def forward(
        ctx: Any,
        name: str,
        options: tuple[Any, ...],
        reset: Tensor | None,
        reverse: bool,
        group: "dist.ProcessGroup",
        h0: Tensor | None,
        *gates: Tensor,
    ) -> tuple[Tensor, Tensor]:
        run = getattr(torch.ops.minrnn, name)
        layout = (reset, None, reverse)
        _, end = run(*gates, None, *options, *layout)
        total = _total_decay(name, gates, options, reset)
        # (R, 2, B, D), in the order in which the recurrence passes the parts
        told = _in_order(torch.stack((total, end)), group, reverse)
        states = [torch.zeros_like(end) if h0 is None else h0.to(end.dtype)]
        for decays, ends in told:
            states.append(torch.addcmul(ends, decays, states[-1]))
        h_in, h_T = states[_place(group, reverse)], states[-1]
        h, _ = run(*gates, h_in, *options, *layout)
        ctx.name, ctx.options, ctx.reverse, ctx.group = name, options, reverse, group
        ctx.dtype = None if h0 is None else h0.dtype
        ctx.save_for_backward(reset, h_in, h, told[:, 0].contiguous(), *gates)
        return h, h_T

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor | None, ...]:
        dh, dh_T = grad_outputs
        reset, h_in, h, decays, *gates = ctx.saved_tensors
        run = getattr(torch.ops.minrnn, f"{ctx.name}_backward")
        # what scan adds leaves no trace in its gradient
        saved = gates[:1] if ctx.name == "scan" else gates
        rest = (*saved, h_in, h, *ctx.options, reset, None, ctx.reverse)
        *_, own = run(dh, torch.zeros_like(dh_T), *rest)
        told = _in_order(torch.stack((own, dh_T)), ctx.group, ctx.reverse)
        # behind the last part, where every process may have used h_T; then before each
        behind = [told[:, 1].sum(0)]
        for a, g in zip(decays.flip(0), told[:, 0].flip(0), strict=True):
            behind.append(torch.addcmul(g, a, behind[-1]))
        place = _place(ctx.group, ctx.reverse)
        *grads, _ = run(dh, behind[len(decays) - 1 - place], *rest)
        dh0 = None
        if ctx.dtype is not None:
            dh0 = (behind[-1] if place == 0 else torch.zeros_like(dh_T)).to(ctx.dtype)
        return None, None, None, None, None, dh0, *grads


def _total_decay(
    name: str, gates: tuple[Tensor, ...], options: tuple[Any, ...], reset: Tensor | None
) -> Tensor:
    """The product of a part's decays, (B, D); zero where something is reset in it."""
    axis = 1
    if name.endswith("_fused"):
        options, time_first = options[:-1], options[-1]
        gates = gates[0].chunk(3 if name.startswith("minlstm") else 2, dim=-1)
        axis = 0 if time_first else 1
    decays = _DECAYS[name.removesuffix("_fused")](*map(torch_kernels.widen, gates), *options)
    total = decays.prod(axis)
    if reset is not None:
        total = total.masked_fill(reset.any(axis)[:, None], 0.0)
    return total


def halo(past: Tensor, x: Tensor, group: "dist.ProcessGroup") -> tuple[Tensor, Tensor]:
    """The last steps of the part before, which a convolution over this one begins with.

    Args:
        past: (B, N, D), what stands before the first step of all, the same on every process.
        x: (B, T, D), this process's part.
        group: the processes, in the order of their parts.

    Returns:
        (B, N, D) before this part, and (B, N, D) the last of all, the same on every process.

    Raises:
        ValueError: a part has fewer than N steps.
    """
    N = past.shape[1]
    if x.shape[1] < N:
        raise ValueError(
            f"each process must hold at least {N} steps, as many as the convolution looks back; "
            f"got T = {x.shape[1]}"
        )
    return _Halo.apply(past, x[:, x.shape[1] - N :], group)


class _Halo(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, past: Tensor, last: Tensor, group: "dist.ProcessGroup"
    ) -> tuple[Tensor, Tensor]:
        ctx.group = group
        told = _in_order(last, group, reverse=False)
        place = dist.get_rank(group)
        return (past.clone() if place == 0 else told[place - 1].clone()), told[-1].clone()

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor | None, ...]:
        before, final = grad_outputs
        told = _in_order(torch.stack((before, final)), ctx.group, reverse=False)
        place, size = dist.get_rank(ctx.group), dist.get_world_size(ctx.group)
        to_last = told[:, 1].sum(0) if place == size - 1 else told[place + 1, 0]
        return (before if place == 0 else torch.zeros_like(before)), to_last, None


def first_of_next(x: Tensor, group: "dist.ProcessGroup") -> Tensor:
    """What the process of the next part gives as `x`, a bool; all False on the last."""
    told = _in_order(x.to(torch.uint8), group, reverse=False)
    place = dist.get_rank(group)
    return torch.zeros_like(x) if place == len(told) - 1 else told[place + 1].bool()


def _place(group: "dist.ProcessGroup", reverse: bool) -> int:
    """Which part of the sequence this process has, counted as the recurrence passes them."""
    rank = dist.get_rank(group)
    return dist.get_world_size(group) - 1 - rank if reverse else rank


def _in_order(x: Tensor, group: "dist.ProcessGroup", reverse: bool) -> Tensor:
    """What every process tells, (R, ...), counted as the recurrence passes their parts."""
    x = x.contiguous()
    told = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
    dist.all_gather(told, x, group=group)
    return torch.stack(told[::-1] if reverse else told)


@runtime_checkable
class _OverTime(Protocol):
    """A layer that carries something from step to step."""

    time_group: "dist.ProcessGroup | None"


def split_time(model: nn.Module, group: "dist.ProcessGroup") -> nn.Module:
    """Let `model` take a sequence of which each process of `group` holds a part.

    It is changed in place. Each call then takes this process's steps and returns its outputs; the
    states are those before the first step of all and behind the last, the same on every process.

    Args:
        model: a `MinGRU` or `MinLSTM` (both directions too), a `LanguageModel` or any other model
            of them, with or without convolutions.
        group: the processes, in the order of their parts: that of one dimension of a
            `DeviceMesh`, `mesh.get_group("time")`, or all.

    Returns:
        `model`.

    Raises:
        ValueError: a part of `model` mixes over time in another way, e.g. by attention.
    """
    check_time_split(model)
    for module in model.modules():
        if isinstance(module, _OverTime):
            module.time_group = group
    return model


def check_time_split(model: nn.Module) -> None:
    """Check that `split_time` takes `model`.

    Raises:
        ValueError: a part of `model` mixes over time in another way, e.g. by attention.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.RNNBase) or not getattr(module, "can_split_time", True):
            raise ValueError(
                f"`model` must mix over time by minGRU, minLSTM and convolutions only, its part "
                f"{name or 'itself'!r} is a {type(module).__name__}"
            )
