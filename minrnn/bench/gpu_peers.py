"""Scans that run on a GPU only, beside those of `peers` that run there as well."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from minrnn.bench import peers
from minrnn.bench.peers import Scan, bind_torch, require


def scans_of(recurrence: str) -> list[Scan]:
    """All that compute `recurrence` on a GPU, ours first. jax here comes for the CPU."""
    found = [one for one in peers.scans_of(recurrence) if one.bind is not peers.bind_jax]
    return [*found, *_SCANS] if recurrence == "scan" else found


def _accelerated(kernel: str) -> Callable[[], Callable[..., Tensor]]:
    return lambda: require("accelerated-scan", f"accelerated_scan.{kernel}").scan


def _hgrn(kernel: str) -> Callable[[], Callable[..., Tensor]]:
    """A scan of flash-linear-attention: its decay comes as a logarithm."""

    def load() -> Callable[..., Tensor]:
        run = getattr(require("fla-core", "fla.ops.hgrn"), kernel)
        return lambda a, b: run(b, a.log())[0]

    return load


def _compiled_torch_scan() -> Callable[..., Tensor]:
    from torch._higher_order_ops.associative_scan import associative_scan

    def compose(first: tuple[Tensor, ...], then: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        return first[0] * then[0], then[0] * first[1] + then[1]

    def run(a: Tensor, b: Tensor) -> Tensor:
        return associative_scan(compose, (a, b), dim=1, combine_mode="pointwise")[1]

    return torch.compile(run)


_TURNED = partial(bind_torch, transposed=True)
_SCANS = (
    Scan("accelerated-scan scalar", _accelerated("scalar"), _TURNED),
    Scan("accelerated-scan warp", _accelerated("warp"), _TURNED, max_steps=1 << 16),
    Scan("fla chunk_hgrn", _hgrn("chunk_hgrn")),
    Scan("fla fused_recurrent_hgrn", _hgrn("fused_recurrent_hgrn")),
    Scan("torch associative_scan, compiled", _compiled_torch_scan),
)
