"""The selective scan: compiled and in pure torch, values and every gradient, against a loop."""

import pytest
import torch
from torch import Tensor

from minrnn.ops import selective
from minrnn.ops.selective import selective_scan

OP, OP_BACKWARD = torch.ops.minrnn.selective_scan, torch.ops.minrnn.selective_scan_backward
# (B, T, D, N): around the lanes (16), the block (64 channels), the chunk (32 steps) of the kernel
SHAPES = [
    (1, 1, 1, 1),
    (2, 2, 15, 3),
    (3, 31, 16, 1),
    (1, 32, 17, 16),
    (2, 33, 64, 2),
    (1, 65, 65, 4),
    (2, 97, 130, 5),
]


def _inputs(shape: tuple[int, int, int, int], dtype: torch.dtype) -> list[Tensor]:
    B, T, D, N = shape
    random = torch.Generator().manual_seed(sum(shape))

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=random, dtype=torch.float64)

    # from steps that nearly keep the state to steps that nearly drop it
    dt, A = (2 * normal(B, T, D) - 2).exp(), -normal(D, N).exp()
    inputs = [normal(B, T, D), dt, A, normal(B, T, N), normal(B, T, N), normal(B, D * N)]
    return [x.to(dtype) for x in inputs]


def _loop(*args) -> tuple[Tensor, Tensor]:
    """The equation, step by step."""
    u, dt, A, B, C, h0, zoh = args
    h, y = h0.unflatten(1, A.shape), []
    for t in range(u.shape[1]):
        a = (dt[:, t, :, None] * A).exp()
        w = torch.expm1(dt[:, t, :, None] * A) / A if zoh else dt[:, t, :, None]
        h = a * h + w * B[:, t, None] * u[:, t, :, None]
        y.append((h * C[:, t, None]).sum(2))
    return torch.stack(y, 1), h.flatten(1)


def _answer(run, inputs: list[Tensor], zoh: bool, wide: bool = False) -> list[Tensor]:
    leaves = [(x.double() if wide else x).requires_grad_() for x in inputs]
    y, h_T = run(*leaves, zoh)
    random = torch.Generator().manual_seed(7)
    dy, dh = (torch.randn(x.shape, generator=random, dtype=torch.float64) for x in (y, h_T))
    grads = torch.autograd.grad((y, h_T), leaves, (dy.to(y.dtype), dh.to(y.dtype)))
    return [y.detach(), h_T.detach(), *grads]


def _in_torch(*args) -> tuple[Tensor, Tensor]:
    """The operator's pure torch, forward and backward, in place of what the dispatcher picks."""
    *tensors, zoh = args

    class Run(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *tensors):
            ctx.save_for_backward(*tensors)
            return selective._forward(*tensors, zoh)

        @staticmethod
        def backward(ctx, dy, dh):
            with torch.no_grad():
                return selective._backward(dy, dh, *ctx.saved_tensors, zoh)

    return Run.apply(*tensors)


def _check(found: list[Tensor], wanted: list[Tensor], tolerance: float) -> None:
    for x, y in zip(found, wanted, strict=True):
        scale = y.abs().max().item()
        assert (x.double() - y).abs().max().item() <= tolerance * scale


