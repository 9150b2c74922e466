"""What holds for every test: one seed, one thread, NaN in unwritten memory; and the backends."""

from collections.abc import Iterator
from types import ModuleType
from typing import NamedTuple

import pytest
import torch

from minrnn import ops

torch.set_num_threads(1)
# memory that nobody wrote holds NaN, so that an output left unwritten cannot pass by chance
torch.use_deterministic_algorithms(True)
torch.utils.deterministic.fill_uninitialized_memory = True


class Backend(NamedTuple):
    """The operators of one backend, and the device that their tensors live on."""

    ops: ModuleType
    device: str


BACKENDS = {
    "cpu": Backend(ops, "cpu"),
}


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    """Each backend in turn; what the test makes lies on its device."""
    chosen = BACKENDS[request.param]
    with torch.device(chosen.device):
        yield chosen


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(0)
