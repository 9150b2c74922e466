"""Who is compared: how each is called, what it computes, what it cannot take, how to get it.

Nothing of another package is imported before a bench asks for it. Each gets its inputs in the
layout that it wants before the clock starts: a transposition is not held against it.
"""

import importlib
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from minrnn import ops
from minrnn.bench.truth import coefficients, recurrence64
from minrnn.layers import MinGRU, MinLSTM
from minrnn.ops.scans import log_space

# exact versions, as in the extra `bench` of pyproject.toml
REQUIREMENTS = {
    "minGRU-pytorch": "0.2.1",
    "mingru-scans": "0.2.0",
    "mambapy": "1.2.0",
    "assoc-scan": "0.0.6",
    "accelerated-scan": "0.3.1",
    "fla-core": "0.6.0",
    "jax": "0.10.2",
    "transformers": "5.23.0",
}
OURS = "minrnn"


class MissingPeerError(Exception):
    """A package is not installed; the message says how to get it."""


def require(package: str, module: str) -> Any:
    """Import `module` of `package`.

    Raises:
        MissingPeerError: it is not installed, or something that it needs is not.
    """
    hint = f"missing: pip install {package}=={REQUIREMENTS[package]}"
    try:
        # asked by the name of the package: two public ones share the import name `mingru`
        metadata.version(package)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module(module)
    except metadata.PackageNotFoundError:
        raise MissingPeerError(hint) from None
    except ImportError as error:
        raise MissingPeerError(f"{hint} ({error})") from None


class Calls(NamedTuple):
    """One competitor on one set of inputs: what is timed, and how its results are read."""

    forward: Callable[[], Any]
    """-> h"""
    both: Callable[[], Any]
    """forward and backward -> (h, gradients)"""
    read: Callable[[Any], list[Tensor]]
    """either result as tensors in our layout"""


# Scans and cells: (B, T, D) in, (B, T, D) out.


def bind_torch(
    run: Callable[..., Tensor], gates: Sequence[Tensor], dh: Tensor, transposed: bool = False
) -> Calls:
    """Calls of a function of tensors, through autograd."""

    def turned(x: Tensor) -> Tensor:
        return x.transpose(1, 2).contiguous() if transposed else x

    plain, cotangent = [turned(x) for x in gates], turned(dh)
    leaves = [x.detach().requires_grad_() for x in plain]

    def forward() -> Tensor:
        with torch.no_grad():
            return run(*plain)

    def both() -> tuple[Tensor, ...]:
        h = run(*leaves)
        return h, *torch.autograd.grad(h, leaves, cotangent)

    def read(result: Tensor | tuple[Tensor, ...]) -> list[Tensor]:
        tensors = [result] if isinstance(result, Tensor) else result
        return [(x.transpose(1, 2) if transposed else x).detach() for x in tensors]

    return Calls(forward, both, read)


def bind_jax(run: Callable[..., Any], gates: Sequence[Tensor], dh: Tensor) -> Calls:
    """Calls of a function of jax arrays, compiled by `jax.jit` and waited for."""
    jax = require("jax", "jax")
    arrays = [jax.numpy.asarray(x.numpy()) for x in gates]
    cotangent = jax.numpy.asarray(dh.numpy())

    def value_and_gradients(cotangent: Any, *arrays: Any) -> tuple[Any, ...]:
        h, pull_back = jax.vjp(run, *arrays)
        return h, *pull_back(cotangent)

    compiled, compiled_both = jax.jit(run), jax.jit(value_and_gradients)

    def read(result: Any) -> list[Tensor]:
        arrays = result if isinstance(result, tuple) else (result,)
        return [torch.tensor(jax.device_get(x)) for x in arrays]

    return Calls(
        lambda: jax.block_until_ready(compiled(*arrays)),
        lambda: jax.block_until_ready(compiled_both(cotangent, *arrays)),
        read,
    )


