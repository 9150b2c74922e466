"""Gates at their ends: what is shut keeps a state to the bit, what is open takes the candidate."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, bfloat16, float16, float32, float64

from minrnn.ops import reference, rows, torch_kernels

OPS = torch.ops.minrnn
INF = float("inf")
STEPS = 100_000
# gates that keep everything, k, or f and i; the candidate follows
SHUT = {
    "mingru": [(-100.0,), (-1e9,), (-3e38,), (-INF,)],
    "minlstm": [(100.0, -100.0), (0.0, -130.0), (-7e8, -1e9), (3e38, -3e38), (20.0, -INF)],
    "plain_minlstm": [(100.0, -100.0), (3e38, -3e38), (INF, -INF)],
}
KEEPING = [(name, gates) for name, rows_of in SHUT.items() for gates in rows_of]


def _call(
    run: Callable[..., Any], name: str, x: list[Tensor], h0: Tensor, *saved: Tensor
) -> tuple[Tensor, ...]:
    """An operator or its gradient, compiled or in pure torch; `saved` are dh, dh_T and h."""
    options = ("g",) if name == "mingru" else ("g", name == "minlstm")
    layout = (None, None, False)
    if saved:
        dh, dh_T, h = saved
        return run(dh, dh_T, *x, h0, h, *options, *layout)
    return run(*x, h0, *options, *layout)


def _gates(values: tuple[float, ...], dtype: torch.dtype, D: int) -> list[Tensor]:
    """Constant gates over many steps, and candidates that no two channels share."""
    v = torch.linspace(-5, 0.5, D, dtype=dtype).expand(1, STEPS, D)
    return [*(torch.full((1, STEPS, D), value, dtype=dtype) for value in values), v]


# 5 channels: steps are composed; 40: they are not
@pytest.mark.parametrize("D", [5, 40])
@pytest.mark.parametrize("dtype", [float32, float64], ids=str)
@pytest.mark.parametrize(("name", "values"), KEEPING, ids=str)
def test_shut_gate_keeps_a_state_to_the_bit(name, values, dtype, D) -> None:
    plain = name.removeprefix("plain_")
    kernels = [getattr(OPS, plain), getattr(OPS, f"{plain}_backward")]
    if D == 5:
        kernels += [getattr(torch_kernels, plain), getattr(torch_kernels, f"{plain}_backward")]
    x, h0, dh_T = _gates(values, dtype, D), torch.randn(1, D), torch.randn(1, D)
    h0, dh_T = h0.to(dtype), dh_T.to(dtype)
    for forward, backward in zip(kernels[::2], kernels[1::2], strict=True):
        h, h_T = _call(forward, name, x, h0)
        assert torch.equal(h_T, h0)
        assert torch.equal(h, h0[:, None].expand_as(h))
        *grads, dh0 = _call(backward, name, x, h0, torch.zeros_like(h), dh_T, h)
        assert torch.equal(dh0, dh_T)
        # nothing of what a shut gate refuses comes back, up to what a float64 holds
        assert all(grad.abs().max() < 1e-40 for grad in grads)


@pytest.mark.parametrize("name", ["mingru_fused", "minlstm_fused"])
def test_fused_operators_keep_a_state_to_the_bit(name: str) -> None:
    plain = name.removesuffix("_fused")
    gates = torch.cat(_gates(SHUT[plain][0], float32, 24), dim=2)
    h0, dh_T = torch.randn(2, 1, 24)
    options = ("g", False) if plain == "mingru" else ("g", True, False)
    h, h_T = getattr(OPS, name)(gates, h0, *options, None, None, False)
    assert torch.equal(h_T, h0)
    backward = getattr(OPS, f"{name}_backward")
    _, dh0 = backward(0 * h, dh_T, gates, h0, h, *options, None, None, False)
    assert torch.equal(dh0, dh_T)


@pytest.mark.parametrize("dtype", [bfloat16, float16], ids=str)
@pytest.mark.parametrize("name", ["mingru", "minlstm"])
def test_half_precision_gates_keep_a_float32_state(name: str, dtype: torch.dtype) -> None:
    x, h0 = _gates(SHUT[name][0], dtype, 16), torch.randn(1, 16)
    assert torch.equal(_call(getattr(OPS, name), name, x, h0)[1], h0)


@pytest.mark.parametrize("candidate", ["g", "identity", "tanh"])
@pytest.mark.parametrize("dtype", [float32, float64], ids=str)
@pytest.mark.parametrize("name", ["mingru", "minlstm"])
def test_open_gate_takes_the_candidate(name: str, dtype: torch.dtype, candidate: str) -> None:
    v = torch.linspace(-6, 6, 97, dtype=dtype)[None, None]
    size = 1e9 if dtype == float32 else 1e300
    gates = [v + size] if name == "mingru" else [v - size, v + size]
    options = (candidate,) if name == "mingru" else (candidate, True)
    _, h_T = getattr(OPS, name)(*gates, v, 1e6 * v[0], *options, None, None, False)
    wanted = reference._candidate(v.double(), candidate)[0]
    if candidate == "identity":
        assert torch.equal(h_T, v[0])
    # two roundings, and those of an exponential
    torch.testing.assert_close(h_T.double(), wanted, rtol=4 * torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("num_gates", [2, 3])
def test_packed_model_keeps_a_state_to_the_bit(num_gates: int) -> None:
    D, width, steps = 16, 8, 5000
    # the gates' biases alone decide: shut, and with any candidate
    values = SHUT["mingru"][0] if num_gates == 2 else SHUT["minlstm"][0]
    bias = torch.cat([torch.full((D,), value) for value in values] + [torch.randn(D)])
    nothing, one = torch.empty(0), torch.ones(width)
    matrices = [torch.zeros(num_gates * D, width), torch.zeros(width, D), torch.zeros(3, width)]
    gates, down, head = (rows.pack(matrix).panels for matrix in matrices)
    block = [*[nothing] * 5, one, gates, nothing, bias, down, *[nothing] * 9]
    weights = [*block, one, head, nothing, nothing]
    h = torch.randn(1, D)
    ids, sizes = torch.zeros(1, steps, dtype=torch.long), [D, num_gates, 0, 0]
    _, after = rows.run_model(
        ids, torch.randn(3, width), weights, [h, nothing], sizes, "g", normalized=True
    )
    assert torch.equal(after[0], h)
