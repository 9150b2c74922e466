"""The compiled kernels: where they are, what they refuse, and what is said without them."""

import subprocess
import sys

import pytest
import torch
from torch.autograd import forward_ad

from minrnn import info, ops
from minrnn.ops import reference, scans

OPS = torch.ops.minrnn


def _tree_scan(a, b, h0):
    return scans.blelloch(a, b, h0)


def _tree_mingru(k, v, h0):
    b = torch.sigmoid(k) * torch.where(v >= 0, v + 0.5, torch.sigmoid(v))
    return scans.blelloch(torch.sigmoid(-k), b, h0)


def _tree_minlstm(f, i, v, h0):
    total = torch.sigmoid(f) + torch.sigmoid(i)
    b = torch.sigmoid(i) / total * torch.where(v >= 0, v + 0.5, torch.sigmoid(v))
    return scans.blelloch(torch.sigmoid(f) / total, b, h0)


# in float64 and differentiated by autograd: the truth for sequences too long for the loop
SCANS = {"scan": _tree_scan, "mingru": _tree_mingru, "minlstm": _tree_minlstm}


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


def test_a_step_equals_the_whole_sequence_bit_for_bit() -> None:
    k, v = torch.randn(2, 3, 40, 37)
    h, h_T = ops.mingru(k, v)
    state = None
    for t in range(40):
        step, state = ops.mingru(k[:, t : t + 1], v[:, t : t + 1], state)
        assert torch.equal(step[:, 0], h[:, t])
    assert torch.equal(state, h_T)


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
    with pytest.raises(RuntimeError, match="`h0` must have shape"):
        OPS.scan_backward(x, x[:, 0, :2], x, None, x, None, None, False)


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_threads_do_not_change_the_result(threads: int) -> None:
    k, v = torch.randn(2, 3, 200, 130)
    expected = ops.mingru(k, v)[0]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert torch.equal(ops.mingru(k, v)[0], expected)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("D", range(33))
def test_every_width_and_misalignment(D: int) -> None:
    storage = torch.randn(2, 3 * (D + 3) * 7 + 8)
    for shift in range(3):
        k, v = (row[shift:].as_strided((3, 7, D), ((D + 3) * 7, D + 3, 1)) for row in storage)
        h, h_T = ops.mingru(k, v)
        expected, expected_T = reference.mingru(k.double(), v.double())
        torch.testing.assert_close(h.double(), expected, rtol=2e-6, atol=1e-6)
        torch.testing.assert_close(h_T.double(), expected_T, rtol=2e-6, atol=1e-6)


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


@pytest.mark.parametrize("D", [1, 2, 3, 4, 5, 7, 8, 12, 15, 16])
@pytest.mark.parametrize("name", ["scan", "mingru", "minlstm"])
def test_long_narrow_rows_match_the_reference(name: str, D: int) -> None:
    T = 4133
    gates = [torch.randn(1, T, D, dtype=torch.float64) for _ in range(2 + (name == "minlstm"))]
    if name == "scan":
        gates[0] = torch.sigmoid(gates[0])
    h0, weight, weight_T = torch.randn(1, D).double(), torch.randn(1, T, D), torch.randn(1, D)
    found = []
    for kernel, dtype in ((getattr(ops, name), torch.float32), (SCANS[name], torch.float64)):
        inputs = [x.to(dtype).requires_grad_() for x in (*gates, h0)]
        h, h_T = kernel(*inputs)
        loss = (h * weight).sum() + (h_T * weight_T).sum()
        found.append([h, h_T, *torch.autograd.grad(loss, inputs)])
    for ours, truth in zip(*found, strict=True):
        torch.testing.assert_close(ours.double(), truth, rtol=1e-5, atol=2e-6)


def test_narrow_rows_run_backwards_and_in_pieces() -> None:
    k, v = torch.randn(2, 1, 1000, 3)
    h, h_T = ops.mingru(k, v)
    flipped, last = ops.mingru(k.flip(1), v.flip(1), reverse=True)
    torch.testing.assert_close(flipped.flip(1), h, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(last, h_T, rtol=1e-5, atol=1e-6)
    _, half = ops.mingru(k[:, :501], v[:, :501])
    torch.testing.assert_close(
        ops.mingru(k[:, 501:], v[:, 501:], half)[1], h_T, rtol=1e-5, atol=1e-6
    )
