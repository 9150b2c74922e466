"""Time and memory over length: the paper's first figure, with torch's own layers in it as well."""

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from minrnn.bench import layer, measure, memory, peers
from minrnn.bench.measure import Call, Turn
from minrnn.configs import check_fields
from minrnn.experiments import results
from minrnn.experiments.results import TextTable
from minrnn.files import write_atomically
from minrnn.layers import MinGRU, MinLSTM
from minrnn.models import MixerName, ModelConfig, build_mixer

# features and channels; the paper does not say its own
WIDTH = 64
LENGTHS = (64, 128, 256, 512, 1024, 2048, 4096, 65536)
CONTEXTS, BATCHES = (1, 64, 256, 1024, 4096), (1, 64)
# a length at which each is held to its equation, before anything is timed
_CHECKED = (2, 64, WIDTH)
_SCRIPT = "from minrnn.experiments import efficiency as e; e.report_{what}({name!r}, {shape}, {n})"
# above it a step may take most of the memory: each is timed in processes of its own, so often
_TOGETHER, _ROUNDS = 4096, 3
# seconds
_LONG = 10.0


@dataclass(frozen=True)
class EfficiencyConfig:
    """Training steps over T = 64 ... 65,536, and steps of generation over the context.

    Raises:
        ValueError: a field is out of range.
        TypeError: a field has another type.
    """

    longest: int = 65536
    """Lengths up to this one."""
    batch_size: int = 64
    """Sequences in a training step."""
    seconds: float = 3.0
    """For each timing, about."""
    runs: Path = Path("runs/efficiency")
    """Where the figures of each length are kept; what is there is not measured again."""
    out: Path = Path("results/efficiency")
    """Where figures.json, table.md and picture.png go."""

    def __post_init__(self) -> None:
        check_fields(self)
        for name, least in (("longest", LENGTHS[0]), ("batch_size", 1), ("seconds", 0.0)):
            if getattr(self, name) < least:
                raise ValueError(f"`{name}` must be >= {least}, got {getattr(self, name)}")


def _log_space(kind: type[MinGRU] | type[MinLSTM]) -> Callable[[int], peers.Built]:
    """Our layer's weights in the form in which the paper evaluates the cell."""

    def run(module: Any, x: Tensor) -> Tensor:
        return peers.log_space_cell(*peers.our_gates(module, x)[1])

    def truth(module: Any, x: Tensor) -> Tensor:
        return peers.recurrence64(*peers.our_gates(module, x))

    return lambda width: peers.Built(kind(width, width, batch_first=True), run, truth)


