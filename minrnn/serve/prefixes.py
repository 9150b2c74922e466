"""States behind the beginnings of prompts, so that what many prompts share is read once."""

import hashlib
from collections import OrderedDict
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from minrnn.state import State


class Read(NamedTuple):
    """What is known after the first `num_symbols` of a prompt: the state, and the logits (1, V)."""

    num_symbols: int
    state: State
    logits: Tensor

    @property
    def num_bytes(self) -> int:
        """The memory that the tensors' elements take."""
        return self.state.num_bytes + self.logits.numel() * self.logits.element_size()


class PrefixStore:
    """The states read last, within a number of bytes.

    Kept are those at whole chunks and at ends of prompts. A prompt is read chunk by chunk from its
    beginning, so what is found here is, to the bit, what reading would give.

    Args:
        max_bytes: of states and logits; 0 keeps nothing.
        chunk: symbols in a chunk.

    Example:
        >>> store = PrefixStore(1000, chunk=2)
        >>> read = Read(2, State({"h": torch.zeros(1, 4)}), torch.zeros(1, 5))
        >>> store.put("a key", torch.tensor([7, 8]), read)
        >>> store.longest("a key", torch.tensor([7, 8, 9])).num_symbols
        2
        >>> store.longest("another", torch.tensor([7, 8, 9])) is None
        True
    """

    def __init__(self, max_bytes: int, chunk: int) -> None:
        self.max_bytes, self.chunk, self.num_bytes = max_bytes, chunk, 0
        self._kept: OrderedDict[bytes, Read] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def longest(self, owner: str, ids: Tensor) -> Read | None:
        """What is known of the longest beginning of `ids` (T,) that `owner` has read."""
        found = None
        for digest in self._digests(owner, ids):
            if digest in self._kept:
                found = self._kept[digest]
                self._kept.move_to_end(digest)
        return found

    def put(self, owner: str, ids: Tensor, read: Read) -> None:
        """Keep what is known behind all of `ids` (T,), whole chunks or a whole prompt."""
        if read.num_bytes > self.max_bytes:
            return
        *_, digest = self._digests(owner, ids)
        old = self._kept.pop(digest, None)
        self._kept[digest] = read
        self.num_bytes += read.num_bytes - (old.num_bytes if old else 0)
        while self.num_bytes > self.max_bytes:
            _, gone = self._kept.popitem(last=False)
            self.num_bytes -= gone.num_bytes

    def _digests(self, owner: str, ids: Tensor) -> Iterator[bytes]:
        """One for each chunk, of all up to it; owners share none."""
        digest = hashlib.sha256(owner.encode()).digest()
        for chunk in ids.to("cpu", torch.int64).split(self.chunk):
            digest = hashlib.sha256(digest + chunk.numpy().tobytes()).digest()
            yield digest
