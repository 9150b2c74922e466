"""Characters, bytes or pairs of them to ids and back."""

import codecs
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from minrnn.data.bpe import BPE, known_id, to_utf8

# what a person asks for: "characters", "bytes", or "bpe:V"
Kind = str


class UnknownCharacterError(ValueError):
    """A text has a character that its tokenizer does not know."""

    def __init__(self, character: str, index: int, known: int) -> None:
        self.index = index
        """Of the character in the text."""
        self.what = (
            f"character {character!r} (U+{ord(character):04X}) is not among the {known} "
            "characters that this model knows"
        )
        super().__init__(self.what.replace(" is not", f" at place {index} is not", 1))

    def __reduce__(self) -> tuple[Any, ...]:
        # its arguments are not those of ValueError, which pickling between processes would use
        return ValueError, self.args


class Characters:
    """Each distinct character of a text is a symbol.

    Args:
        vocabulary: the characters, each once; the id of one is its place.

    Raises:
        ValueError: `vocabulary` is empty or holds a character twice.

    Example:
        >>> characters = Characters("abc")
        >>> characters.encode("cab").tolist(), characters.decode([2, 0, 1])
        ([2, 0, 1], 'cab')
    """

    kind = "characters"

    def __init__(self, vocabulary: str) -> None:
        if not vocabulary or len(set(vocabulary)) < len(vocabulary):
            raise ValueError(f"`vocabulary` must hold each character once, got {vocabulary!r}")
        self.vocabulary = vocabulary
        # code point -> id; -1 marks a character that is not in the vocabulary
        points = _code_points(vocabulary)
        self._ids = np.full(points.max() + 1, -1, dtype=np.int64)
        self._ids[points] = np.arange(len(points))

    @property
    def vocab_size(self) -> int:
        """The number of symbols, V."""
        return len(self.vocabulary)

    @property
    def byte_lengths(self) -> np.ndarray:
        """The bytes of UTF-8 that each symbol stands for, (V,) int64."""
        return np.array([len(c.encode("utf-8", "surrogatepass")) for c in self.vocabulary])

    def encode(self, text: str) -> np.ndarray:
        """The ids of `text`, (T,) int64.

        Raises:
            UnknownCharacterError: a character is not in the vocabulary; the message names it and
                its place.
        """
        points = _code_points(text)
        ids = self._ids[np.minimum(points, len(self._ids) - 1)]
        unknown = (ids < 0) | (points >= len(self._ids))
        if unknown.any():
            place = int(unknown.argmax())
            raise UnknownCharacterError(text[place], place, self.vocab_size)
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`."""
        return "".join(self.vocabulary[known_id(i, self.vocab_size)] for i in ids)

    def stream(self, ids: Iterable[int]) -> Iterator[str]:
        """The text of each id as it comes."""
        for i in ids:
            yield self.vocabulary[known_id(i, self.vocab_size)]

    def to_json(self) -> dict[str, Any]:
        """What `from_json` needs."""
        return {"kind": self.kind, "vocabulary": self.vocabulary}


class Bytes:
    """Each byte of the UTF-8 text is a symbol; anything can be read, valid UTF-8 or not.

    Example:
        >>> Bytes().encode("né").tolist()
        [110, 195, 169]
        >>> "".join(Bytes().stream([110, 195, 169]))
        'né'
    """

    kind = "bytes"
    vocab_size = 256

    @property
    def byte_lengths(self) -> np.ndarray:
        """One byte for each symbol, (V,) int64."""
        return np.ones(self.vocab_size, dtype=np.int64)

    def encode(self, text: str) -> np.ndarray:
        """The bytes of `text`, (T,) int64.

        Bytes of a command line or a file name that are not UTF-8 stay what they are.

        Raises:
            ValueError: `text` holds half a surrogate pair that stands for no byte.
        """
        content = to_utf8(text, "surrogateescape")
        return np.frombuffer(content, dtype=np.uint8).astype(np.int64)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; bytes that are no UTF-8 become U+FFFD."""
        return bytes(known_id(i, self.vocab_size) for i in ids).decode("utf-8", errors="replace")

    def stream(self, ids: Iterable[int]) -> Iterator[str]:
        """The text of each id as it comes: "" until a character is complete."""
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        for i in ids:
            yield decoder.decode(bytes([known_id(i, self.vocab_size)]))
        yield decoder.decode(b"", final=True)

    def to_json(self) -> dict[str, Any]:
        """What `from_json` needs."""
        return {"kind": self.kind}


Tokenizer = Characters | Bytes | BPE


def bpe_size(kind: str) -> int:
    """V of "bpe:V"; 0 for "characters" and "bytes".

    Raises:
        ValueError: `kind` is none of these, or V is not above the 256 bytes.

    Example:
        >>> bpe_size("bpe:4096"), bpe_size("bytes")
        (4096, 0)
    """
    if kind in (Characters.kind, Bytes.kind):
        return 0
    name, _, size = kind.partition(":")
    # str.isdigit alone would take what int does not
    if name == BPE.kind and size.isascii() and size.isdigit() and int(size) > Bytes.vocab_size:
        return int(size)
    raise ValueError(
        f"`tokenizer` must be 'characters', 'bytes' or 'bpe:V' with V > {Bytes.vocab_size} "
        f"symbols, got {kind!r}"
    )


def name_of(tokenizer: Tokenizer) -> str:
    """What a person asks for to get such a tokenizer.

    Example:
        >>> name_of(Bytes()), name_of(BPE(["t h"]))
        ('bytes', 'bpe:257')
    """
    size = f":{tokenizer.vocab_size}" if isinstance(tokenizer, BPE) else ""
    return tokenizer.kind + size


def from_json(saved: Any) -> Tokenizer:
    """The tokenizer whose `to_json` gave `saved`.

    Raises:
        ValueError: `saved` describes no known tokenizer.
    """
    if isinstance(saved, dict) and saved.get("kind") == "bytes":
        return Bytes()
    if isinstance(saved, dict) and isinstance(saved.get("vocabulary"), str):
        return Characters(saved["vocabulary"])
    if isinstance(saved, dict) and saved.get("kind") == "bpe" and _are_texts(saved.get("merges")):
        return BPE(saved["merges"])
    raise ValueError(
        f"`tokenizer` must be of kind 'characters', 'bytes' or 'bpe', got {saved!r:.200}"
    )


def _are_texts(values: Any) -> bool:
    return isinstance(values, list) and all(isinstance(value, str) for value in values)


def _code_points(text: str) -> np.ndarray:
    # a surrogate, e.g. from an undecodable command-line byte, stays one code point
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32).astype(
        np.int64
    )
