"""How time is taken: all competitors in turn, round after round, with the memory beside them."""

import ctypes
import gc
import itertools
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

MIN_ROUNDS, MAX_ROUNDS = 3, 200
# a shorter turn repeats its call: below this the clock and the wake-up of threads would count
TURN = 2e-3
# from here on a call is slow: nothing goes before it untimed, and its trial counts as a round
SLOW = 0.1
# and from here on, if it is more than all its time, one round behind the trial is enough
ONCE = 8.0
# bytes that a scan, cell or addition must move for each float32 element
FORWARD_BYTES = {"scan": 12, "mingru": 12, "minlstm": 16, "add": 12}
# the backward pass reads dh, h and what the gradient needs, and writes a gradient for each input
BOTH_BYTES = {"scan": 12 + 20, "mingru": 12 + 24, "minlstm": 16 + 32}


@dataclass(frozen=True)
class Call:
    """Something to be timed."""

    run: Callable[[], Any]
    threads: int = 0
    """0 stands for those that torch has now."""


@dataclass(frozen=True)
class Timing:
    """Seconds of one call."""

    median: float
    low: float
    """the lower quartile"""
    high: float
    """the upper quartile"""
    rounds: int
    faults: float | None = None
    """page faults of one call, the median; None where the system does not count them"""


class Turn(NamedTuple):
    """What one call took, on the average of a turn."""

    seconds: float
    faults: float | None = None


def summarize(turns: Sequence[Turn]) -> Timing:
    """Median and quartiles.

    Example:
        >>> summarize([Turn(s, faults=2.0) for s in (5.0, 1.0, 2.0, 4.0, 3.0)])
        Timing(median=3.0, low=2.0, high=4.0, rounds=5, faults=2.0)
    """
    seconds = [turn.seconds for turn in turns]
    counted = [turn.faults for turn in turns if turn.faults is not None]
    faults = statistics.median(counted) if counted else None
    if len(seconds) == 1:
        return Timing(seconds[0], seconds[0], seconds[0], 1, faults)
    low, median, high = statistics.quantiles(seconds, n=4, method="inclusive")
    return Timing(median, low, high, len(seconds), faults)


CPU = torch.device("cpu")


def clock_of(device: torch.device) -> Callable[[], float]:
    """Seconds: those of the wall, or of a GPU behind all that it was asked to do so far."""
    if device.type != "cuda":
        return time.perf_counter
    begin = torch.cuda.Event(enable_timing=True)
    begin.record(torch.cuda.current_stream(device))

    def now() -> float:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(device))
        event.synchronize()
        return 1e-3 * begin.elapsed_time(event)

    return now


def interleave(
    calls: Mapping[str, Call], seconds: float, clock: Callable[[], float] = time.perf_counter
) -> dict[str, Timing]:
    """Time all calls in turn, round after round, so that each meets the same moments.

    One trial decides how often a call is repeated in a turn and in how many rounds it takes part:
    a slow one in fewer, spread evenly over all. Before the clock starts in a turn the call runs
    once untimed, so that caches and the allocator are as it left them itself, not as the one
    before it did. Not if it takes longer than `SLOW`: then that matters little, and the trial
    counts as its first round. Longer than `ONCE` and `seconds`, it has one round, behind the trial.

    Args:
        calls: what to time, by name, in the order of a round.
        seconds: about how long each of them may be timed in all; it is three rounds at least.
        clock: gives the time in seconds.

    Returns:
        For each name the time of one call, over the rounds it took part in.
    """
    threads = torch.get_num_threads()
    taken: dict[str, list[Turn]] = {name: [] for name in calls}
    gc.collect()
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        trials = {}
        for name, call in calls.items():
            torch.set_num_threads(call.threads or threads)
            trial = _turn(call.run, 1, clock)
            trials[name] = trial.seconds
            if SLOW <= trial.seconds < max(ONCE, seconds):
                taken[name].append(trial)
        shares = {name: _rounds(trial, seconds) for name, trial in trials.items()}
        total = max(shares.values(), default=0)
        for turn, (name, call) in itertools.product(range(total), calls.items()):
            if not _takes_part(turn, shares[name], total):
                continue
            torch.set_num_threads(call.threads or threads)
            if trials[name] < SLOW:
                call.run()
            taken[name].append(_turn(call.run, _repeats(trials[name]), clock))
    finally:
        torch.set_num_threads(threads)
        if was_enabled:
            gc.enable()
    return {name: summarize(turns) for name, turns in taken.items()}


def _turn(run: Callable[[], Any], repeats: int, clock: Callable[[], float]) -> Turn:
    before = page_faults()
    start = clock()
    for _ in range(repeats):
        run()
    seconds = clock() - start
    after = page_faults()
    faults = None if before is None or after is None else (after - before) / repeats
    return Turn(seconds / repeats, faults)


def _repeats(trial: float) -> int:
    return max(1, min(1000, round(TURN / max(trial, 1e-9))))


def _rounds(trial: float, seconds: float) -> int:
    """The rounds behind the trial."""
    if trial >= max(ONCE, seconds):
        return 1
    slow = trial >= SLOW
    turn = trial * (_repeats(trial) + (not slow))
    return max(MIN_ROUNDS, min(MAX_ROUNDS, int(seconds / max(turn, 1e-9)))) - slow


