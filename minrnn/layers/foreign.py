"""Weights of other public minGRUs and minLSTMs, read into MinGRU and MinLSTM.

What each layout holds, D being the channels of the state, I the features of x, O those of y. All
use g for the candidate. "2D of v, k" are rows in that order; ours are k, v and f, i, v.

minGRU-pytorch (lucidrains, minGRU_pytorch/minGRU.py, minLSTM.py; 0.2.1)
    minGRU    to_hidden_and_gate.weight (2D of v, k; I)
    minLSTM   to_hidden_and_f_i_gate.weight (3D of v, f, i; I), gates always normalized
    both      to_out.weight (O = I, D) if expansion_factor != 1 or proj_out; no biases; h0 = 0;
              minLM keeps one under each prefix "layers.N.2."
minRNNs (the paper's authors, BorealisAI/minRNNs, models/minRNNs.py)
    minGRU    to_hidden_and_gate.weight (2D of v, k; I), .bias
    minLSTM   to_hidden_and_gate.weight (3D of v, f, i; I), .bias; normalized by `use_coeff_norm`,
              which is not saved and is off in configs/default.yaml (seen in Yani-hmc/minRNNs)
    both      to_out.weight (O = I, D), .bias, always; init_hidden_state (D,), on in that
              file, starts from g of it, h0 = 0 without; Model keeps one under each prefix
              "layers.N.2."
cheind/mingru (mingru/modules.py, seen in forks of it)
    MinGRUCell    to_gate_hidden.weight (2D of k, v; I), .bias unless bias=False
    MinGRU        layers.N.gate_hidden.weight, .bias likewise; before `norm` was an option
                  to_gate_hidden.N.weight, .bias
    both          h0 = 0.5 = g(0), not learned
    Bidirectional keeps one under "rnn.", runs it both ways and does not turn the way back round
mingru-scans (chris-santiago/minGRU, src/mingru/min_gru.py; 0.2.0)
    MinGRU    linear_z.weight (D, I) is k and linear_h.weight (D, I) is v, .bias unless bias=False;
              with learnable_h0 h0_pre (1, 1, D), which starts from g of it, h0 = 0.5 without;
              MinGRUStack keeps one under each prefix "blocks.N.mingru."
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from minrnn.layers.drop_ins import MinGRU, MinLSTM
from minrnn.ops.checks import check_tensor

_Linear = tuple[Tensor, Tensor | None]

# its sigmoid rounds to 1 in float64; beside 1, that of its negative vanishes
_OPEN = 50.0


class _Read(NamedTuple):
    """One layout's weights, the rows in our order."""

    kind: type[MinGRU] | type[MinLSTM]
    layers: list[_Linear]
    projection: Tensor | None = None
    h_0: Tensor | None = None
    """(num_layers, D); None for zeros"""
    normalized: bool = True
    learn_h0: bool = True