def _mixer(name: MixerName) -> Callable[[int], peers.Built]:
    def build(width: int) -> peers.Built:
        module = build_mixer(ModelConfig(width=width, mixer=name, num_heads=max(1, width // 64)))
        return peers.Built(module, lambda m, x: m(x)[0], lambda m, x: m(x)[0])

    return build


def _named(name: str) -> Callable[[int], peers.Built]:
    return next(one.build for one in peers.LAYERS if one.name == name)


@dataclass(frozen=True)
class Subject:
    """What is measured, how far, and what its speed-up refers to."""

    name: str
    build: Callable[[int], peers.Built]
    longest: int
    loop: str
    log_space: bool = False


_GRU, _LSTM = "loop of nn.GRUCell", "loop of nn.LSTMCell"
SUBJECTS = (
    Subject("minGRU", _named("MinGRU"), 65536, _GRU),
    Subject("minLSTM", _named("MinLSTM"), 65536, _LSTM),
    Subject("minGRU in log space", _log_space(MinGRU), 4096, _GRU, log_space=True),
    Subject("minLSTM in log space", _log_space(MinLSTM), 4096, _LSTM, log_space=True),
    Subject("nn.GRU", _named("nn.GRU"), 65536, _GRU),
    Subject("nn.LSTM", _named("nn.LSTM"), 65536, _LSTM),
    Subject(_GRU, _named(_GRU), 4096, _GRU),
    Subject(_LSTM, _named(_LSTM), 4096, _LSTM),
    Subject("Mamba", _mixer("mamba"), 65536, _GRU),
    Subject("attention", _mixer("attention"), 4096, _GRU),
)
STREAMED: dict[str, MixerName] = {
    "minGRU": "mingru",
    "minLSTM": "minlstm",
    "nn.GRU": "gru",
    "nn.LSTM": "lstm",
    "Mamba": "mamba",
    "attention": "attention",
}


def reproduce(config: EfficiencyConfig, say: Callable[[str], None]) -> None:
    """Measure what is not measured yet, length by length, and write the table.

    Args:
        config: what to measure.
        say: called with a line before each length.
    """
    config.runs.mkdir(parents=True, exist_ok=True)
    for T in (T for T in LENGTHS if config.longest >= T):
        path = config.runs / f"train-{T}.json"
        if not path.is_file():
            say(f"training step at T = {T:,}")
            _keep(path, _training(T, config))
        write(config)
    for batch_size in BATCHES:
        path = config.runs / f"stream-{batch_size}.json"
        if not path.is_file():
            say(f"one symbol behind a context, {batch_size} streams")
            _keep(path, _streaming(batch_size, config))
    write(config)


def _keep(path: Path, figures: dict[str, Any]) -> None:
    # the tables may be written again by a later commit
    content = results.origin() | {"figures": figures}
    write_atomically(path, json.dumps(content).encode())


def _training(T: int, config: EfficiencyConfig) -> dict[str, dict[str, float]]:
    """Milliseconds and megabytes of forward and backward with all gradients.

    Memory goes first, in a process of its own: what does not survive that is left out.
    """
    shape = (config.batch_size, T, WIDTH)
    peaks: dict[str, float] = {}
    for subject in (one for one in SUBJECTS if one.longest >= T):
        _check(subject)
        with contextlib.suppress(OSError):
            peaks[subject.name] = _told("peak", subject.name, shape)
    if T > _TOGETHER:
        rounds = [
            {name: Turn(_told("time", name, shape)) for name in peaks} for _ in range(_ROUNDS)
        ]
        timings = {name: measure.summarize([turns[name] for turns in rounds]) for name in peaks}
    else:
        x, dh = layer.inputs(shape)
        x.requires_grad_()
        subjects = [one for one in SUBJECTS if one.name in peaks]
        calls = {subject.name: _call(subject, x, dh) for subject in subjects}
        timings = measure.interleave(calls, config.seconds)
    return {
        name: {
            "ms": 1e3 * timing.median,
            "low": 1e3 * timing.low,
            "high": 1e3 * timing.high,
            "MB": peaks[name],
        }
        for name, timing in timings.items()
    }


def _check(subject: Subject) -> None:
    one = peers.Layer(subject.name, subject.build, "", log_space=subject.log_space)
    checked = layer.checked_layer(one, *layer.inputs(_CHECKED))
    if checked.calls is None:
        raise ArithmeticError(f"{subject.name}: {checked.note} (error {checked.error})")


def _call(subject: Subject, x: Tensor, dh: Tensor) -> Call:
    """A step on inputs that all subjects share: of the longest there is no room for more."""
    torch.manual_seed(0)
    built = subject.build(WIDTH)
    leaves = [x, *built.module.parameters()]

    def both() -> tuple[Tensor, ...]:
        return torch.autograd.grad(built.run(built.module, x), leaves, dh)

    return Call(both)


def _told(what: str, name: str, shape: tuple[int, int, int]) -> float:
    """The peak or the time of a step, from a process of its own.

    Raises:
        OSError: that process failed, e.g. for want of memory.
    """
    return memory.told(_SCRIPT.format(what=what, name=name, shape=shape, n=torch.get_num_threads()))


def report_peak(name: str, shape: tuple[int, int, int], threads: int) -> None:
    """Print the megabytes of a training step; run in a fresh process."""
    memory.report_peak_of(_subject(name).build, shape, threads)


def report_time(name: str, shape: tuple[int, int, int], threads: int) -> None:
    """Print the seconds of a training step; run in a fresh process.

    The second of two, unless the first takes so long that what it begins with matters little.
    """
    torch.set_num_threads(threads)
    x, dh = layer.inputs(shape)
    x.requires_grad_()
    call = _call(_subject(name), x, dh)
    seconds = 0.0
    for _ in range(2):
        begun = time.perf_counter()
        call.run()
        seconds = time.perf_counter() - begun
        if seconds > _LONG:
            break
    print(json.dumps(seconds))


def _subject(name: str) -> Subject:
    [subject] = [one for one in SUBJECTS if one.name == name]
    return subject


@torch.no_grad()
def _streaming(batch_size: int, config: EfficiencyConfig) -> dict[str, dict[str, dict[str, float]]]:
    """Milliseconds of a step behind each context, and the bytes of the state, per stream."""
    calls: dict[str, Call] = {}
    sizes: dict[str, float] = {}
    x = torch.randn(batch_size, 1, WIDTH)
    for name, mixer in STREAMED.items():
        module = build_mixer(ModelConfig(width=WIDTH, mixer=mixer, num_heads=1)).eval()
        for T in CONTEXTS:
            _, state = module(torch.randn(batch_size, T, WIDTH))
            sizes[f"{name} {T}"] = state.num_bytes / batch_size
            calls[f"{name} {T}"] = Call(lambda m=module, s=state: m(x, s))
    timings = measure.interleave(calls, config.seconds / 10)
    return {
        name: {
            str(T): {"ms": 1e3 * timings[f"{name} {T}"].median, "bytes": sizes[f"{name} {T}"]}
            for T in CONTEXTS
        }
        for name in STREAMED
    }


def write(config: EfficiencyConfig) -> None:
    """Write the folder of results from what is measured so far."""
    lengths = (T for T in LENGTHS if config.longest >= T)
    training, train = _read({T: config.runs / f"train-{T}.json" for T in lengths})
    streaming, stream = _read({B: config.runs / f"stream-{B}.json" for B in BATCHES})
    tables = [*_training_tables(train, config.batch_size), *_streaming_tables(stream)]
    facts = {"config": asdict(config), "training": training, "streaming": streaming}
    command = "minrnn reproduce efficiency"
    results.publish(config.out, command, facts, tables, draw(train, stream))


def _read(paths: dict[int, Path]) -> tuple[dict[int, Any], dict[int, Any]]:
    """The files that are there, and the figures in them."""
    found = {key: json.loads(path.read_text()) for key, path in paths.items() if path.is_file()}
    return found, {key: content["figures"] for key, content in found.items()}


def _training_tables(train: dict[int, dict[str, Any]], batch_size: int) -> Iterator[TextTable]:
    head = ["", *(f"T = {T:,}" for T in train)]
    shape = f"forward and backward, B = {batch_size}, {WIDTH} features and channels"
    speedup = "speed-up over the loop of steps that the paper compares with"
    for title, of in (
        (f"Milliseconds: {shape}", lambda s, f: f[s.name]["ms"]),
        (f"The same: {speedup}", lambda s, f: f[s.loop]["ms"] / f[s.name]["ms"]),
        ("Peak memory of a training step, MB", lambda s, f: f[s.name]["MB"]),
    ):
        rows = [[s.name, *(_cell(of, s, train[T]) for T in train)] for s in SUBJECTS]
        yield TextTable(title, head, rows)


def _cell(of: Callable[[Subject, dict[str, Any]], float], subject: Subject, figures: Any) -> str:
    try:
        value = of(subject, figures)
    except KeyError:
        return "-"
    return f"{value:,.3g}" if value < 1000 else f"{value:,.0f}"


def _streaming_tables(stream: dict[int, dict[str, Any]]) -> Iterator[TextTable]:
    head = ["", *(f"context {T:,}" for T in CONTEXTS)]
    for B, figures in stream.items():
        rows = [[n, *(f"{figures[n][str(T)]['ms']:.3g}" for T in CONTEXTS)] for n in STREAMED]
        yield TextTable(f"Milliseconds of one more symbol, {B} streams", head, rows)
    if stream:
        figures = next(iter(stream.values()))
        rows = [[n, *(f"{figures[n][str(T)]['bytes']:,.0f}" for T in CONTEXTS)] for n in STREAMED]
        yield TextTable("Bytes of state for each stream", head, rows)


def draw(train: dict[int, dict[str, Any]], stream: dict[int, dict[str, Any]]) -> Figure:
    """Training time, speed-up and memory over length; beside them, what one more symbol costs."""
    # two columns can be read on a phone
    figure = Figure(figsize=(8.5, 11), layout="constrained")
    panels = figure.subplots(3, 2).T.flatten()
    for number, subject in enumerate(SUBJECTS):
        style = {"color": f"C{number}", "marker": "osD^v<>Pp*"[number], "markersize": 4}
        style |= {"label": subject.name, "linewidth": 1.2}
        own = {T: f for T, f in train.items() if subject.name in f}
        _line(panels[0], own, lambda f, s=subject: f[s.name]["ms"], style)
        with_loop = {T: f for T, f in own.items() if subject.loop in f}
        of_loop = lambda f, s=subject: f[s.loop]["ms"] / f[s.name]["ms"]  # noqa: E731
        _line(panels[1], with_loop, of_loop, style)
        _line(panels[2], own, lambda f, s=subject: f[s.name]["MB"], style)
        for panel, batch_size in ((panels[3], 1), (panels[4], 64)):
            points = stream.get(batch_size, {}).get(subject.name, {})
            _line(panel, {int(T): p for T, p in points.items()}, lambda p: p["ms"], style)
        points = stream.get(1, {}).get(subject.name, {})
        _line(panels[5], {int(T): p for T, p in points.items()}, lambda p: p["bytes"], style)
    titles = ["training step, ms", "speed-up over the loop", "peak memory, MB"]
    titles += ["one more symbol, ms (1 stream)", "one more symbol, ms (64 streams)"]
    for panel, title in zip(panels, [*titles, "state, bytes per stream"], strict=True):
        panel.set_title(title, fontsize=10)
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        panel.grid(alpha=0.3)
    for panel, words in zip(panels, ["T, steps"] * 3 + ["context, steps"] * 3, strict=True):
        panel.set_xlabel(words)
    handles, names = panels[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=3, frameon=False)
    return figure


def _line(
    axes: Any, points: dict[int, Any], of: Callable[[Any], float], style: dict[str, Any]
) -> None:
    if points:
        axes.plot(list(points), [of(figures) for figures in points.values()], **style)
