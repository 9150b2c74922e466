"""Where byte pair encoding may cut a text: tokens of the parts are then those of the whole.

A pair is merged inside a word only. A word is what this pattern of GPT-2 matches:

    's|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+
"""

import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

# characters of a text that are encoded at a time: bounds the memory
PIECE = 1 << 16
# what follows a place can change the word before it by fewer characters than this
_AHEAD = 4
# bytes of the different words that a vocabulary is learnt from, and characters of one
_LEARNT, _LONGEST = 4 << 20, 64
# about the words of the pattern above, no longer than that
_WORD = re.compile(
    r" ?[^\W\d_]{1,N}| ?\d{1,N}|\s{1,N}|(?:[^\w\s]|_){1,N}".replace("N", str(_LONGEST))
)
# whitespace for Python and not for the pattern, or by the version of Unicode
_DOUBTFUL = frozenset("\x1c\x1d\x1e\x1f\u180e")

# (text) -> its words: the bytes of each as `minrnn.data.bpe.byte_symbols` writes them, and where
Split = Callable[[str], list[tuple[str, tuple[int, int]]]]


class WordPart(NamedTuple):
    """Consecutive bytes of one word."""

    symbols: str
    """as `minrnn.data.bpe.byte_symbols` writes them"""
    is_last: bool
    """whether the word ends here"""


def pieces(
    blocks: Iterable[str], split: Split, symbols: Callable[[str], str]
) -> Iterator[str | WordPart]:
    """The text of `blocks` in pieces of at most about PIECE characters.

    Args:
        blocks: consecutive parts of a text, cut anywhere.
        split: the words of a text.
        symbols: the bytes of a text as `split` writes them.

    Yields:
        A str where no word of it continues in the next piece; parts where a word is too long.
    """
    blocks, held = iter(blocks), ""
    for block in blocks:
        held += block
        while len(held) > PIECE:
            place = _last_boundary(held)
            if place:
                yield held[:place]
                held = held[place:]
            else:
                held = yield from _long_word(held, blocks, split, symbols)
    if held:
        yield held


def _last_boundary(text: str) -> int:
    """The last place in [1, PIECE] where a word surely ends, whatever is around; 0 for none."""
    after = _class(text[PIECE])
    for place in range(PIECE, 0, -1):
        before = _class(text[place - 1])
        # 's and the like are words that begin among the marks
        is_quote = text[place - 1] == "'" and after == "L"
        if before and after and before not in (after, "Z") and not is_quote:
            return place
        after = before
    return 0


def _class(character: str) -> str:
    """L letter, N number, Z whitespace, P all others; "" in doubt."""
    if character in _DOUBTFUL:
        return ""
    if character.isspace():
        return "Z"
    category = unicodedata.category(character)
    return "" if category == "Cn" else category[0] if category[0] in "LN" else "P"


def _long_word(
    held: str, blocks: Iterator[str], split: Split, symbols: Callable[[str], str]
) -> Iterator[WordPart]:
    """The words at the start of `held`, to the end of the first that is long; returns the rest."""
    window = held[:PIECE]
    first = 0
    for word, (start, stop) in split(window):
        first = start
        if stop == len(window) or start > len(window) - _AHEAD:
            break
        yield WordPart(word, True)
    if first:
        return held[first:]
    # a word covers the window; the end of it, with two characters before, is split again
    stop = len(window) - _AHEAD
    yield WordPart(symbols(held[:stop]), False)
    held = held[stop - 2 :]
    while True:
        while len(held) <= PIECE and (block := next(blocks, None)) is not None:
            held += block
        window = held[:PIECE]
        (_, (_, stop)), *_ = split(window)
        if stop < len(window) or len(held) == len(window):
            yield WordPart(symbols(held[2:stop]), True)
            return held[stop:]
        yield WordPart(symbols(held[2 : stop - _AHEAD]), False)
        held = held[stop - _AHEAD - 2 :]


def sample(texts: Iterable[str], size: int = 0) -> Iterator[str]:
    """The text that a vocabulary is learnt from: all of it, if its different words are few.

    What learning keeps in memory goes by the bytes of the different words, about a hundred for
    each. A text without spaces has hardly any word twice. Once the words take _LEARNT bytes in all
    (or, of the text so far, their share), words that did not come before are left out, and long
    runs of letters are cut.

    Args:
        texts: consecutive parts of a text, cut anywhere.
        size: bytes of all; 0 if unknown.
    """
    known: set[str] = set()
    used = read = 0
    for piece in _cut(texts):
        words = _WORD.findall(piece)
        read += len(piece.encode())
        share = 0.25 + 0.75 * min(1.0, read / size) if size else 1.0
        is_whole = True
        # in their order, which a set has not
        for word in dict.fromkeys(words):
            if word not in known:
                used += len(word.encode())
                if used > share * _LEARNT:
                    used -= len(word.encode())
                    is_whole = False
                else:
                    known.add(word)
        if is_whole and max(map(len, words), default=0) < _LONGEST:
            yield piece
        else:
            yield "\n".join(word for word in words if word in known)


def _cut(blocks: Iterable[str]) -> Iterator[str]:
    """The text of `blocks` in pieces; a word is cut only where there is no other place."""
    held = ""
    for block in blocks:
        held += block
        while len(held) > PIECE:
            place = _last_boundary(held) or PIECE
            yield held[:place]
            held = held[place:]
    if held:
        yield held
