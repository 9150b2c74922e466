"""The benches without the clock: who is checked, who is timed when, what is written down."""

import itertools
import json
import os
import subprocess
import sys

import pytest
import torch

from minrnn import cli
from minrnn.bench import (
    compare,
    layer,
    length,
    measure,
    memory,
    peers,
    report,
    scan,
    train_step,
    truth,
)
from minrnn.bench.compare import HERE, ONE_THREAD, STREAM, Checked, Entrant, Row, Table
from minrnn.bench.measure import Call, Timing, Turn

SHAPE = (2, 7, 3)


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """No package of another is installed, small arrays stand for the large ones."""

    def missing(package: str) -> str:
        raise measure.metadata.PackageNotFoundError(package)

    monkeypatch.setattr(peers.metadata, "version", missing)
    monkeypatch.setattr(measure, "large_triad", lambda device: measure.triad(1000, device))
    monkeypatch.setattr(measure, "MAX_ROUNDS", 3)
    # it would outlast the test
    monkeypatch.setattr(measure, "tell_allocator", lambda keep: measure.KEPT)


class _Clock:
    """Time passes only while a call runs."""

    def __init__(self) -> None:
        self.now, self.ran = 0.0, []

    def __call__(self) -> float:
        return self.now

    def call(self, name: str, seconds: float, threads: int = 0) -> Call:
        def run() -> None:
            self.now += seconds
            self.ran.append((name, torch.get_num_threads()))

        return Call(run, threads)


def test_competitors_take_turns() -> None:
    clock = _Clock()
    calls = {"a": clock.call("a", 1.0), "b": clock.call("b", 0.5, threads=2)}
    timings = measure.interleave(calls, 3.0, clock)
    # one trial each, which of slow calls is a round; then all in turn, the faster one in more
    assert clock.ran[:4] == [("a", 1), ("b", 2), ("a", 1), ("b", 2)]
    assert [name for name, _ in clock.ran] == ["a", "b", "a", *"bbb", "a", *"bb"]
    assert {threads for name, threads in clock.ran if name == "b"} == {2}
    assert torch.get_num_threads() == 1
    rounds = {name: (time.median, time.rounds) for name, time in timings.items()}
    assert rounds == {"a": (1.0, 3), "b": (0.5, 6)}


def test_a_call_slower_than_all_its_time_is_timed_once() -> None:
    clock = _Clock()
    for seconds, rounds in ((0.5, 1), (2.5 * measure.ONCE, 3)):
        timings = measure.interleave({"a": clock.call("a", measure.ONCE)}, seconds, clock)
        assert (timings["a"].median, timings["a"].rounds) == (measure.ONCE, rounds)
    assert len(clock.ran) == 2 + 3


def test_page_faults_of_one_call_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    touched: list[int] = []
    call = Call(lambda: touched.extend(range(7)))
    monkeypatch.setattr(measure, "page_faults", lambda: len(touched))
    assert measure.interleave({"a": call}, 0.0)["a"].faults == 7
    monkeypatch.setattr(measure, "page_faults", lambda: None)
    assert measure.interleave({"a": call}, 0.0)["a"].faults is None


def test_fast_calls_are_repeated_after_one_untimed() -> None:
    clock = _Clock()
    timings = measure.interleave({"a": clock.call("a", measure.TURN / 10)}, 0.0, clock)
    assert timings["a"].median == pytest.approx(measure.TURN / 10)
    assert len(clock.ran) == 1 + measure.MIN_ROUNDS * (1 + 10)


@pytest.mark.parametrize(("share", "total"), [(3, 10), (7, 7), (3, 200), (199, 200)])
def test_rounds_are_spread_evenly(share: int, total: int) -> None:
    turns = [turn for turn in range(total) if measure._takes_part(turn, share, total)]
    assert len(turns) == share
    assert turns[0] == 0
    gaps = {later - turn for turn, later in itertools.pairwise(turns)}
    assert max(gaps) - min(gaps) <= 1


def test_quartiles() -> None:
    assert measure.summarize([Turn(7.0)]) == Timing(7.0, 7.0, 7.0, 1)
    turns = [Turn(4.0, 9.0), Turn(1.0, 0.0), Turn(2.0, 8.0), Turn(3.0, 8.0), Turn(100.0, 1.0)]
    assert measure.summarize(turns) == Timing(3.0, 2.0, 4.0, 5, faults=8.0)


