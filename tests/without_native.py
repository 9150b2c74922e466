"""A pytest plugin, `-p tests.without_native`: the suite on pure torch, as without a compiler."""

import pytest
import torch

# now, not in pytest_configure: conftest.py imports the operators before that is called
torch.ops.load_library = lambda path: None


def pytest_configure(config: pytest.Config) -> None:
    """That pure torch is warned of has a test of its own."""
    config.addinivalue_line("filterwarnings", "ignore:minrnn runs on pure torch")


def pytest_sessionstart(session: pytest.Session) -> None:
    """Stop if compiled kernels serve after all."""
    from minrnn.info import kernels

    served = set(kernels()["CPU"].values())
    assert served == {"pure torch"}, served
