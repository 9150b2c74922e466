"""The compiled kernels: where they are, what they refuse, and what is said without them."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import FUSED, GATES
from torch.autograd import forward_ad

import minrnn
from minrnn import info, ops
from minrnn.ops import native

OPS = torch.ops.minrnn


def test_every_operator_has_a_compiled_kernel() -> None:
    assert set(info.kernels()["CPU"].values()) == {"compiled"}


def test_without_the_library_pure_torch_runs_and_says_so_once() -> None:
    script = (
        "import torch; torch.ops.load_library = lambda path: None\n"
        "import minrnn\n"
        "x = torch.zeros(1, 2, 3)\n"
        "for _ in range(3): minrnn.mingru(x, x)\n"
        "print(set(minrnn.info.kernels()['CPU'].values()))"
    ).replace("import minrnn\n", "import minrnn, minrnn.info\n")
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout == "{'pure torch'}\n"
    assert done.stderr.count("UserWarning: minrnn runs on pure torch") == 1


def test_library_that_does_not_load_is_said_once_and_pure_torch_runs(tmp_path: Path) -> None:
    package = Path(minrnn.__file__).parent
    shutil.copytree(package, tmp_path / "minrnn", ignore=shutil.ignore_patterns("_native.*"))
    broken = tmp_path / "minrnn" / "ops" / "_native.so"
    broken.write_bytes(b"built for another machine")
    script = (
        "import torch, minrnn\n"
        "x = torch.zeros(1, 2, 3)\n"
        "for _ in range(3): minrnn.mingru(x, x)\n"
        "print(*minrnn.ops.native.reason.split()[:2])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        cwd=tmp_path,
    )
    assert done.stdout == f"{broken} does\n"
    assert done.stderr.count("minrnn runs on pure torch") == 1
    assert f"UserWarning: minrnn runs on pure torch: {broken} does not load: " in done.stderr


def test_what_lies_beside_the_library_is_not_loaded(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(native, "reason", "set by the test")
    for name in ("_native.pdb", "_native.lib", "_native.so.old"):
        (tmp_path / name).write_bytes(b"")
    native.load(tmp_path)
    assert native.reason is not None
    assert native.reason.startswith("its CPU kernels were not built (they need torch and a C++17")


def test_direct_calls_cannot_reach_foreign_memory() -> None:
    x = torch.zeros(1, 4, 3)
    with pytest.raises(RuntimeError, match="gates must have equal shapes"):
        OPS.mingru(x, x[:, :2], None, "g", None, None, False)
    with pytest.raises(RuntimeError, match="gates must have equal dtypes"):
        OPS.mingru(x, x.double(), None, "g", None, None, False)
    with pytest.raises(RuntimeError, match=r"`h0` must have shape \(1, 3\)"):
        OPS.mingru(x, x, x[0, :, 0][None], "g", None, None, False)
    with pytest.raises(RuntimeError, match="`cu_seqlens` must rise from 0 to T = 4"):
        OPS.scan(x, x, None, None, torch.tensor([0, 9, 4]), False)
    with pytest.raises(RuntimeError, match=r"`reset` must have shape \(B, T\) and dtype bool"):
        OPS.scan(x, x, None, torch.zeros(1, 3, dtype=torch.bool), None, False)
    with pytest.raises(RuntimeError, match="`candidate` must be one of"):
        OPS.mingru(x, x, None, "relu", None, None, False)
    with pytest.raises(RuntimeError, match="`dh_T` must have shape"):
        OPS.scan_backward(x, x[:, 0, :2], x, None, x, None, None, False)


@pytest.mark.parametrize("name", FUSED)
def test_fused_operator_refuses_what_is_no_row_of_gates(name: str) -> None:
    num = len(GATES[FUSED[name]])
    options = ("g", False) if num == 2 else ("g", True, False)
    op, backward = getattr(OPS, name), getattr(OPS, f"{name}_backward")
    h, h_T = torch.zeros(1, 4, 3), torch.zeros(1, 3)
    wanted = rf"gates must have shape \(B, T, {num} \* D\)"
    for gates in (torch.zeros(1, 4, 3 * num + 1), torch.zeros(4, 3 * num)):
        with pytest.raises(RuntimeError, match=wanted):
            op(gates, None, *options, None, None, False)
    with pytest.raises(RuntimeError, match=wanted):
        backward(h, h_T, torch.zeros(1, 4, 3 * num + 1), None, h, *options, None, None, False)
    for T, D in ((5, 3), (4, 2)):
        gates = torch.zeros(1, T, num * D)
        with pytest.raises(RuntimeError, match="gates must have equal shapes"):
            backward(h, h_T, gates, None, h, *options, None, None, False)


# torch's own, on the first use of forward mode
@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_forward_mode_is_refused() -> None:
    k, v = torch.randn(2, 1, 3, 2)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(k, v)
        with pytest.raises(NotImplementedError, match="forward-mode derivatives are not supported"):
            ops.mingru(dual, v)
        with pytest.raises(NotImplementedError, match="forward-mode derivatives are not supported"):
            ops.scan(k, v, dual[:, 0])
