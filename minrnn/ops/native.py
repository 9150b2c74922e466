"""The library of compiled kernels: loaded if it can be, else said where a person sees it."""

import warnings
from pathlib import Path

import torch

HOW_TO_GET = (
    "they need torch and a C++17 compiler, GCC 9 or later or Clang, when the package is installed: "
    "pip install --no-build-isolation --force-reinstall --no-deps minrnn"
)
_SUFFIXES = (".so", ".dylib", ".dll")

reason: str | None = None
"""why the compiled kernels do not serve; None while they do"""


def load(folder: Path) -> None:
    """Register the compiled kernels for the CPU by loading them; without them pure torch serves.

    A library that does not load is warned of here and now: somebody built it and expects it.
    """
    global reason
    paths = sorted(path for path in folder.glob("_native.*") if path.suffix in _SUFFIXES)
    reason = None if paths else f"its CPU kernels were not built ({HOW_TO_GET})"
    for path in paths:
        try:
            torch.ops.load_library(path)
        except (OSError, RuntimeError) as error:
            # on one line: the cause names what is missing, e.g. a symbol of another torch
            cause = " ".join(str(error.__cause__ or error).split())
            reason = f"{path} does not load: {cause}"
            warnings.warn(f"minrnn runs on pure torch: {reason}", stacklevel=2)


def warn_of_pure_torch() -> None:
    """Say at the first use that the compiled kernels were not built; Python prints it once."""
    if reason is None or "does not load" not in reason:
        why = reason or "its CPU kernels were not loaded"
        warnings.warn(f"minrnn runs on pure torch: {why}", stacklevel=1)