@pytest.mark.parametrize("zoh", [False, True], ids=["euler", "zoh"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients_are_those_of_the_loop(shape, zoh, monkeypatch) -> None:
    inputs = _inputs(shape, torch.float32)
    wanted = _answer(_loop, inputs, zoh, wide=True)
    _check(_answer(OP, inputs, zoh), wanted, 3e-6)
    _check(_answer(OP, [x.double() for x in inputs], zoh), wanted, 1e-13)
    # pure torch: in one piece, and in pieces of a few steps
    for numbers in (1 << 20, 3 * shape[0] * shape[2] * shape[3]):
        monkeypatch.setattr(selective, "_PIECE", numbers)
        _check(_answer(_in_torch, inputs, zoh), wanted, 3e-6)
        _check(_answer(_in_torch, [x.double() for x in inputs], zoh), wanted, 1e-13)


def test_any_number_of_threads_gives_the_same_bits() -> None:
    inputs = _inputs((5, 70, 130, 4), torch.float32)
    threads, found = torch.get_num_threads(), []
    for number in (1, 2, 3):
        torch.set_num_threads(number)
        found.append(_answer(OP, inputs, False))
    torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(x, y) for x, y in zip(found[0], other, strict=True))


@pytest.mark.parametrize("zoh", [False, True])
def test_pure_torch_has_the_gradients_of_the_kernel(zoh: bool) -> None:
    u, dt, dy = torch.rand(3, 2, 7, 3, dtype=torch.float64)
    A, sides = -torch.rand(3, 4).double() - 0.1, torch.randn(2, 2, 7, 4, dtype=torch.float64)
    h0, dh_T = torch.randn(2, 2, 12, dtype=torch.float64)
    args = (dy, dh_T, u, dt, A, *sides, h0, zoh)
    # where the dispatcher calls it, autograd records nothing
    with torch._C._AutoDispatchBelowAutograd():
        found = selective._backward(*args)
    wanted = torch.ops.minrnn.selective_scan_backward(*args)
    for x, y in zip(found, wanted, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_states_that_grow_are_right(dtype: torch.dtype) -> None:
    # exponents from -800 to 800: where they do not overflow, and where they do
    u = torch.ones(1, 1, 33, dtype=dtype)
    dt = torch.linspace(-200, 200, 33, dtype=dtype)[None, None]
    A, one, h0 = (
        torch.full((33, 1), 4.0, dtype=dtype),
        torch.ones(1, 1, 1, dtype=dtype),
        1 + 0 * u[0],
    )
    y, _ = torch.ops.minrnn.selective_scan(u, dt, A, one, one, h0, False)
    torch.testing.assert_close(y, (4 * dt).exp() + dt, rtol=1e-4, atol=0)


def test_any_strides_are_taken() -> None:
    inputs = _inputs((2, 9, 5, 3), torch.float64)
    wide = [torch.stack([x, x], dim=-1)[..., 0] for x in inputs]
    assert not wide[0].is_contiguous()
    for x, y in zip(selective_scan(*wide, "zoh"), OP(*inputs, True), strict=True):
        assert torch.equal(x, y)


def test_pieces_hand_the_state_on() -> None:
    u, dt, A, B, C, h0 = _inputs((2, 40, 20, 3), torch.float32)
    y, h_T = selective_scan(u, dt, A, B, C, h0)
    found, h = [], h0
    for cut in (slice(0, 1), slice(1, 37), slice(37, 40)):
        part, h = selective_scan(u[:, cut], dt[:, cut], A, B[:, cut], C[:, cut], h)
        found.append(part)
    # to the bit: a step is the same arithmetic wherever a sequence is cut
    assert torch.equal(torch.cat(found, dim=1), y)
    assert torch.equal(h, h_T)


@pytest.mark.parametrize("zoh", [False, True], ids=["euler", "zoh"])
def test_second_derivatives(zoh: bool) -> None:
    inputs = tuple(x.requires_grad_() for x in _inputs((1, 5, 2, 3), torch.float64))
    assert torch.autograd.gradcheck(lambda *x: OP(*x, zoh), inputs)
    assert torch.autograd.gradgradcheck(lambda *x: OP(*x, zoh), inputs)


def test_the_operator_is_registered_whole() -> None:
    inputs = [x.requires_grad_() for x in _inputs((2, 5, 3, 2), torch.float64)]
    torch.library.opcheck(OP, (*inputs, False))
    torch.library.opcheck(OP_BACKWARD, (inputs[0].detach(), inputs[5].detach(), *inputs, False))


def test_no_states_of_all_steps_are_kept() -> None:
    """What forward and backward allocate beside their results does not grow with T * D * N."""
    B, D, N = 1, 64, 16
    for T in (512, 2048):
        inputs = [x.requires_grad_() for x in _inputs((B, T, D, N), torch.float32)]
        kept: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x, kept=kept: kept.append(x) or x, lambda x: x
        ):
            OP(*inputs, False)
        assert sum(x.numel() for x in kept) == sum(x.numel() for x in inputs)


def test_what_does_not_fit_is_named() -> None:
    u, dt, A, B, C, h0 = _inputs((2, 5, 3, 2), torch.float32)
    with pytest.raises(ValueError, match=r"`u` must have shape \(B, T, D\) and `A` \(D, N\)"):
        selective_scan(u[0], dt, A, B, C, h0)
    with pytest.raises(ValueError, match=r"`C` must have shape \(2, 5, 2\), got \(2, 4, 2\)"):
        selective_scan(u, dt, A, B, C[:, :4], h0)
    with pytest.raises(TypeError, match=r"`u` and `h0` must both be float32 or float64"):
        selective_scan(u, dt, A, B, C, h0.double())
    with pytest.raises(ValueError, match="`discretization` must be 'euler' or 'zoh', got 'ZOH'"):
        selective_scan(u, dt, A, B, C, h0, "ZOH")
    # what a direct call could reach is refused by the kernel itself
    for wrong in ((u, dt[:, :4], A, B, C, h0), (u, dt, A.double(), B, C, h0)):
        with pytest.raises(RuntimeError, match="expected"):
            OP(*wrong, False)
