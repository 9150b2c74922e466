"""A pytest plugin, `-p tests.other_rounding`: a machine whose products and sums round otherwise.

Libraries promise no order of additions: a matrix product, a convolution or a sum may round
differently for another shape, layout or number of threads, and on another processor it does. Here
it always does. Each result is moved by up to one unit in the last place, by numbers that follow
from the sizes, strides and threads of the call and from nothing else: the same call twice gives the
same bits, and no two calls of different sizes do. A test that passes here compares no bits that
only this machine's libraries make equal.
"""

import functools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

# kept for the session: a library that is collected takes its kernels back
_library = torch.library.Library("aten", "IMPL")


@functools.lru_cache(maxsize=4096)
def _directions(key: tuple[Any, ...], shape: torch.Size) -> Tensor:
    """-1, 0 or 1 for each number of the result, drawn by `key`."""
    generator = torch.Generator().manual_seed(hash(key) % 2**31)
    return torch.randint(-1, 2, shape, generator=generator, dtype=torch.int8, device="cpu")


def _key(name: str, args: Any) -> tuple[Any, ...]:
    sizes = [(*x.shape, *x.stride()) for x in args if isinstance(x, Tensor)]
    # integers hash alike in every process, strings do not
    return (len(name), sum(map(ord, name)), torch.get_num_threads(), *sizes)


def _rounded_otherwise(name: str, result: Tensor, args: Any) -> Tensor:
    if not result.is_floating_point() or result.numel() == 0:
        return result
    directions = _directions(_key(name, args), result.shape)
    towards = torch.where(directions > 0, torch.inf, -torch.inf).to(result.dtype)
    moved = torch.nextafter(result, torch.where(directions == 0, result, towards))
    # sums of small whole numbers and sixteenths are exact in every order
    sixteenths = 16 * result
    exact = (sixteenths == sixteenths.round()) & (result.abs() < 128) | ~result.isfinite()
    return torch.where(exact, result, moved)


def _override(name: str, call: Callable[..., Tensor]) -> None:
    # what is compiled calls it as it is
    @torch.compiler.disable
    def kernel(*args: Any, **kwargs: Any) -> Tensor:
        return _rounded_otherwise(name, call(*args, **kwargs), args)

    _library.impl(name, kernel, "CPU", allow_override=True)


def _through(out: Any) -> Callable[..., Tensor]:
    """The operator that writes into `out=`, which keeps the library's own kernel."""

    def call(*args: Any, **kwargs: Any) -> Tensor:
        # sums of integers and bools are int64
        x = args[0].dtype
        plain = x if x.is_floating_point or x.is_complex else torch.int64
        dtype = kwargs.get("dtype") or plain
        return out(*args, **kwargs, out=torch.empty(0, dtype=dtype, device="cpu"))

    return call


def pytest_configure(config: pytest.Config) -> None:
    """Put the kernels in place, once in each process."""
    aten = torch.ops.aten
    with warnings.catch_warnings():
        # of kernels that are overridden, which is meant
        warnings.simplefilter("ignore")
        for name, out in {
            "mm": aten.mm.out,
            "addmm": aten.addmm.out,
            "bmm": aten.bmm.out,
            "baddbmm": aten.baddbmm.out,
            "sum.dim_IntList": aten.sum.IntList_out,
            "mean.dim": aten.mean.out,
        }.items():
            _override(name, _through(out))

        def convolve(*args: Any) -> Tensor:
            # benchmark, deterministic, cudnn_enabled, allow_tf32
            return aten._convolution(*args, False, True, False, False)

        _override("convolution", convolve)