@dataclass(frozen=True)
class Scan:
    """A scan, or a cell made of one."""

    name: str
    load: Callable[[], Callable[..., Any]]
    """imports what it needs, and gives a function of the gates that returns h"""
    bind: Callable[..., Calls] = bind_torch
    """(that function, gates, dh) -> what is timed"""
    max_steps: int = 1 << 62
    """a longer T is not tried: it would take minutes, or more memory than there is"""
    log_space: bool = False


def step_loop(a: Tensor, b: Tensor) -> Tensor:
    """The scan as a loop in Python, written well: unbind and stack, no indexing."""
    h = torch.zeros_like(b[:, 0])
    states = []
    for a_t, b_t in zip(a.unbind(1), b.unbind(1), strict=True):
        h = torch.addcmul(b_t, a_t, h)
        states.append(h)
    return torch.stack(states, dim=1)


def log_space_cell(*inputs: Tensor) -> Tensor:
    """The cell of two gates (minGRU) or three (minLSTM) as the public minGRUs evaluate it.

    Feng et al. 2024, arXiv:2410.01201, appendix B: logarithms of the gates by softplus.
    """
    *gates, v = inputs
    k = gates[0] if len(gates) == 1 else F.softplus(-gates[0]) - F.softplus(-gates[1])
    log_candidate = torch.where(v >= 0, torch.log(F.relu(v) + 0.5), -F.softplus(-v))
    A = -F.softplus(k).cumsum(dim=1)
    return torch.exp(A + torch.logcumsumexp(log_candidate - F.softplus(-k) - A, dim=1))


def scans_of(recurrence: str) -> list[Scan]:
    """All that compute `recurrence` ("scan", "mingru" or "minlstm"), ours first.

    Beside the log-space form of a cell, the fastest of the scans stand behind gates in plain torch.
    """
    op = getattr(ops, recurrence)
    ours = Scan(OURS, lambda: lambda *gates: op(*gates)[0])
    if recurrence == "scan":
        return [ours, *_SCANS]
    cells = [_behind_gates(recurrence, scan) for scan in _SCANS if scan.name in _FAST]
    log = Scan("log space", lambda: log_space_cell, max_steps=1 << 20, log_space=True)
    return [ours, log, *cells]


def _behind_gates(recurrence: str, scan: Scan) -> Scan:
    """The cell whose coefficients plain torch makes and whose scan is `scan`."""

    def load() -> Callable[..., Tensor]:
        run = scan.load()
        return lambda *gates: run(*coefficients(recurrence, gates))

    return Scan(f"gates + {scan.name}", load, max_steps=scan.max_steps)


def _load_mambapy() -> Callable[..., Tensor]:
    pscan = require("mambapy", "mambapy.pscan").pscan
    # its fourth axis is the state of Mamba, here of size 1
    return lambda a, b: pscan(a[..., None], b[..., None])[..., 0]


def _load_mingru_scans() -> Callable[..., Tensor]:
    run = require("mingru-scans", "mingru").linear_scan
    return lambda a, b: run(a, b)[1]


def _load_torch_scan() -> Callable[..., Tensor]:
    module = importlib.import_module("torch._higher_order_ops.associative_scan")

    def compose(first: Any, then: Any) -> tuple[Tensor, Tensor]:
        return first[0] * then[0], torch.addcmul(then[1], then[0], first[1])

    def run(a: Tensor, b: Tensor) -> Tensor:
        return module.associative_scan(compose, (a, b), dim=1, combine_mode="generic")[1]

    return run


def _load_jax_scan() -> Callable[..., Any]:
    jax = require("jax", "jax")

    def step(h: Any, coefficients: Any) -> tuple[Any, Any]:
        h = coefficients[0] * h + coefficients[1]
        return h, h

    def run(a: Any, b: Any) -> Any:
        steps = (a.swapaxes(0, 1), b.swapaxes(0, 1))
        _, h = jax.lax.scan(step, jax.numpy.zeros_like(b[:, 0]), steps)
        return h.swapaxes(0, 1)

    return run


