"""Byte pair encoding: bytes, and pairs that a text often holds as symbols of their own."""

import codecs
import json
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from itertools import groupby, islice
from typing import Any

import numpy as np

from minrnn.data import words

# pieces of a text that are encoded side by side: bounds the memory
_AT_ONCE = 16
# tokens at the end of a word so far that are encoded again with what follows
_OVERLAP = 32


def known_id(i: int, vocab_size: int) -> int:
    """`i`, if it is an id; a negative one would count from the end.

    Raises:
        ValueError: it is not in [0, vocab_size).
    """
    if not 0 <= i < vocab_size:
        raise ValueError(f"`ids` must be in [0, V) = [0, {vocab_size}), got {i}")
    return i


def to_utf8(text: str, errors: str = "strict") -> bytes:
    """`text` in UTF-8.

    Raises:
        ValueError: it holds half a surrogate pair, which is no character.
    """
    try:
        return text.encode("utf-8", errors)
    except UnicodeEncodeError as error:
        raise ValueError(
            f"character {text[error.start]!r} (U+{ord(text[error.start]):04X}) at place "
            f"{error.start} is half a surrogate pair, and no text of UTF-8 holds one"
        ) from error


class BPE:
    """Each byte of the UTF-8 text is a symbol, and so is each pair of symbols that was merged.

    Gage 1994; over bytes, and inside words only, as in GPT-2 (Radford et al. 2019): any text comes
    back as it was. Encoding is the package tokenizers' (`pip install 'minrnn[hf]'`).

    Args:
        merges: pairs of symbols with a space between them, in the order in which they are merged.
            A byte is written as in `byte_symbols`. Ids below 256 are the bytes; each new symbol has
            the next one.

    Raises:
        ValueError: a merge is not of two symbols that are known before it.

    Example:
        >>> bpe = BPE(["t h", "th e"])
        >>> bpe.vocab_size, bpe.encode("the hat").tolist(), bpe.decode([257, 32])
        (258, [257, 32, 104, 97, 116], 'the ')
    """

    kind = "bpe"

    def __init__(self, merges: Sequence[str]) -> None:
        single = byte_symbols()
        self.merges = list(merges)
        # each symbol as it is written -> its id
        self.symbols = {symbol: i for i, symbol in enumerate(single)}
        for number, merge in enumerate(self.merges):
            parts = merge.split(" ")
            if len(parts) != 2 or not all(part in self.symbols for part in parts):
                raise ValueError(
                    f"`merges` must each join two symbols known before, got {merge!r} as "
                    f"number {number}"
                )
            self.symbols.setdefault("".join(parts), len(self.symbols))
        byte = {symbol: bytes([i]) for i, symbol in enumerate(single)}
        self._names = list(self.symbols)
        self._bytes = [b"".join(byte[c] for c in symbol) for symbol in self.symbols]

    @property
    def vocab_size(self) -> int:
        """The number of symbols, V."""
        return len(self.symbols)

    @property
    def byte_lengths(self) -> np.ndarray:
        """The bytes that each symbol stands for, (V,) int64."""
        return np.array([len(content) for content in self._bytes])

    def encode(self, text: str) -> np.ndarray:
        """The ids of `text`, (T,) int64.

        Raises:
            ModuleNotFoundError: the package tokenizers is not installed.
            ValueError: `text` holds half a surrogate pair.
        """
        to_utf8(text)
        return np.concatenate([np.zeros(0, dtype=np.int64), *self.encode_blocks([text])])

    def encode_blocks(self, blocks: Iterable[str]) -> Iterator[np.ndarray]:
        """The ids of the text that `blocks` are when put together, however they cut it.

        Memory does not grow with the text, nor with its words.
        """
        pieces = words.pieces(blocks, self.fast.pre_tokenizer.pre_tokenize_str, _written)
        for is_text, group in groupby(pieces, lambda piece: isinstance(piece, str)):
            if not is_text:
                yield from self._encode_word(group)
                continue
            while texts := list(islice(group, _AT_ONCE)):
                for piece in self.fast.encode_batch_fast(texts):
                    yield np.array(piece.ids, dtype=np.int64)

    def _encode_word(self, parts: Iterable[Any]) -> Iterator[np.ndarray]:
        """The ids of words that come in parts."""
        # Pairs are merged in the order of their ranks, from the left. What follows a word so far
        # can therefore change one more of its tokens for each merge, counted from its end.
        most = len(self.merges) + _OVERLAP
        held: list[int] = []
        for symbols, is_last in parts:
            held = self._extended(held, symbols)
            done = len(held) if is_last else max(0, len(held) - most)
            yield np.array(held[:done], dtype=np.int64)
            del held[:done]

    def _extended(self, ids: list[int], symbols: str) -> list[int]:
        """The ids of a word that begins as `ids` and continues with `symbols`."""
        if not symbols:
            return ids
        for overlap in (_OVERLAP, len(ids)):
            kept, again = ids[: max(0, len(ids) - overlap)], ids[max(0, len(ids) - overlap) :]
            after = self._merged("".join(self._names[i] for i in again) + symbols)
            # Ids are those of the whole if each two neighbours are those of the two alone: merging
            # across a place is a matter of the two tokens beside it.
            if not kept or self._merged(self._names[kept[-1]] + self._names[after[0]]) == [
                kept[-1],
                after[0],
            ]:
                return kept + after
        raise AssertionError

    def _merged(self, symbols: str) -> list[int]:
        """The ids of one word."""
        return [token.id for token in self.fast.model.tokenize(symbols)]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; bytes that are no UTF-8 become U+FFFD."""
        return b"".join(self._bytes[known_id(i, self.vocab_size)] for i in ids).decode(
            "utf-8", errors="replace"
        )

    def stream(self, ids: Iterable[int]) -> Iterator[str]:
        """The text of each id as it comes: "" until a character is complete."""
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        for i in ids:
            yield decoder.decode(self._bytes[known_id(i, self.vocab_size)])
        yield decoder.decode(b"", final=True)

    def to_json(self) -> dict[str, Any]:
        """What `minrnn.data.tokenizers.from_json` needs."""
        return {"kind": self.kind, "merges": self.merges}

    @cached_property
    def fast(self) -> Any:
        """The same as a `tokenizers.Tokenizer`."""
        return byte_level(self.symbols, self.merges, words=True)


def byte_symbols() -> list[str]:
    """A printable character for each byte, as GPT-2 writes them.

    Example:
        >>> symbols = byte_symbols()
        >>> symbols[ord("a")], symbols[ord(" ")], len(set(symbols))
        ('a', 'Ġ', 256)
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    # those without a character of their own take the ones behind the 256, in order
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