def read_weights(
    state_dict: Mapping[str, Tensor], prefix: str = "", *, normalized: bool | None = None
) -> MinGRU | MinLSTM:
    """Make the layer that computes what a layer of another minGRU package does, from its weights.

    Read are the minGRU and minLSTM of minGRU-pytorch and of minRNNs (the authors of Feng et al.
    2024, arXiv:2410.01201), the MinGRUCell and MinGRU of cheind/mingru, and the MinGRU of
    mingru-scans; key names and shapes tell which. What stands around the recurrence (norms,
    residuals, dropout) is not part of a layer. cheind's `residual` leaves no key where no size
    changes: such weights cannot be told from those without it.

    The layer starts where the other one does. A first state that is not zero becomes `h_0`, as the
    state itself and not what g is applied to; where it is a constant, 0.5, `h_0` is frozen. An
    output projection becomes `weight_hr_l0`. If it has a bias, as in minRNNs, the state gets one
    more channel: it holds 1, and the last column of `weight_hr_l0` is that bias.

    Args:
        state_dict: the other layer's, or one that has it under `prefix`.
        prefix: read only keys that begin so; the rest of each is the key in the layer.
        normalized: whether a minLSTM divides its gates by their sum. None does as the other package
            by default: minGRU-pytorch True, minRNNs False (its `use_coeff_norm` is not saved).

    Returns:
        A `MinGRU` or `MinLSTM` with `batch_first`, dtype and device of the weights, which are
        copied. input_size, hidden_size, num_layers, bias and proj_size follow from their shapes.

    Raises:
        ValueError: the keys are of no known layout, there are more than it has, as those of a norm
            or a time decay, or a shape does not fit; or `normalized` is given for a minGRU.
        TypeError: a value is no tensor.

    Example:
        >>> weight = torch.randn(2 * 16, 8)             # minGRU-pytorch: rows of v above those of k
        >>> layer = read_weights({"rnn.to_hidden_and_gate.weight": weight}, "rnn.")
        >>> layer
        MinGRU(8, 16, bias=False, batch_first=True)
        >>> torch.equal(layer.weight_ih_l0, torch.cat([weight[16:], weight[:16]]))
        True
    """
    found = {key[len(prefix) :]: x for key, x in state_dict.items() if key.startswith(prefix)}
    for key, x in found.items():
        check_tensor(f"state_dict[{prefix + key!r}]", x)
    layout = next((one for one in _LAYOUTS if one.key in found), None)
    if layout is None:
        known = "; ".join(f"{one.name}, with {one.key}" for one in _LAYOUTS)
        raise ValueError(
            f"`state_dict` must hold a known layout under `prefix` = {prefix!r}, got the keys "
            f"{_listed(found or state_dict)}; known are: {known}"
        )
    read = layout.read(found, layout.linear)
    if found:
        raise ValueError(
            f"`state_dict` must hold no more than the {layout.name} does under `prefix` = "
            f"{prefix!r}, got also {_listed(found)}"
        )
    return _build(read, normalized)


def _build(read: _Read, normalized: bool | None) -> MinGRU | MinLSTM:
    weight, bias = read.layers[0]
    options: dict[str, Any] = {"learn_h0": read.h_0 is not None}
    if read.projection is not None:
        options["proj_size"] = read.projection.shape[0]
    if read.kind is MinLSTM:
        options["normalized"] = read.normalized if normalized is None else normalized
    elif normalized is not None:
        raise ValueError(f"`normalized` must be None for the weights of a minGRU, got {normalized}")
    layer = read.kind(
        weight.shape[1],
        weight.shape[0] // read.kind.num_gates,
        len(read.layers),
        bias is not None,
        batch_first=True,
        device=weight.device,
        dtype=weight.dtype,
        **options,
    )
    tensors = {"h_0": read.h_0, "weight_hr_l0": read.projection}
    for n, (weight, bias) in enumerate(read.layers):
        tensors |= {f"weight_ih_l{n}": weight, f"bias_ih_l{n}": bias}
    layer.load_state_dict({name: x for name, x in tensors.items() if x is not None})
    if layer.h_0 is not None:
        layer.h_0.requires_grad_(read.learn_h0)
    return layer


def _read_fused(found: dict[str, Tensor], name: str) -> _Read:
    """minGRU-pytorch and minRNNs: rows of v first, perhaps a projection and a first state."""
    weight, bias = _pop_linear(found, name)
    out, out_bias = _pop_linear(found, "to_out") if "to_out.weight" in found else (None, None)
    # minRNNs has one name for both; its projection tells D
    is_lstm = "f_i" in name or (out is not None and weight.shape[0] == 3 * out.shape[1])
    kind = MinLSTM if is_lstm else MinGRU
    D = weight.shape[0] // kind.num_gates
    _check_sizes(f"{name}.weight", weight, (kind.num_gates * D, weight.shape[1]))
    weight, bias = weight.roll(-D, dims=0), None if bias is None else bias.roll(-D)
    if out is not None:
        _check_sizes("to_out.weight", out, (out.shape[0], D))
    h_0 = found.pop("init_hidden_state", None)
    if h_0 is not None:
        _check_sizes("init_hidden_state", h_0, (D,))
        h_0 = _g(h_0)[None]
    if out is not None and out_bias is not None:
        weight, bias = _with_constant(weight, bias, kind.num_gates)
        out = torch.cat([out, out_bias[:, None]], dim=1)
        h_0 = None if h_0 is None else F.pad(h_0, (0, 1), value=1.0)
    return _Read(kind, [(weight, bias)], out, h_0, normalized="f_i" in name)


