"""Streaming: read a prompt once, then one symbol at a time, in memory that does not grow."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count

import torch
from torch import Tensor

from minrnn.configs import check_fields
from minrnn.data.tokenizers import Tokenizer
from minrnn.models import LanguageModel
from minrnn.state import State

# symbols of a prompt read at a time: bounds the memory of a long one
_CHUNK = 1024


@dataclass(frozen=True)
class Sampling:
    """How the next symbol is drawn from the logits.

    Filters apply in this order: temperature, top-k, top-p.

    Raises:
        ValueError: a field is out of range.
        TypeError: a field has another type.
    """

    temperature: float = 1.0
    """Logits are divided by it; 0 takes the likeliest symbol always."""
    top_k: int = 0
    """Draw from the k likeliest symbols only; 0 for all."""
    top_p: float = 1.0
    """Draw from the likeliest symbols that together reach this probability."""
    seed: int | None = None
    """Of the draws; None draws differently each time."""

    def __post_init__(self) -> None:
        check_fields(self)
        if self.temperature < 0:
            raise ValueError(f"`temperature` must be >= 0, got {self.temperature}")
        if self.top_k < 0:
            raise ValueError(f"`top_k` must be >= 0, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"`top_p` must be in (0, 1], got {self.top_p}")
        if self.seed is not None and not 0 <= self.seed < 1 << 63:
            raise ValueError(f"`seed` must be in [0, 2^63), got {self.seed}")


class Stream:
    """One text that a model reads and continues; it knows ids only.

    Args:
        model: in evaluation mode.
        sampling: how symbols are drawn.
        state: where to go on, e.g. the `state` of another stream; None at the start of a text.

    Example:
        >>> from minrnn.models import ModelConfig
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
        model: LanguageModel,
        sampling: Sampling = Sampling(),
        state: State | None = None,
    ) -> None:
        self.model, self.sampling = model, sampling
        self.device = next(model.parameters()).device
        self.state = model.init_state(1) if state is None else state
        self._logits: Tensor | None = None
        self._random = torch.Generator(self.device)
        if sampling.seed is None:
            self._random.seed()
        else:
            self._random.manual_seed(sampling.seed)

    @torch.no_grad()
    def prime(self, ids: Sequence[int] | Tensor) -> None:
        """Read `ids` behind what was read so far.

        Raises:
            ValueError: there are none.
        """
        if len(ids) == 0:
            raise ValueError("`ids` must hold at least one symbol, got none")
        row = torch.as_tensor(ids, device=self.device)[None]
        for chunk in row.split(_CHUNK, dim=1):
            logits, self.state = self.model(chunk, self.state)
            # (1, T, V) to (V,)
            self._logits = logits[0, -1]

    @torch.no_grad()
    def step(self) -> int:
        """Draw the next symbol and read it.

        Raises:
            ValueError: nothing was read yet.
        """
        if self._logits is None:
            raise ValueError("`prime` must be called with at least one symbol before `step`")
        drawn = int(sample(self._logits, self.sampling, self._random))
        self.prime([drawn])
        return drawn


def sample(logits: Tensor, sampling: Sampling, random: torch.Generator) -> Tensor:
    """Draw a symbol from `logits` (..., V); of `sampling`, its seed is not used.

    Returns:
        (...) int64.

    Raises:
        ValueError: the logits are not finite.

    Example:
        >>> logits = torch.tensor([0.0, 5.0, 1.0])
        >>> sample(logits, Sampling(temperature=0), torch.Generator()).item()
        1
    """
    if not bool(torch.isfinite(logits).all()):
        raise ValueError("`logits` must be finite: the model's weights are broken")
    if sampling.temperature == 0:
        return logits.argmax(dim=-1)
    # the largest is 0, so that a small temperature overflows to -inf only
    logits = logits.float() - logits.max(dim=-1, keepdim=True).values
    logits = logits / max(sampling.temperature, torch.finfo(logits.dtype).tiny)
    if 0 < sampling.top_k < logits.shape[-1]:
        least = logits.topk(sampling.top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < least, float("-inf"))
    probabilities = logits.softmax(dim=-1)
    if sampling.top_p < 1:
        ordered, order = probabilities.sort(dim=-1, descending=True)
        # a symbol stays if those before it have not reached top_p yet; the first one always stays
        before = ordered.cumsum(dim=-1) - ordered
        before[..., 0] = -1.0
        ordered = ordered.masked_fill(before >= sampling.top_p, 0.0)
        probabilities = torch.zeros_like(probabilities).scatter(-1, order, ordered)
    rows = probabilities.reshape(-1, probabilities.shape[-1])
    drawn = torch.multinomial(rows, 1, generator=random)
    return drawn.reshape(probabilities.shape[:-1])


def generate(
    model: LanguageModel,
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
        ValueError: `prompt` is empty or holds a character that the model does not know, or
            `length` < 0 or `stop` is empty.
    """
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


def until(pieces: Iterable[str], stop: str) -> Iterator[str]:
    """Pass `pieces` on up to the text `stop`, holding back what may be its beginning.

    Example:
        >>> "".join(until(iter(["ab", "c", "abd", "x"]), "abd"))
        'abc'
    """
    held = ""
    for piece in pieces:
        held += piece
        place = held.find(stop)
        if place >= 0:
            yield held[:place]
            return
        # the longest end of `held` that `stop` begins with
        keep = next(
            n for n in range(min(len(stop) - 1, len(held)), -1, -1) if held.endswith(stop[:n])
        )
        yield held[: len(held) - keep]
        held = held[len(held) - keep :]
    yield held