def _load_jax_associative_scan() -> Callable[..., Any]:
    jax = require("jax", "jax")

    def compose(first: Any, then: Any) -> tuple[Any, Any]:
        return first[0] * then[0], then[0] * first[1] + then[1]

    return lambda a, b: jax.lax.associative_scan(compose, (a, b), axis=1)[1]


_SCANS = (
    Scan("mambapy pscan", _load_mambapy),
    Scan("assoc-scan", lambda: require("assoc-scan", "assoc_scan").AssocScan()),
    Scan(
        "accelerated-scan ref",
        lambda: require("accelerated-scan", "accelerated_scan.ref").scan,
        partial(bind_torch, transposed=True),
    ),
    Scan("mingru-scans linear_scan", _load_mingru_scans, max_steps=1 << 20),
    Scan("torch associative_scan", _load_torch_scan),
    Scan("jax.lax.scan", _load_jax_scan, bind_jax),
    Scan("jax.lax.associative_scan", _load_jax_associative_scan, bind_jax),
    Scan("log space", lambda: lambda a, b: log_space(a, b)[0], max_steps=1 << 20, log_space=True),
    Scan("step loop in Python", lambda: step_loop, max_steps=1 << 14),
)
_FAST = ("mambapy pscan", "assoc-scan", "step loop in Python")


# Layers: (B, T, width) in, (B, T, width) out, their own weights.


class Built(NamedTuple):
    """A layer with weights."""

    module: nn.Module
    run: Callable[[nn.Module, Tensor], Tensor]
    """(module, x) -> h"""
    truth: Callable[[nn.Module, Tensor], Tensor]
    """(module in float64, x in float64) -> h by the equation; `run` where there is no other"""


@dataclass(frozen=True)
class Layer:
    """A layer that maps `width` features to as many."""

    name: str
    build: Callable[[int], Built]
    family: str
    """gru or lstm: whom it is compared with"""
    own_truth: bool = False
    """held to itself in float64, for want of another definition"""
    log_space: bool = False
    loop: bool = False
    """a loop over time in Python"""


def bind_layer(built: Built, x: Tensor, dh: Tensor) -> Calls:
    """Calls of a layer; the gradients are those of x and of every weight."""
    leaf = x.detach().clone().requires_grad_()
    leaves = [leaf, *built.module.parameters()]

    def forward() -> Tensor:
        with torch.no_grad():
            return built.run(built.module, x)

    def both() -> tuple[Tensor, ...]:
        h = built.run(built.module, leaf)
        return h, *torch.autograd.grad(h, leaves, dh)

    return Calls(forward, both, lambda out: [out] if isinstance(out, Tensor) else list(out))


def _first(module: nn.Module, x: Tensor) -> Tensor:
    return module(x)[0]


def _torch_layer(kind: type[nn.GRU] | type[nn.LSTM]) -> Callable[[int], Built]:
    return lambda width: Built(kind(width, width, batch_first=True), _first, _first)


def our_gates(module: Any, x: Tensor, end: str = "_l0") -> tuple[str, Sequence[Tensor]]:
    """The recurrence of a `MinGRU` or `MinLSTM`, and its gates for x; weights end in `end`."""
    weight, bias = getattr(module, f"weight_ih{end}"), getattr(module, f"bias_ih{end}")
    gates = F.linear(x, weight, bias).chunk(module.num_gates, dim=-1)
    return "mingru" if module.num_gates == 2 else "minlstm", gates


def _our_truth(module: Any, x: Tensor) -> Tensor:
    return recurrence64(*our_gates(module, x))


def _our_layer(kind: type[MinGRU] | type[MinLSTM]) -> Callable[[int], Built]:
    return lambda width: Built(kind(width, width, batch_first=True), _first, _our_truth)


def _our_loop(kind: type[MinGRU] | type[MinLSTM]) -> Callable[[int], Built]:
    """Our layer's equation, its projection in one piece and its recurrence step by step."""

    def run(module: Any, x: Tensor) -> Tensor:
        return step_loop(*coefficients(*our_gates(module, x)))

    return lambda width: Built(kind(width, width, batch_first=True), run, _our_truth)