def test_ratios_and_shares() -> None:
    seconds = {"ours": 2e-3, "peer": 10e-3, STREAM: 1e-3, HERE: 4e-3}
    timings = {name: Timing(s, s / 2, 2 * s, 5) for name, s in seconds.items()}
    rows = compare.shares(timings, {"ours": 12, "peer": 12, STREAM: 24, HERE: 48})
    assert (rows["ours"].value, rows["ours"].low, rows["ours"].high) == (2.0, 1.0, 4.0)
    assert rows["peer"].ratio == pytest.approx(5.0)
    # 12 bytes in 2 ms are 6 bytes/ms, beside 24 and 12
    assert rows["ours"].share == pytest.approx(0.25)
    assert rows["ours"].share_here == pytest.approx(0.5)
    assert rows[STREAM].share == 1.0


def test_bytes_that_must_move() -> None:
    # float32: two or three inputs and h; back dh, h, and what the gradient reads and writes
    assert measure.FORWARD_BYTES == {"scan": 12, "mingru": 12, "minlstm": 16, "add": 12}
    assert measure.BOTH_BYTES == {"scan": 32, "mingru": 36, "minlstm": 48}
    run, num_bytes = measure.triad(10)
    assert num_bytes == 120
    assert torch.equal(run(), torch.full((10,), 7.0))


def _entrant(run, **options) -> Entrant:
    *gates, dh = truth.inputs("scan", SHAPE)
    return Entrant(
        "peer",
        lambda: peers.bind_torch(run, gates, dh),
        lambda: truth.answer("scan", gates, dh),
        **options,
    )


def test_a_wrong_competitor_gets_no_time() -> None:
    for run in (
        lambda a, b: peers.step_loop(a, b) * 1.001,
        # right values, wrong gradient
        lambda a, b: peers.step_loop(a, b) + 0 * a - (b - b.detach()) / 100,
        lambda a, b: peers.step_loop(a, b) * torch.nan,
    ):
        checked = compare.check(_entrant(run))
        assert checked.calls is None
        assert checked.note.startswith("wrong: ")
        [row] = compare.timed_rows({"peer": checked}, lambda c: Call(c.both), {}, {}, 0.0)
        assert row.value is None
        assert row.error is not None
        assert "wrong" in "\n".join(report.lines(Table("scan", SHAPE, "ms", (row,))))
    assert compare.check(_entrant(peers.step_loop)).calls is not None


def test_a_competitor_that_raises_ends_nothing() -> None:
    def raises(a, b):
        raise RuntimeError("no such kernel\nand more")

    assert compare.check(_entrant(raises)) == Checked(
        None, None, "failed: RuntimeError: no such kernel"
    )


def test_log_space_is_held_to_float64_as_well() -> None:
    *gates, dh = truth.inputs("scan", SHAPE)

    def rough(a, b):
        return peers.step_loop(a, b) * 1.01

    wide = [x.double() for x in gates]

    def load64(run):
        return lambda: peers.bind_torch(run, wide, dh.double())

    assert compare.check(_entrant(rough, load64=load64(peers.step_loop))).calls is not None
    checked = compare.check(_entrant(rough, load64=load64(rough)))
    assert (checked.calls, checked.note) == (None, "wrong, in float64 too")


def test_errors_are_relative_to_the_largest_entry() -> None:
    x = torch.tensor([1.0, -4.0])
    assert truth.error([x + 1, x], [x, x]) == 0.25
    for wrong in ([x], [x, x[:1]], [x, x * torch.nan]):
        assert truth.error(wrong, [x, x]) == float("inf")


@pytest.mark.parametrize("recurrence", scan.RECURRENCES)
def test_built_in_scans_and_cells_are_right(recurrence: str) -> None:
    *gates, dh = truth.inputs(recurrence, (2, 40, 3))
    wanted = truth.answer(recurrence, gates, dh)
    for one in peers.scans_of(recurrence):
        if one.name in ("minrnn", "log space") or "step loop" in one.name:
            calls = peers.bind_torch(one.load(), gates, dh)
            found = [*calls.read(calls.both()), *calls.read(calls.forward())]
            assert truth.error(found, [*wanted, wanted[0]]) < truth.TOLERANCE, one.name


def test_a_layout_is_turned_there_and_back() -> None:
    *gates, dh = truth.inputs("scan", SHAPE)

    def run(a, b):
        assert a.shape == (2, 3, 7)
        assert a.is_contiguous()
        return peers.step_loop(a.transpose(1, 2), b.transpose(1, 2)).transpose(1, 2)

    calls = peers.bind_torch(run, gates, dh, transposed=True)
    assert truth.error(calls.read(calls.both()), truth.answer("scan", gates, dh)) < 1e-6


