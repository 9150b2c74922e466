"""How near are the GPU's kernels to its bandwidth, through time and over chunks of it?

Only kernels are launched, with nothing of torch around them: what `FILLED` and `CHUNKED` of
`minrnn.ops.gpu.kernels` are chosen by.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from minrnn.bench import peers, truth
from minrnn.bench.compare import Checked, Table, timed_rows
from minrnn.bench.gpu_compiled import DTYPES, OPTIONS
from minrnn.bench.measure import BOTH_BYTES, FORWARD_BYTES, Call
from minrnn.bench.scan import yardsticks
from minrnn.ops.gpu import kernels
from minrnn.ops.gpu.kernels import Plan

# (B, T, D): rows that fill a GPU, half of it, a quarter; a few; one; one of few channels
SHAPES = (
    (64, 4096, 1024),
    (32, 1024, 1024),
    (64, 1024, 256),
    (8, 4096, 512),
    (1, 65536, 256),
    (1, 1 << 20, 8),
)
QUICK_SHAPES = SHAPES[3:4]
# chunks, of a multiprocessor, that are tried beside the plan of a call
CHUNKED = (8, 16, 32)
SECONDS, QUICK_SECONDS = 0.3, 0.05


def measured(quick: bool, device: torch.device) -> Iterator[Table]:
    """Tables of each recurrence's kernels, forward and backward, in two dtypes.

    Args:
        quick: one shape, float32, fewer rounds.
        device: a GPU.
    """
    for dtype in list(DTYPES.values())[: 1 if quick else None]:
        for name in OPTIONS:
            for shape in QUICK_SHAPES if quick else SHAPES:
                yield from tables(name, dtype, shape, QUICK_SECONDS if quick else SECONDS, device)


def tables(
    name: str,
    dtype: torch.dtype,
    shape: tuple[int, int, int],
    seconds: float,
    device: torch.device,
) -> Iterator[Table]:
    """Two tables, forward and backward. Plans are held to the first, which is that of a call."""
    *gates, dh = (x.to(dtype) for x in truth.inputs(name, shape, device))
    plans = _plans(shape, dtype, device)
    for is_backward in (False, True):
        runs = {title: _run(name, gates, dh, plan, is_backward) for title, plan in plans.items()}
        wanted: list[Tensor] = []
        checked = {}
        for title, run in runs.items():
            found = [x.clone() for x in run()]
            wanted = wanted or found
            error = truth.error(found, [x.double() for x in wanted])
            # another order of additions, rounded to the dtype
            note = "" if error <= max(1e-5, 4 * torch.finfo(dtype).eps) else "wrong"
            calls = None if note else peers.Calls(run, run, list)
            checked[title] = Checked(calls, error, note)
        forward, both = FORWARD_BYTES[name], BOTH_BYTES[name]
        each = (both - forward if is_backward else forward) * dtype.itemsize // 4
        triads, num_bytes = yardsticks(dh, addition=False)
        num_bytes |= {title: each * dh.numel() for title in runs}
        rows = timed_rows(
            checked, lambda calls: Call(calls.forward), triads, num_bytes, seconds, device
        )
        pass_ = "backward" if is_backward else "forward"
        yield Table(f"{name} {pass_}, kernels alone, {dtype}", shape, "ms", rows)


def _plans(
    shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device
) -> dict[str, Plan]:
    """That of a call first."""
    B, T, D = shape
    gpu = kernels.device_of(device)
    chosen = kernels.plan_of(B, T, D, dtype, False, gpu)
    whole = kernels.plan_with(1, B, T, D, gpu)
    wanted = [-(-count * gpu.multiprocessors // whole.programs) for count in CHUNKED]
    tried = [kernels.plan_with(max(1, min(n, T // kernels.LEAST)), B, T, D, gpu) for n in wanted]
    titles = {}
    for plan in dict.fromkeys([chosen, whole, *tried]):
        title = "through time" if plan.chunks == 1 else f"{plan.chunks:,} chunks"
        titles[f"{title}, chosen" if plan == chosen else title] = plan
    return titles


def _run(
    name: str, gates: list[Tensor], dh: Tensor, plan: Plan, is_backward: bool
) -> Callable[[], list[Tensor]]:
    """The launches of a plan; they give their results, made before."""
    h, h_T = torch.empty_like(dh), torch.empty_like(dh[:, 0], dtype=torch.float32)
    rest = (OPTIONS[name], (None, None, False), plan)
    launches = kernels.forward_launches(name, gates, None, h, h_T, *rest)
    results = [h, h_T]
    if is_backward:
        _launch(launches, results)
        saved = gates[:1] if name == "scan" else gates
        grads, dh0 = [torch.empty_like(h) for _ in gates], torch.empty_like(h_T)
        given = (dh, torch.zeros_like(h_T), saved, None, h, grads, dh0)
        launches, results = kernels.backward_launches(name, *given, *rest), [*grads, dh0]
    return partial(_launch, launches, results)


def _launch(launches: list[kernels.Launch], results: list[Tensor]) -> list[Tensor]:
    for launch in launches:
        launch.run()
    return results
