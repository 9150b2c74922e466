"""A pytest plugin, `-p tests.on_triton`: the suite on the GPU's kernels, interpreted on the CPU.

The kernels run as they are, in Triton's interpreter, but in smaller blocks: it takes a tenth of a
millisecond for each operation, and with blocks of a GPU most of them would be on padding.
"""

import os

# read when triton is first imported
os.environ["TRITON_INTERPRET"] = "1"

from typing import Any

import numpy as np
import pytest
import torch

# what is broken, or overflows, is the tests' own
np.seterr(all="ignore")
# now, not in pytest_configure: conftest.py imports the operators before that is called
torch.ops.load_library = lambda path: None

_library = torch.library.Library("minrnn", "IMPL")


def pytest_sessionstart(session: pytest.Session) -> None:
    """Let Triton's kernels serve the CPU."""
    import triton.language as tl
    from triton.runtime import interpreter

    from minrnn.info import kernels
    from minrnn.ops import gpu
    from minrnn.ops.gpu import kernels as triton_kernels
    from minrnn.ops.operators import NAMES

    def to_bfloat16(builder: Any, source: Any, dtype: Any) -> Any:
        """To the nearest, as GPUs do (cvt.rn); the interpreter would cut digits off."""
        if (source.dtype.scalar, dtype.scalar) != (tl.float32, tl.bfloat16):
            return builder.cast_impl(source, dtype)
        rounded = torch.from_numpy(source.data).bfloat16().view(torch.uint16).numpy()
        return interpreter.TensorHandle(rounded, tl.bfloat16)

    def multiply_add(builder: Any, x: Any, y: Any, z: Any) -> Any:
        """Rounded once, as GPUs do; the interpreter would round the product too."""
        wide = x.data.astype(np.float64) * y.data + z.data
        return interpreter.TensorHandle(wide.astype(x.data.dtype), z.dtype)

    interpreter.InterpreterBuilder.create_fp_trunc = to_bfloat16
    interpreter.InterpreterBuilder.create_fma = multiply_add
    triton_kernels.INTERPRETED = triton_kernels.Device(multiprocessors=1, warp=4)
    triton_kernels.LEAST = 4
    gpu.register(_library, NAMES, "CPU")
    served = kernels()["CPU"]
    assert {name for name, kernel in served.items() if kernel == "compiled"} == set(NAMES), served
