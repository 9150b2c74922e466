"""Which windows of a text a step of training reads: a function of (seed, step), nothing is kept."""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from minrnn.data.batch import Batch
from minrnn.data.text import Corpus
from minrnn.splitmix import mixed

Order = Literal["random", "shuffled", "consecutive"]
_ROUNDS = 6


@dataclass(frozen=True)
class Windows:
    """The windows of the training part of a corpus, in one of three orders.

    Raises:
        ValueError: the text is too short for `batch_size` consecutive streams.
    """

    corpus: Corpus
    context: int
    """Symbols in a window."""
    order: Order = "random"
    """random: from random places. shuffled: the text is cut into windows, and each is read once in
    a pass, in an order of that pass. consecutive: the text is cut into one stream for each row of
    the batch, and a window begins where that of the step before ended."""
    batch_size: int = 1
    """Windows in a step, of all parts that it is computed in."""

    def __post_init__(self) -> None:
        if self.order == "consecutive" and self._stream < self.context:
            raise ValueError(
                f"the text is too short: each of `batch_size` = {self.batch_size} streams must "
                f"have at least `context` = {self.context} symbols, got {self._stream}"
            )

    @property
    def _stream(self) -> int:
        """Symbols of a stream, of consecutive windows."""
        return (self.corpus.num_train - 1) // self.batch_size

    def goes_on(self, step: int) -> bool:
        """Whether the windows of `step` stand behind those of the step before."""
        return self.order == "consecutive" and step % (self._stream // self.context) != 0

    def batch(self, size: int, seed: tuple[int, ...], rows: slice = slice(None)) -> Batch:
        """The `rows` of part `seed[2]` of step `seed[1]`, `size` windows, in a run `seed[0]`."""
        return self.corpus.batch_at(self.places(size, seed)[rows], self.context)

    def places(self, size: int, seed: tuple[int, ...]) -> np.ndarray:
        """Where the windows begin, (size,)."""
        last = self.corpus.num_train - self.context
        if self.order == "random":
            return np.random.default_rng(seed).integers(last, size=size)
        run, step, part = seed
        row = part * size + np.arange(size)
        if self.order == "consecutive":
            return row * self._stream + step % (self._stream // self.context) * self.context
        count = (self.corpus.num_train - 1) // self.context
        passes, number = np.divmod(step * self.batch_size + row, count)
        places = np.empty(size, dtype=np.int64)
        for this in np.unique(passes):
            chosen = passes == this
            places[chosen] = permuted(number[chosen], count, (run, int(this))) * self.context
        return places


def permuted(index: np.ndarray, count: int, key: tuple[int, ...]) -> np.ndarray:
    """Where a random permutation of range(count) sends each `index`; it is never written down.

    A Feistel network (Luby and Rackoff 1988) permutes the numbers of an even count of bits; what
    falls outside goes through it again until it falls inside (Black and Rogaway 2002, section 3).

    Args:
        index: of [0, count), any shape.
        count: how many there are, >= 1.
        key: which permutation.

    Example:
        >>> sorted(permuted(np.arange(5), 5, (0, 1)).tolist())
        [0, 1, 2, 3, 4]
    """
    half = max(1, ((count - 1).bit_length() + 1) // 2)
    keys = np.random.SeedSequence(key).generate_state(_ROUNDS, np.uint64)
    found = _network(index.astype(np.uint64), half, keys)
    while (outside := found >= count).any():
        found[outside] = _network(found[outside], half, keys)
    return found.astype(np.int64)


def _network(x: np.ndarray, half: int, keys: np.ndarray) -> np.ndarray:
    bits, mask = np.uint64(half), np.uint64((1 << half) - 1)
    left, right = x >> bits, x & mask
    for key in keys:
        left, right = right, left ^ (mixed(right ^ key) & mask)
    return left << bits | right
