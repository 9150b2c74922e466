"""A pytest plugin, `-p tests.without_native`: the suite on pure torch, as without a compiler."""

import pytest
import torch


def pytest_configure(config: pytest.Config) -> None:
    """Leave the compiled kernels unloaded; that this is warned of has a test of its own."""
    config.addinivalue_line("filterwarnings", "ignore:minrnn runs on pure torch")
    torch.ops.load_library = lambda path: None
