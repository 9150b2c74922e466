"""One text on its way from the engine's thread to an asynchronous reader."""

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import NamedTuple

from minrnn.data.tokenizers import Tokenizer
from minrnn.serve.requests import Ending, Scored
from minrnn.stream import StopText


class Decoding:
    """Symbols to text, one at a time.

    Example:
        >>> from minrnn.data.tokenizers import Bytes
        >>> decoding = Decoding(Bytes())
        >>> [decoding.push(i) for i in (195, 169, 195)], decoding.rest()
        (['', 'é', ''], '\ufffd')
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._symbols: deque[int] = deque()
        self._pieces = tokenizer.stream(self._given())

    def push(self, symbol: int) -> str:
        """The text that `symbol` completes."""
        self._symbols.append(symbol)
        return next(self._pieces)

    def rest(self) -> str:
        """What is left when no more symbols come."""
        return "".join(self._pieces)

    def _given(self) -> Iterator[int]:
        # asked for a symbol only after `push` has put one in
        while self._symbols:
            yield self._symbols.popleft()


class Delta(NamedTuple):
    """What came since the last time."""

    text: str
    symbols: tuple[Scored, ...]


class Choice:
    """A listener that decodes a text, watches for stop texts, and hands it to one reader.

    The reader may be slow: what it has not taken waits here, at most as many symbols as were asked
    for. Symbols that come while it is away are handed over together.

    Args:
        tokenizer: of the model.
        stops: texts that end this one; they are not part of it.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = ()) -> None:
        self.prompt: Sequence[Scored] = ()
        self.ending: Ending | None = None
        self.num_drawn = 0
        self._decoding, self._text = Decoding(tokenizer), StopText(stops)
        self._loop = asyncio.get_running_loop()
        self._came = asyncio.Event()
        # between the two threads: what came, and whether the reader was told
        self._lock = threading.Lock()
        self._pieces: list[str] = []
        self._symbols: list[Scored] = []
        self._told = False

    def read(self, prompt: Sequence[Scored]) -> None:
        """The scores of the prompt; in the engine's thread."""
        self.prompt = prompt

    def drawn(self, symbol: Scored) -> bool:
        """Take the next symbol; in the engine's thread."""
        self._add(self._text.push(self._decoding.push(symbol.symbol)), symbol)
        return self._text.found

    def ended(self, ending: Ending) -> None:
        """Nothing follows; in the engine's thread."""
        rest = self._text.push(self._decoding.rest()) + self._text.rest()
        with self._lock:
            self.ending = ending
        self._add(rest, None)

    async def deltas(self) -> AsyncIterator[Delta]:
        """The text as it comes; `ending` is known when this ends."""
        while True:
            await self._came.wait()
            self._came.clear()
            with self._lock:
                delta = Delta("".join(self._pieces), tuple(self._symbols))
                self._pieces, self._symbols, self._told = [], [], False
                ended = self.ending is not None
            if delta.text or delta.symbols:
                yield delta
            if ended:
                return

    async def whole(self) -> Delta:
        """All of it, once it has ended."""
        deltas = [delta async for delta in self.deltas()]
        symbols = tuple(symbol for delta in deltas for symbol in delta.symbols)
        return Delta("".join(delta.text for delta in deltas), symbols)

    def _add(self, piece: str, symbol: Scored | None) -> None:
        with self._lock:
            self._pieces.append(piece)
            if symbol is not None:
                self._symbols.append(symbol)
                self.num_drawn += 1
            told, self._told = self._told, True
        if not told:
            self._loop.call_soon_threadsafe(self._came.set)
