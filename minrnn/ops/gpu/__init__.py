"""The recurrences in Triton, for GPUs: NVIDIA's, and AMD's under the same key of the dispatcher.

Triton is optional, and imported by the first call.
"""

from collections.abc import Callable, Iterable
from importlib.util import find_spec
from typing import Any

from torch import Tensor
from torch.library import Library

from minrnn.ops.direct import check_call


def is_installed() -> bool:
    """Whether Triton is."""
    return find_spec("triton") is not None


def register(library: Library, names: Iterable[str], key: str) -> None:
    """Let Triton's kernels serve the operators `names` for a key of the dispatcher."""
    for name in names:
        library.impl(name, _late(name), key)


def _late(name: str) -> Callable[..., tuple[Tensor, ...]]:
    def run(*args: Any) -> tuple[Tensor, ...]:
        from minrnn.ops.gpu import kernels

        check_call(name, args, read_bounds=False)
        return getattr(kernels, name)(*args)

    return run