def _cell_loop(
    kind: type[nn.GRUCell] | type[nn.LSTMCell], whole: type[nn.GRU] | type[nn.LSTM]
) -> Callable[[int], Built]:
    """A cell of torch, step by step, held to the layer of torch with its weights."""

    def run(module: nn.Module, x: Tensor) -> Tensor:
        state, states = None, []
        for x_t in x.unbind(1):
            state = module(x_t, state)
            states.append(state if isinstance(state, Tensor) else state[0])
        return torch.stack(states, dim=1)

    def truth(module: nn.Module, x: Tensor) -> Tensor:
        weights: dict[str, Tensor] = {f"{n}_l0": w for n, w in module.named_parameters()}
        layer = whole(x.shape[2], x.shape[2], batch_first=True)
        return torch.func.functional_call(layer, weights, (x,))[0]

    return lambda width: Built(kind(width, width), run, truth)


def _mingru_pytorch(width: int) -> Built:
    layer = require("minGRU-pytorch", "minGRU_pytorch.minGRU").minGRU(width)

    def truth(module: Any, x: Tensor) -> Tensor:
        v, k = module.to_hidden_and_gate(x).chunk(2, dim=-1)
        return recurrence64("mingru", [k, v])

    return Built(layer, nn.Module.__call__, truth)


def _minlstm_pytorch(width: int) -> Built:
    layer = require("minGRU-pytorch", "minGRU_pytorch.minLSTM").minLSTM(width)

    def truth(module: Any, x: Tensor) -> Tensor:
        v, f, i = module.to_hidden_and_f_i_gate(x).chunk(3, dim=-1)
        return recurrence64("minlstm", [f, i, v])

    return Built(layer, nn.Module.__call__, truth)


def _mingru_scans(width: int) -> Built:
    layer = require("mingru-scans", "mingru").MinGRU(width, width)

    def truth(module: Any, x: Tensor) -> Tensor:
        a, b = coefficients("mingru", [module.linear_z(x), module.linear_h(x)])
        # its first state is g(0) = 1/2
        first = torch.cat([b[:, :1] + 0.5 * a[:, :1], b[:, 1:]], dim=1)
        return recurrence64("scan", [a, first])

    return Built(layer, nn.Module.__call__, truth)


def _signed_mingru(width: int) -> Built:
    layer = require("mingru-scans", "mingru").SignedMinGRU(width, width)

    def truth(module: Any, x: Tensor) -> Tensor:
        b = torch.sigmoid(module.linear_z(x)) * module.linear_h(x)
        return recurrence64("scan", [torch.tanh(module.linear_s(x)), b])

    return Built(layer, nn.Module.__call__, truth)


LAYERS = (
    Layer("MinGRU", _our_layer(MinGRU), "gru"),
    Layer("nn.GRU", _torch_layer(nn.GRU), "gru", own_truth=True),
    Layer("minGRU-pytorch minGRU", _mingru_pytorch, "gru", log_space=True),
    Layer("mingru-scans MinGRU", _mingru_scans, "gru", log_space=True),
    Layer("mingru-scans SignedMinGRU", _signed_mingru, "gru"),
    Layer("loop of nn.GRUCell", _cell_loop(nn.GRUCell, nn.GRU), "gru", loop=True),
    Layer("loop of minGRU steps", _our_loop(MinGRU), "gru", loop=True),
    Layer("MinLSTM", _our_layer(MinLSTM), "lstm"),
    Layer("nn.LSTM", _torch_layer(nn.LSTM), "lstm", own_truth=True),
    Layer("minGRU-pytorch minLSTM", _minlstm_pytorch, "lstm", log_space=True),
    Layer("loop of nn.LSTMCell", _cell_loop(nn.LSTMCell, nn.LSTM), "lstm", loop=True),
    Layer("loop of minLSTM steps", _our_loop(MinLSTM), "lstm", loop=True),
)