_WRITTEN = dict(enumerate(byte_symbols()))


def learn(texts: Iterable[str], vocab_size: int, size: int = 0) -> BPE:
    """Merge the pairs that `texts` hold most often, one after the other.

    Args:
        texts: blocks of a text; what is kept of them is how often each word comes, of a bounded
            number of words: see `minrnn.data.words.sample`.
        vocab_size: V, fewer if no pair comes twice any more.
        size: bytes of the text, so that the words are taken from all of it; 0 if unknown.

    Raises:
        ModuleNotFoundError: the package tokenizers is not installed.
    """
    library = _library()
    fast = byte_level({}, [], words=True)
    trainer = library.trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        initial_alphabet=byte_symbols(),
        show_progress=False,
    )
    _run(words.sample(texts, size), lambda sample: fast.train_from_iterator(sample, trainer))
    merges = json.loads(fast.to_str())["model"]["merges"]
    return BPE([" ".join(pair) for pair in merges])


def byte_level(symbols: dict[str, int], merges: Sequence[str], *, words: bool) -> Any:
    """A `tokenizers.Tokenizer` over bytes.

    Args:
        symbols: the id of each, written as in `byte_symbols`.
        merges: as `BPE` has them.
        words: merge inside words only.

    Raises:
        ModuleNotFoundError: the package tokenizers is not installed.
    """
    library = _library()
    pairs = [tuple(merge.split(" ")) for merge in merges]
    fast = library.Tokenizer(library.models.BPE(vocab=symbols, merges=pairs))
    fast.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=words)
    fast.decoder = library.decoders.ByteLevel()
    return fast


def _written(text: str) -> str:
    """The bytes of `text` as in `byte_symbols`."""
    return text.encode("utf-8").decode("latin-1").translate(_WRITTEN)


def _run(texts: Iterable[str], work: Callable[[Iterator[str]], None]) -> None:
    """Call `work` on `texts`, and handle signals meanwhile: it runs for long outside of Python."""
    errors: list[BaseException] = []
    stopped = threading.Event()

    def until_stopped() -> Iterator[str]:
        for text in texts:
            if stopped.is_set():
                raise InterruptedError
            yield text

    def call() -> None:
        try:
            work(until_stopped())
        except BaseException as error:
            errors.append(error)

    # when all is read, pairs are merged without Python: that is not waited for after a signal
    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    try:
        while thread.is_alive():
            thread.join(0.1)
    except BaseException:
        stopped.set()
        thread.join(1.0)
        raise
    if errors:
        raise errors[0]


def _library() -> Any:
    try:
        import tokenizers
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "the tokenizer 'bpe' needs the package tokenizers, which is not installed: "
            "pip install 'minrnn[hf]'"
        ) from error
    return tokenizers
