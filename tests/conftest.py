"""What holds for every test: one seed, a number of threads, NaN in unwritten memory; backends."""

from collections.abc import Iterator
from types import ModuleType
from typing import NamedTuple

import pytest
import torch

from minrnn import ops
from minrnn.cli.devices import device_of

# memory that nobody wrote holds NaN, so that an output left unwritten cannot pass by chance
torch.use_deterministic_algorithms(True)
torch.utils.deterministic.fill_uninitialized_memory = True

# plugins: importing one changes what serves the operators; and what needs a browser
collect_ignore = ["on_triton.py", "other_rounding.py", "without_native.py", "page.py"]


class Backend(NamedTuple):
    """The operators, and the device that their tensors live on."""

    ops: ModuleType
    device: str


def pytest_addoption(parser: pytest.Parser) -> None:
    """`make test-gpu` asks for another device, `make test-portable` for more threads."""
    parser.addoption("--device", default="cpu", help="where tests of operators run, e.g. cuda")
    parser.addoption("--threads", default=1, type=int, help="of torch, in each process of pytest")


def pytest_configure(config: pytest.Config) -> None:
    """Stop where the device is not there: nothing is skipped."""
    torch.set_num_threads(config.getoption("--threads"))
    device_of(config.getoption("--device"))


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    """The operators on the device that was asked for; what the test makes lies there."""
    chosen = Backend(ops, request.config.getoption("--device"))
    with torch.device(chosen.device):
        yield chosen


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(0)
