"""Streaming: read a prompt once, then one symbol at a time, in memory that does not grow."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import count

import torch
from torch import Tensor, nn

from minrnn.data.tokenizers import Tokenizer
from minrnn.models import TextModel, checked_ids
from minrnn.sampling import Sampling, draw
from minrnn.state import State

# symbols of a prompt read at a time: bounds the memory of a long one
_CHUNK = 1024


class Stream:
    """One text that a model reads and continues; it knows ids only.

    Args:
        model: in evaluation mode.
        sampling: how symbols are drawn.
        state: where to go on, e.g. the `state` of another stream; None at the start of a text.

    Raises:
        ValueError: dropout is active in `model`, which is in training mode.

    Example:
        >>> from minrnn.models import LanguageModel, ModelConfig
        >>> model = LanguageModel(ModelConfig(vocab_size=5, width=8)).eval()
        >>> stream = Stream(model, Sampling(seed=0))
        >>> stream.prime([1, 2, 3])
        >>> size = stream.state.num_bytes
        >>> ids = [stream.step() for _ in range(10)]
        >>> len(ids), stream.state.num_bytes == size
        (10, True)
    """

    def __init__(
        self,
        model: TextModel,
        sampling: Sampling = Sampling(),
        state: State | None = None,
    ) -> None:
        _check_evaluates(model)
        self.model, self.sampling = model, sampling
        self.device = next(model.parameters()).device
        self.state = model.init_state(1) if state is None else state
        self._logits: Tensor | None = None
        self._random = sampling.uniforms()

    @torch.no_grad()
    def prime(self, ids: Sequence[int] | Tensor) -> None:
        """Read `ids` behind what was read so far.

        Args:
            ids: (T,) integers in [0, V), T >= 1.

        Raises:
            ValueError: there are none, `ids` has not one axis, or one is outside.
            TypeError: `ids` holds no integers.
        """
        row = checked_ids(ids, self.model.config.vocab_size)
        self._read(row.to(self.device)[None])

    def _read(self, ids: Tensor) -> None:
        """Read (1, T) ids that are known to be valid."""
        for chunk in ids.split(_CHUNK, dim=1):
            logits, self.state = self.model(chunk, self.state)
            # (1, T, V) to (1, V)
            self._logits = logits[:, -1]

    @torch.no_grad()
    def step(self) -> int:
        """Draw the next symbol and read it.

        Raises:
            ValueError: nothing was read yet.
        """
        if self._logits is None:
            raise ValueError("`prime` must be called with at least one symbol before `step`")
        drawn = int(draw(self._logits, [self.sampling], [self._random]))
        self._read(torch.tensor([[drawn]], device=self.device))
        return drawn


def _check_evaluates(model: TextModel) -> None:
    """No dropout is active in `model`: each token would be drawn from another random model."""
    for part in model.modules() if isinstance(model, nn.Module) else ():
        if isinstance(part, nn.Dropout) and part.training and part.p:
            raise ValueError(
                f"`model` must be in evaluation mode, got dropout of {part.p} in training mode: "
                "call model.eval() first"
            )


def generate(
    model: TextModel,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    length: int | None = None,
    stop: str | None = None,
    sampling: Sampling = Sampling(),
) -> Iterator[str]:
    """Continue `prompt`, piece by piece as the symbols come.

    Args:
        model: in evaluation mode.
        tokenizer: what the model was trained with.
        prompt: at least one symbol; it is not repeated.
        length: symbols to draw; None never ends.
        stop: end before this text appears.
        sampling: how symbols are drawn.

    Returns:
        An iterator over pieces of text. Memory is the same however many are taken.

    Raises:
        ValueError: `prompt` is empty or holds a character that the model does not know,
            `length` < 0, `stop` is empty, `tokenizer` has not the model's number of tokens, or
            dropout is active in `model`.
    """
    if tokenizer.vocab_size != model.config.vocab_size:
        raise ValueError(
            f"`tokenizer` must have the model's V = {model.config.vocab_size} tokens, "
            f"got {tokenizer.vocab_size}"
        )
    if length is not None and length < 0:
        raise ValueError(f"`length` must be >= 0, got {length}")
    if stop is not None and not stop:
        raise ValueError("`stop` must be a text, got an empty one")
    ids = tokenizer.encode(prompt)
    if len(ids) == 0:
        raise ValueError("`prompt` must hold at least one symbol, got none")
    stream = Stream(model, sampling)
    stream.prime(torch.from_numpy(ids))
    steps = count() if length is None else range(length)
    pieces = tokenizer.stream(stream.step() for _ in steps)
    return pieces if stop is None else until(pieces, stop)


class StopText:
    """Passes a text on up to where a stop text begins, holding back what may be its beginning.

    Args:
        stops: the texts that end it, none empty; the one that is complete first does.

    Attributes:
        found: a stop text came; what follows is not passed on.

    Example:
        >>> text = StopText(["abd"])
        >>> [text.push(piece) for piece in ("ab", "c", "abd", "x")], text.found
        (['', 'abc', '', ''], True)
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self.stops, self.found, self._held = tuple(stops), False, ""

    def push(self, piece: str) -> str:
        """Take the next piece, and give what can be passed on."""
        if self.found:
            return ""
        for letter in piece:
            self._held += letter
            stop = next((one for one in self.stops if self._held.endswith(one)), None)
            if stop is not None:
                self.found = True
                return self._give(len(self._held) - len(stop))
        # the longest end of what is held that a stop text begins with
        longest = max((len(one) - 1 for one in self.stops), default=0)
        kept = next(
            n
            for n in range(min(longest, len(self._held)), -1, -1)
            if any(one.startswith(self._held[len(self._held) - n :]) for one in self.stops)
            or n == 0
        )
        return self._give(len(self._held) - kept)

    def rest(self) -> str:
        """What was held back and belongs to the text after all, at its end."""
        return "" if self.found else self._give(len(self._held))

    def _give(self, length: int) -> str:
        given, self._held = self._held[:length], self._held[length:]
        return given


def until(pieces: Iterable[str], stop: str) -> Iterator[str]:
    """Pass `pieces` on up to the text `stop`.

    Example:
        >>> "".join(until(iter(["ab", "c", "abd", "x"]), "abd"))
        'abc'
    """
    text = StopText([stop])
    for piece in pieces:
        yield text.push(piece)
        if text.found:
            return
    yield text.rest()
