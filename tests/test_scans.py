"""The named algorithms against the reference in float64, and the number of steps they take."""

from math import log2
from typing import Any

import pytest
import torch
from cases import TOLERANCES
from torch import Tensor, float32, float64
from torch.autograd import gradcheck, gradgradcheck
from torch.utils._python_dispatch import TorchDispatchMode

from minrnn.ops import reference
from minrnn.ops.scans import blelloch, hillis_steele, log_space, sequential

REAL = (sequential, hillis_steele, blelloch)
ALL = (*REAL, log_space)
LENGTHS = (0, 1, 2, 3, 5, 8, 13, 64, 65)


def _name(scan: Any) -> str:
    return scan.__name__


def _coefficients(scan: Any, T: int, dtype: torch.dtype = float64) -> tuple[Tensor, ...]:
    """a, b and h0; of both signs where the algorithm takes them."""
    a, b = torch.tanh(torch.randn(2, T, 3)), torch.randn(2, T, 3)
    given = (a, b, torch.randn(2, 3))
    return tuple((x.abs() + 0.1 if scan is log_space else x).to(dtype) for x in given)


def _resets(T: int) -> Tensor:
    reset = torch.rand(2, T) < 0.3
    reset[0, :1] = reset[1, -1:] = True
    return reset


def _compare(scan: Any, result: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> None:
    # measured 9e-16, and 1.0e-14 in log space
    limit = 2e-14 if scan is log_space else TOLERANCES[float64]
    for actual, expected in zip(result, wanted, strict=True):
        torch.testing.assert_close(actual, expected, rtol=limit, atol=limit)


@pytest.mark.parametrize("T", LENGTHS)
@pytest.mark.parametrize("scan", ALL, ids=_name)
def test_scan_matches_reference(scan, T):
    a, b, h0 = _coefficients(scan, T)
    _compare(scan, scan(a, b, h0), reference.scan(a, b, h0))
    _compare(scan, scan(a, b), reference.scan(a, b))


# trap 11
@pytest.mark.parametrize("T", LENGTHS)
@pytest.mark.parametrize("scan", REAL, ids=_name)
def test_scan_with_resets_matches_reference(scan, T):
    a, b, h0 = _coefficients(scan, T)
    reset = _resets(T)
    _compare(scan, scan(a, b, h0, reset), reference.scan(a, b, h0, reset=reset))
    _compare(scan, scan(a, b, None, reset), reference.scan(a, b, reset=reset))


# trap 2, trap 17
@pytest.mark.parametrize("T", [1, 2, 5])
@pytest.mark.parametrize("scan", ALL, ids=_name)
def test_scan_derivatives_match_finite_differences(scan, T):
    leaves = [x.requires_grad_() for x in _coefficients(scan, T)]
    assert gradcheck(scan, leaves)
    assert gradgradcheck(scan, leaves)
    assert gradcheck(scan, leaves[:2])


# trap 11
@pytest.mark.parametrize("scan", REAL, ids=_name)
def test_scan_derivatives_with_resets_match_finite_differences(scan):
    reset = _resets(5)
    leaves = [x.requires_grad_() for x in _coefficients(scan, 5)]
    assert gradcheck(lambda *x: scan(*x, reset), leaves)


def _cut_after(broken: str, value: float) -> tuple[Tensor, Tensor, Tensor]:
    """a, b and a reset at step 3, with `value` in the coefficients named before that."""
    a, b, _ = _coefficients(sequential, 8)
    for name, x in {"a": a, "b": b}.items():
        x[:, :3] = value if name in broken else x[:, :3]
    return a.requires_grad_(), b.requires_grad_(), torch.arange(8).eq(3).expand(2, 8)


# trap 11
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("broken", ["b", "ab"])
@pytest.mark.parametrize("scan", REAL, ids=_name)
def test_reset_drops_whatever_came_before(scan, broken, value):
    a, b, reset = _cut_after(broken, value)
    h, h_T = scan(a, b, None, reset)
    wanted, wanted_T = reference.scan(a[:, 3:], b[:, 3:])
    _compare(scan, (h[:, 3:], h_T), (wanted, wanted_T))


# trap 11
@pytest.mark.parametrize("scan", REAL, ids=_name)
def test_gradients_of_a_broken_state_stop_at_a_reset(scan):
    a, b, reset = _cut_after("b", float("nan"))
    da, db = torch.autograd.grad(scan(a, b, None, reset)[1].sum(), (a, b))
    wanted = torch.autograd.grad(reference.scan(a[:, 3:], b[:, 3:])[1].sum(), (a, b))
    for actual, expected in zip((da, db), wanted, strict=True):
        torch.testing.assert_close(actual[:, 3:], expected[:, 3:])
    assert db[:, :3].eq(0).all()


# trap 4
@pytest.mark.parametrize("scan", ALL, ids=_name)
def test_two_scans_equal_one(scan):
    a, b, h0 = _coefficients(scan, 13)
    whole = scan(a, b, h0)
    for cut in (0, 1, 6, 13):
        first, state = scan(a[:, :cut], b[:, :cut], h0)
        second, state = scan(a[:, cut:], b[:, cut:], state)
        _compare(scan, (torch.cat([first, second], dim=1), state), whole)


# trap 13
@pytest.mark.parametrize("scan", ALL, ids=_name)
def test_product_of_decays_may_underflow(scan):
    a, b, h0 = _coefficients(scan, 40, float32)
    a = torch.full_like(a, 1e-30)
    h, _ = scan(a, b, h0)
    # measured 0, and 1.2e-4 in log space, whose sums reach 40 * log(1e30)
    limit = 2e-4 if scan is log_space else 1e-7
    torch.testing.assert_close(h.double(), sequential(a, b, h0)[0].double(), rtol=limit, atol=0)


# trap 5
@pytest.mark.parametrize("scan", ALL, ids=_name)
def test_precision_after_thousands_of_steps(scan):
    a, b, h0 = _coefficients(log_space, 4096, float32)
    a = a.clamp(max=1.0)
    wanted, _ = sequential(a.double(), b.double(), h0.double())
    # measured 1.6e-7, 2.5e-7, 2.1e-7 in this order, and 3.5e-4 in log space
    limit = 5e-4 if scan is log_space else 4e-7
    torch.testing.assert_close(scan(a, b, h0)[0].double(), wanted, rtol=limit, atol=0)


class _Count(TorchDispatchMode):
    """Counts the calls that do arithmetic on states."""

    calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        moving = {"slice", "unsqueeze", "select", "cat", "stack", "view", "new_zeros", "alias"}
        self.calls += func.overloadpacket.__name__ not in moving
        return func(*args, **kwargs or {})


def _calls(scan: Any, T: int) -> int:
    a, b, _ = _coefficients(scan, T)
    with _Count() as count:
        scan(a, b)
    return count.calls


@pytest.mark.parametrize(("scan", "per_level"), [(hillis_steele, 2), (blelloch, 3)])
def test_parallel_scans_take_logarithmically_many_steps(scan, per_level):
    # composing neighbours is two calls, the way down the tree and its last step one each
    last = 1 if scan is blelloch else 0
    for T in (16, 64, 1024):
        assert _calls(scan, T) == per_level * log2(T) + last
    # a length between takes as many as the power of two above
    assert _calls(scan, 1000) == _calls(scan, 1024)


def test_sequential_takes_as_many_steps_as_there_are():
    for T in (16, 64, 1024):
        assert _calls(sequential, T) == T


# trap 2, trap 3
@pytest.mark.parametrize("value", [0.0, -2.0, float("nan")])
@pytest.mark.parametrize("name", ["a", "b", "h0"])
def test_log_space_refuses_what_has_no_logarithm(name, value):
    given = dict(zip(("a", "b", "h0"), _coefficients(log_space, 3), strict=True))
    given[name][0, 1] = value
    message = (
        f"^`{name}` must be > 0 everywhere: log space has no sign and no zero, "
        f"got a smallest value of {value:g}$"
    )
    with pytest.raises(ValueError, match=message):
        log_space(**given)