def test_layers_of_torch_and_loops_are_right(alone) -> None:
    x, dh = layer.inputs((2, 6, 4))
    notes = {one.name: layer.checked_layer(one, x, dh) for one in peers.LAYERS}
    for name, checked in notes.items():
        if name.startswith("minGRU-pytorch"):
            assert checked.note == "missing: pip install minGRU-pytorch==0.2.1"
        elif name.startswith("mingru-scans"):
            assert checked.note == "missing: pip install mingru-scans==0.2.0"
        else:
            assert checked.calls is not None, (name, checked)
    assert "itself" in notes["nn.GRU"].note


def test_projections_of_layers_are_exact_and_not_zero() -> None:
    x, _ = layer.inputs((4, 500, 64))
    for kind in (peers.MinGRU, peers.MinLSTM):
        module = kind(64, 64, batch_first=True)
        layer._round_weights(module)
        gates = peers.our_gates(module, x)[1]
        exact = peers.our_gates(module.double(), x.double())[1]
        for gate, wanted in zip(gates, exact, strict=True):
            assert torch.equal(gate.double(), wanted)
            assert bool((gate != 0).all())


def test_scan_prints_a_table_and_writes_what_it_measured(
    alone, monkeypatch, capsys, tmp_path
) -> None:
    monkeypatch.setattr(scan, "QUICK_SHAPES", ((1, 12, 2),))
    monkeypatch.setattr(scan, "QUICK_SECONDS", 0.0)
    assert cli.main(["bench", "scan", "--quick", "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    for title in ("scan forward at (B, T, D) = (1, 12, 2)", "minlstm forward + backward at"):
        assert title in said
    for name in ("mambapy", "assoc-scan", "accelerated-scan", "jax"):
        assert f"missing: pip install {name}" in said
    assert (tmp_path / "out" / "bench-scan.png").read_bytes().startswith(b"\x89PNG")
    facts = json.loads((tmp_path / "out" / "bench-scan.json").read_text())
    assert facts["command"] == "minrnn bench scan --quick"
    assert {"processor", "cores", "threads", "last_level_cache", "allocator"} <= set(
        facts["machine"]
    )
    assert "python" in facts["versions"]
    assert "commit" in facts
    assert len(facts["tables"]) == 6
    first = facts["tables"][0]["rows"][0]
    assert first["name"] == "minrnn"
    assert first["ratio"] == 1.0
    assert first["value"] > 0
    assert first["error"] < truth.TOLERANCE


def test_length_measures_one_operator_at_many_lengths(alone, monkeypatch, capsys, tmp_path) -> None:
    monkeypatch.setattr(length, "QUICK_LENGTHS", (4, 600))
    monkeypatch.setattr(length, "QUICK_SECONDS", 0.0)
    assert cli.main(["bench", "length", "--quick", "--out", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "mingru forward at B = 1, D = 16; allocator keeps its pages" in said
    assert "T = 600" in said
    assert (tmp_path / "bench-length.png").read_bytes().startswith(b"\x89PNG")
    tables = json.loads((tmp_path / "bench-length.json").read_text())["tables"]
    assert [table["title"].split()[0] for table in tables] == list(scan.RECURRENCES)
    for table in tables:
        assert [row["T"] for row in table["rows"]] == [4, 600]
        for row in table["rows"]:
            # milliseconds of one call, nanoseconds of one element
            assert row["per_element"] == pytest.approx(row["value"] * 1e6 / (row["T"] * 16))
            assert row["share_here"] > 0
            assert row["error"] < truth.TOLERANCE


def test_values_in_pieces_are_the_tree_scan(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(truth, "PIECE", 100)
    for recurrence in scan.RECURRENCES:
        *gates, _ = truth.inputs(recurrence, (1, 730, 9))
        wanted = truth.recurrence64(recurrence, gates)
        assert truth.error([truth.values(recurrence, gates)], [wanted]) < 1e-14


def test_a_wrong_operator_has_no_time_at_any_length(alone, monkeypatch) -> None:
    right = length.ops.mingru
    monkeypatch.setattr(length.ops, "mingru", lambda k, v: (right(k, v)[0] * 1.001, None))
    rows = length._rows("mingru", (4, 8), 0.0, measure.CPU)
    assert [(row.value, row.note) for row in rows] == [(None, "wrong"), (None, "wrong")]


def test_the_gain_of_more_threads_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    timings = {"a": Timing(1.0, 1.0, 1.0, 3), "a" + ONE_THREAD: Timing(1.8, 1.8, 1.8, 3)}
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert compare._yardstick_note("a" + ONE_THREAD, timings, {}) == "x 1.80 on 2 threads"
    assert compare._yardstick_note("a", timings, {"a": 3 * 10**9}) == "3.0 GB/s"


_FAULTS = """
import torch
from minrnn.bench import measure
x = torch.ones(12 << 20)
def faults():
    timing = measure.interleave({"add": measure.Call(lambda: x + x)}, 0.0)["add"]
    return round(timing.faults)
for keep in (False, True):
    said = measure.tell_allocator(keep)
    # the checks of a bench take more memory than its calls, and leave it behind
    torch.ones(48 << 20)
    print(said, faults(), sep=", ")
"""


@pytest.mark.skipif(not measure.allocator().startswith("glibc"), reason="another allocator")
def test_the_allocator_does_as_it_is_told() -> None:
    # a system that reclaims idle pages, or a heap that cannot grow in place, may spoil a process
    for _ in range(4):
        ended = subprocess.run([sys.executable, "-c", _FAULTS], capture_output=True, text=True)
        returned, kept = (line.split(", ") for line in ended.stdout.splitlines())
        assert returned[0] == measure.RETURNED
        assert 0 < int(returned[1]) <= (48 << 20) // os.sysconf("SC_PAGE_SIZE") + 100
        assert kept[0] == measure.KEPT
        if kept[1] == "0":
            return
    raise AssertionError(f"{kept[1]} pages were taken anew in each process")


def test_layer_and_train_step_run_without_peers(alone, monkeypatch, capsys) -> None:
    monkeypatch.setattr(layer, "QUICK_SHAPES", ((1, 5, 4),))
    monkeypatch.setattr(layer, "QUICK_LOOP_SHAPES", ((1, 5, 4),))
    monkeypatch.setattr(layer, "QUICK_SECONDS", 0.0)
    assert cli.main(["bench", "layer", "--quick"]) == 0
    assert "loop of nn.GRUCell" in capsys.readouterr().out
    recipe = train_step.RECIPES["demo"]
    small = train_step.replace(
        recipe,
        context=8,
        model=train_step.replace(recipe.model, width=8),
        train=train_step.replace(recipe.train, batch_size=2),
    )
    monkeypatch.setitem(train_step.RECIPES, "demo", small)
    monkeypatch.setattr(train_step, "QUICK_SECONDS", 0.0)
    assert cli.main(["bench", "train-step", "--quick"]) == 0
    said = capsys.readouterr().out
    assert "tokens/s" in said
    assert "in matrix products" in said
    assert "missing: pip install minGRU-pytorch==0.2.1" in said


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_of_a_step_is_measured_in_its_own_process() -> None:
    small, large = (memory._peak("MinGRU", (1, T, 16)) for T in (16, 1 << 16))
    # 65,536 steps of 16 channels are 4.2 MB: input, gates, output and their gradients are many
    assert large > small + 4 * 4.2


def test_a_table_is_aligned_and_leaves_out_empty_columns() -> None:
    rows = (Row("ours", 1.0, 0.9, 1.1, 3, ratio=1.0), Row("other", note="missing: pip install x"))
    title, head, first, second = report.lines(Table("a title", (1, 2, 3), "ms", rows))
    assert title == "a title at (B, T, D) = (1, 2, 3)"
    assert head.split() == ["ms", "quartiles", "/", "ours"]
    assert len(first) == len(head)
    assert second == "  other  missing: pip install x"


def test_ratios_need_a_right_answer_of_ours() -> None:
    wrong = Checked(None, 1.0, "wrong")
    right = compare.check(_entrant(peers.step_loop))
    rows = compare.timed_rows({"minrnn": wrong, "peer": right}, lambda c: Call(c.both), {}, {}, 0.0)
    assert [row.ratio for row in rows] == [None, None]
    assert rows[1].value is not None
    assert not compare.all_right([Table("scan", SHAPE, "ms", rows)])


def test_an_infinite_error_is_written_as_a_word(tmp_path) -> None:
    table = Table("scan", SHAPE, "ms", (Row("peer", error=float("inf"), note="wrong"),))
    report.publish("scan", [table], quick=True, out=tmp_path, draw=report.draw_ratios)
    facts = json.loads((tmp_path / "bench-scan.json").read_text())
    assert facts["tables"][0]["rows"][0]["error"] == "infinite"