def _takes_part(turn: int, share: int, total: int) -> bool:
    """True in `share` of `total` turns, evenly spread.

    Example:
        >>> [turn for turn in range(10) if _takes_part(turn, 3, 10)]
        [0, 4, 7]
    """
    return turn * share // total != (turn - 1) * share // total


def page_faults() -> int | None:
    """How many pages this process was handed so far when it touched them; None except on Linux.

    Those that had to be read from a disk are not among them.
    """
    if sys.platform != "linux":
        return None
    # Windows has no such module
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


# what the allocator was told, as a table says it
AS_IT_IS = "allocator as it is"
RETURNED, KEPT = "allocator returns its pages", "allocator keeps its pages"
# mallopt's M_MMAP_THRESHOLD and M_TRIM_THRESHOLD, at what glibc begins with
_RETURN_PAGES = ((-3, 128 << 10), (-1, 128 << 10))
# M_MMAP_MAX, M_TRIM_THRESHOLD and M_ARENA_MAX: no block has a mapping of its own, none is given
# back, and threads that start later share the one heap
_KEEP_PAGES = ((-4, 0), (-1, -1), (-8, 1))


def tell_allocator(keep: bool) -> str:
    """Make the C library keep what is freed, or give large blocks back, while this process lives.

    By itself glibc gives them back from a size on that depends on what was freed before: the same
    call takes zeroed pages, and a multiple of its time, in one process and not in another. What
    was kept once stays: tell it to keep pages last.

    Returns:
        `KEPT` or `RETURNED`, or `AS_IT_IS` where it is not glibc, or another was preloaded.
    """
    if not allocator().startswith("glibc"):
        return AS_IT_IS
    mallopt = ctypes.CDLL(None).mallopt
    done = [mallopt(*setting) for setting in (_KEEP_PAGES if keep else _RETURN_PAGES)]
    return (KEPT if keep else RETURNED) if all(done) else AS_IT_IS


def triad(num_elements: int, device: torch.device = CPU) -> tuple[Callable[[], Tensor], int]:
    """STREAM's triad, x = y + 3 z in float32 with all of torch's threads, and its bytes.

    The output is reused; counted are two reads and one write, as STREAM does.
    """
    x, y, z = (torch.full((num_elements,), float(n), device=device) for n in range(3))
    return (lambda: torch.add(y, z, alpha=3.0, out=x)), 12 * num_elements


@cache
def last_level_cache() -> int:
    """Bytes of the largest cache; 32 MiB where the system does not say."""
    sizes = [32 << 20]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        sizes.append(int(text[:-1]) << {"K": 10, "M": 20, "G": 30}[text[-1]])
    return max(sizes[1:], default=sizes[0])


@cache
def large_triad(device: torch.device = CPU) -> tuple[Callable[[], Tensor], int]:
    """The triad on arrays of four times the last-level cache each, made once."""
    if device.type == "cuda":
        return triad(torch.cuda.get_device_properties(device).L2_cache_size, device)
    return triad(last_level_cache())


def machine(device: torch.device = CPU) -> dict[str, Any]:
    """What was measured on: processor, cache, memory, threads, and who hands out the memory."""
    gpu = {"gpu": torch.cuda.get_device_name(device)} if device.type == "cuda" else {}
    return gpu | {
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "last_level_cache": last_level_cache(),
        "memory": _memory(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "allocator": allocator(),
        "busy": busy_cores(),
        "settings": {name: os.environ[name] for name in _SETTINGS if name in os.environ},
    }


_SETTINGS = (
    "OMP_NUM_THREADS",
    "MALLOC_CONF",
    "GLIBC_TUNABLES",
    "MALLOC_MMAP_THRESHOLD_",
    "THP_MEM_ALLOC_ENABLE",
)


def allocator() -> str:
    """What is preloaded, by file name, or else the C library."""
    preloaded = os.environ.get("LD_PRELOAD", "").replace(":", " ").split()
    if preloaded:
        return " ".join(Path(path).name for path in preloaded)
    return " ".join(platform.libc_ver()).strip() or platform.system()


def versions(packages: tuple[str, ...]) -> dict[str, str]:
    """Of Python, of this library, of what it stands on, and of those of `packages` found here."""
    found = {"python": platform.python_version()}
    for name in ("minrnn", "torch", "numpy", *packages):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str | None:
    """The commit of this library's checkout, "+" if the package differs; None outside one."""
    folder = Path(__file__).parent

    def git(*words: str) -> str:
        command = ["git", "-C", str(folder), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        # a package that is installed inside somebody else's checkout has no commit of its own
        git("ls-files", "--error-unmatch", Path(__file__).name)
        # figures that an earlier bench wrote into the checkout change no answer
        changed = git("status", "--porcelain", "-uno", "--", str(folder.parent))
        return git("rev-parse", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def busy_cores(seconds: float = 0.3) -> float | None:
    """How many cores other processes keep busy, measured while this one sleeps; Linux only."""
    path = Path("/proc/stat")
    if not path.is_file():
        return None

    def ticks() -> tuple[int, int]:
        # the first line: user, nice, system, idle, iowait, irq, softirq, steal of all cores
        counts = [int(word) for word in path.read_text().splitlines()[0].split()[1:9]]
        return sum(counts), counts[3] + counts[4]

    total, idle = ticks()
    time.sleep(seconds)
    total_after, idle_after = ticks()
    share = 1 - (idle_after - idle) / max(1, total_after - total)
    return round(share * (os.cpu_count() or 1), 2)


def processor() -> str:
    """What the machine calls its processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None
