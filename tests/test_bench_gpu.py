"""The benches on a GPU, as far as a machine without one can say: who competes, whose clock."""

import pytest
import torch

from minrnn import cli
from minrnn.bench import gpu_peers, measure, peers
from minrnn.bench.measure import Call
from minrnn.ops import gpu


def test_a_device_that_is_not_there_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert not torch.cuda.is_available()
    for name in ("scan", "length", "layer", "packed", "step", "mixers", "train-step"):
        assert cli.main(["bench", name, "--quick", "--device", "cuda"]) == 2
        said = capsys.readouterr()
        assert "`device` must be one of this machine's, got 'cuda'" in said.err
        assert said.out == ""


def test_plans_are_for_a_gpu(monkeypatch, capsys) -> None:
    assert cli.main(["bench", "gpu-plans", "--quick"]) == 2
    assert "`device` must be one of this machine's, got 'cuda'" in capsys.readouterr().err
    assert cli.main(["bench", "gpu-plans", "--device", "cpu"]) == 2
    assert "`device` must be a GPU, got 'cpu'" in capsys.readouterr().err
    monkeypatch.setattr(gpu, "is_installed", lambda: False)
    assert cli.main(["bench", "gpu-plans"]) == 2
    assert "triton is missing: pip install 'minrnn[gpu]'" in capsys.readouterr().err


def test_who_competes_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(package: str) -> str:
        raise peers.metadata.PackageNotFoundError(package)

    monkeypatch.setattr(peers.metadata, "version", missing)
    scans = {one.name: one for one in gpu_peers.scans_of("scan")}
    assert next(iter(scans)) == peers.OURS
    assert not [name for name in scans if name.startswith("jax")]
    assert {"log space", "step loop in Python", "torch associative_scan, compiled"} <= set(scans)
    wanted = {
        "accelerated-scan scalar": "accelerated-scan==0.3.1",
        "accelerated-scan warp": "accelerated-scan==0.3.1",
        "fla chunk_hgrn": "fla-core==0.6.0",
        "fla fused_recurrent_hgrn": "fla-core==0.6.0",
    }
    for name, package in wanted.items():
        with pytest.raises(peers.MissingPeerError, match=f"^missing: pip install {package}$"):
            scans[name].load()
    assert [one.name for one in gpu_peers.scans_of("mingru")][:2] == [peers.OURS, "log space"]


class _Gpu:
    """A queue of work: what is recorded in it has its time once what stands before it is done."""

    def __init__(self) -> None:
        self.asked, self.done = 0.0, 0.0

    def event(self, enable_timing: bool) -> "_Event":
        assert enable_timing
        return _Event(self)


class _Event:
    def __init__(self, gpu: _Gpu) -> None:
        self.gpu, self.at = gpu, -1.0

    def record(self, stream: object) -> None:
        self.at = self.gpu.asked

    def synchronize(self) -> None:
        self.gpu.done = max(self.gpu.done, self.at)

    def elapsed_time(self, later: "_Event") -> float:
        # torch raises for an event that has not been reached
        assert later.at <= self.gpu.done
        return 1e3 * (later.at - self.at)


def test_a_gpu_is_timed_by_its_own_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = _Gpu()
    monkeypatch.setattr(torch.cuda, "Event", gpu.event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)

    def work() -> None:
        # returns at once; the device is busy for a quarter of a second
        gpu.asked += 0.25

    clock = measure.clock_of(torch.device("cuda"))
    timing = measure.interleave({"work": Call(work)}, 1.0, clock)["work"]
    assert timing.median == pytest.approx(0.25)
    assert gpu.done == gpu.asked
    assert measure.clock_of(measure.CPU) is measure.time.perf_counter
