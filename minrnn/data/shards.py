"""Ids in files, memory-mapped and read as one array; how they are written, side by side."""

import hashlib
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from minrnn.data import sources, tokenizers
from minrnn.data.bpe import BPE
from minrnn.data.sources import Unit
from minrnn.data.tokenizers import Bytes, Tokenizer, UnknownCharacterError
from minrnn.files import replacing

_BLOCK = 1 << 22
_NUM_CODE_POINTS = 0x110000
_T = TypeVar("_T")


class Shard(NamedTuple):
    """A file of ids in a corpus folder."""

    name: str
    num_tokens: int
    sha256: str


class Tokens:
    """The ids [first, stop) of a corpus; a slice reads what it needs.

    Pages that were read through a mapping count as this process's memory until it is closed, so
    one of these is made for each batch.
    """

    def __init__(
        self, folder: Path, shards: Sequence[Shard], dtype: np.dtype, first: int, stop: int
    ) -> None:
        self.dtype = dtype
        self._first, self._stop = first, stop
        self._paths = [folder / shard.name for shard in shards]
        self._ends = np.cumsum([shard.num_tokens for shard in shards])
        self._maps: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return self._stop - self._first

    def __getitem__(self, part: slice) -> np.ndarray:
        first, stop, step = part.indices(len(self))
        assert step == 1
        return self._read(self._first + first, self._first + max(first, stop))

    def _read(self, first: int, stop: int) -> np.ndarray:
        """The ids [first, stop) of all; a view where they lie in one file."""
        pieces = []
        number = int(np.searchsorted(self._ends, first, side="right"))
        while first < stop:
            begin = int(self._ends[number - 1]) if number else 0
            end = min(int(self._ends[number]), stop)
            pieces.append(self._map(number)[first - begin : end - begin])
            first, number = end, number + 1
        if len(pieces) == 1:
            return pieces[0]
        return np.concatenate(pieces) if pieces else np.zeros(0, self.dtype)

    def _map(self, number: int) -> np.ndarray:
        if number not in self._maps:
            path = self._paths[number]
            try:
                self._maps[number] = np.memmap(path, self.dtype, "r")
            except FileNotFoundError as error:
                message = f"{path} is gone: the corpus was rebuilt or removed while it was read"
                raise FileNotFoundError(message) from error
        return self._maps[number]


def id_dtype(vocab_size: int) -> np.dtype:
    """The smallest unsigned type that holds every id."""
    return np.min_scalar_type(vocab_size - 1)


def write(
    units: Sequence[Unit],
    folder: Path,
    tokenizer: Tokenizer,
    processes: int,
    progress: Callable[[int], None],
) -> list[Shard]:
    """Write the ids of each unit to a file of its own, several units side by side.

    The name of a file holds the beginning of its SHA-256, so that no other ids ever take the name
    of a file that is being read.

    Raises:
        ValueError: a unit is not UTF-8, or has a character that is not known.
    """
    saved = tokenizer.to_json()
    tasks = [partial(_write, unit, folder, number, saved) for number, unit in enumerate(units)]
    return _all(tasks, units, processes, progress)


def vocabulary(units: Sequence[Unit], processes: int, progress: Callable[[int], None]) -> str:
    """Every character of the text, in the order of their code points."""
    seen = _all([partial(_seen, unit) for unit in units], units, processes, progress)
    return "".join(map(chr, np.unique(np.concatenate(seen))))


def _all(
    tasks: Sequence[Callable[..., _T]],
    units: Sequence[Unit],
    processes: int,
    progress: Callable[[int], None],
) -> list[_T]:
    """What each task returns, in their order."""
    if processes == 1 or len(tasks) == 1:
        return [task(progress) for task in tasks]
    # spawned: a fork would copy threads' locks
    context = multiprocessing.get_context("spawn")
    stop = context.Event()
    others = set(multiprocessing.active_children())
    options: dict[str, Any] = {"mp_context": context, "initializer": _begin, "initargs": (stop,)}
    with ProcessPoolExecutor(min(processes, len(tasks)), **options) as pool:
        numbers = {pool.submit(task): number for number, task in enumerate(tasks)}
        found: dict[int, _T] = {}
        waiting = set(numbers)
        try:
            while waiting:
                done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                for one in done:
                    found[numbers[one]] = one.result()
                    progress(units[numbers[one]].size)
        except BrokenProcessPool as error:
            raise OSError(
                "a process that reads the text was killed; fewer `processes` need less memory"
            ) from error
        except BaseException:
            stop.set()
            for process in set(multiprocessing.active_children()) - others:
                # those that have begun ignore it, and see `stop` at their next block
                process.terminate()
            pool.shutdown(cancel_futures=True)
            raise
    return [found[number] for number in range(len(tasks))]


# set in a process of its own when the others are to stop
_stop: Any = None


def _begin(stop: Any) -> None:
    """Leave signals to the first process, which sets `stop`."""
    global _stop
    _stop = stop
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def _poll(size: int) -> None:
    """What a process of its own calls for each block, in place of showing its progress."""
    if _stop is not None and _stop.is_set():
        raise InterruptedError("another process was stopped")


def _write(
    unit: Unit,
    folder: Path,
    number: int,
    saved: dict[str, Any],
    progress: Callable[[int], None] = _poll,
) -> Shard:
    tokenizer = tokenizers.from_json(saved)
    dtype, count, digest = id_dtype(tokenizer.vocab_size), 0, hashlib.sha256()
    # a name that `remove_leftovers` knows, until the digest is known
    written = folder / f".tokens-{number:05}.tmp"
    with replacing(written) as file:
        for block in _ids(unit, tokenizer, progress):
            content = block.astype(dtype).tobytes()
            file.write(content)
            digest.update(content)
            count += len(block)
    name = f"tokens-{number:05}-{digest.hexdigest()[:16]}.bin"
    os.replace(written, folder / name)
    return Shard(name, count, digest.hexdigest())


def _ids(unit: Unit, tokenizer: Tokenizer, progress: Callable[[int], None]) -> Iterator[np.ndarray]:
    if isinstance(tokenizer, Bytes):
        for block in unit.blocks():
            progress(block.read)
            yield np.frombuffer(block.content, dtype=np.uint8)
        return
    passages = sources.characters(unit, progress)
    if isinstance(tokenizer, BPE):
        yield from tokenizer.encode_blocks(passage.text for passage in passages)
        return
    for passage in passages:
        try:
            yield tokenizer.encode(passage.text)
        except UnknownCharacterError as error:
            message = f"{unit.place(passage, error.index)}: {error.what}"
            raise ValueError(message) from error


def _seen(unit: Unit, progress: Callable[[int], None] = _poll) -> np.ndarray:
    """The code points of a unit."""
    seen = np.zeros(_NUM_CODE_POINTS, dtype=bool)
    for passage in sources.characters(unit, progress):
        seen[np.frombuffer(passage.text.encode("utf-32-le"), dtype=np.uint32)] = True
    return np.flatnonzero(seen)


def sha256(path: Path) -> str:
    """Of a file, read in blocks."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def fingerprint(shards: Sequence[Shard]) -> str:
    """The SHA-256 of the one file there is, or that of all of theirs."""
    if len(shards) == 1:
        return shards[0].sha256
    return hashlib.sha256("".join(shard.sha256 for shard in shards).encode()).hexdigest()