def _with_constant(weight: Tensor, bias: Tensor | None, num_gates: int) -> _Linear:
    """One more channel, whose state is 1 after every step: forget all, take g(0.5) = 1."""
    bias = weight.new_zeros(weight.shape[0]) if bias is None else bias
    constant = weight.new_tensor((_OPEN, 0.5) if num_gates == 2 else (-_OPEN, _OPEN, 0.5))
    weight = F.pad(weight.unflatten(0, (num_gates, -1)), (0, 0, 0, 1)).flatten(0, 1)
    return weight, torch.cat([bias.unflatten(0, (num_gates, -1)), constant[:, None]], 1).flatten()


def _read_stack(found: dict[str, Tensor], name: str) -> _Read:
    """cheind/mingru: as many layers as `name` with 0, 1, ... in it has, or the one of `name`."""
    names = [name.format(0)]
    while name != names[0] and f"{name.format(len(names))}.weight" in found:
        names.append(name.format(len(names)))
    layers = [_pop_linear(found, one) for one in names]
    first, first_bias = layers[0]
    D = first.shape[0] // 2
    for n, (weight, bias) in enumerate(layers):
        _check_sizes(f"{names[n]}.weight", weight, (2 * D, D if n else first.shape[1]))
        _check_both(f"{names[0]}.bias", first_bias, f"{names[n]}.bias", bias)
    h_0 = first.new_full((len(layers), D), 0.5)
    return _Read(MinGRU, layers, h_0=h_0, learn_h0=False)


def _read_pair(found: dict[str, Tensor], name: str) -> _Read:
    """mingru-scans: k and v apart."""
    (k, k_bias), (v, v_bias) = _pop_linear(found, name), _pop_linear(found, "linear_h")
    _check_sizes("linear_h.weight", v, tuple(k.shape))
    _check_both("linear_z.bias", k_bias, "linear_h.bias", v_bias)
    bias = None if k_bias is None or v_bias is None else torch.cat([k_bias, v_bias])
    learned, D = "h0_pre" in found, k.shape[0]
    h0_pre = found.pop("h0_pre", k.new_zeros(1, 1, D))
    _check_sizes("h0_pre", h0_pre, (1, 1, D))
    return _Read(MinGRU, [(torch.cat([k, v]), bias)], h_0=_g(h0_pre[0]), learn_h0=learned)


def _g(x: Tensor) -> Tensor:
    return torch.where(x >= 0, x + 0.5, x.sigmoid())


def _pop_linear(found: dict[str, Tensor], name: str) -> _Linear:
    weight, bias = found.pop(f"{name}.weight", None), found.pop(f"{name}.bias", None)
    if weight is None or weight.dim() != 2:
        came = "none" if weight is None else tuple(weight.shape)
        raise ValueError(f"`{name}.weight` must have shape (rows, features), got {came}")
    if bias is not None:
        _check_sizes(f"{name}.bias", bias, (weight.shape[0],))
    return weight, bias


def _check_sizes(name: str, x: Tensor, sizes: tuple[int, ...]) -> None:
    if tuple(x.shape) != sizes:
        raise ValueError(f"`{name}` must have shape {sizes}, got {tuple(x.shape)}")


def _check_both(name: str, x: Tensor | None, other: str, y: Tensor | None) -> None:
    if (x is None) != (y is None):
        raise ValueError(f"`{name}` and `{other}` must be there both or not at all")


def _listed(keys: Mapping[str, Tensor]) -> str:
    return ", ".join(list(keys)[:8]) + (f" and {len(keys) - 8} more" if len(keys) > 8 else "")


class _Layout(NamedTuple):
    name: str
    read: Callable[[dict[str, Tensor], str], _Read]
    """takes what it reads out of the tensors"""
    linear: str
    """whose weight tells the layout"""

    @property
    def key(self) -> str:
        return f"{self.linear.format(0)}.weight"


_LAYOUTS = (
    _Layout("minGRU of minGRU-pytorch, all of minRNNs", _read_fused, "to_hidden_and_gate"),
    _Layout("minLSTM of minGRU-pytorch", _read_fused, "to_hidden_and_f_i_gate"),
    _Layout("MinGRUCell of cheind/mingru", _read_stack, "to_gate_hidden"),
    _Layout("MinGRU of cheind/mingru", _read_stack, "layers.{}.gate_hidden"),
    _Layout("early MinGRU of cheind/mingru", _read_stack, "to_gate_hidden.{}"),
    _Layout("MinGRU of mingru-scans", _read_pair, "linear_z"),
)
