"""What is asked of the engine, and what it says of each text."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

from torch import Tensor

from minrnn.sampling import Sampling
from minrnn.state import State

Reason = Literal["stop", "length", "time", "cancelled", "closed", "error"]


@dataclass(frozen=True)
class Request:
    """A prompt and the texts to draw behind it.

    Args:
        prompt: (T,) int64, T >= 1.
        length: symbols to draw for each text, at most; 0 only reads the prompt.
        samplings: one for each text.
        owner: prompts of one owner share what was read; those of others never do.
        state: of one row, what was read before the prompt; None at the start of a text.
        scores: how many of the likeliest symbols to score at each place; None scores nothing.
        scores_prompt: score the prompt too.
        seconds: time from its submission after which its texts end.
    """

    prompt: Tensor
    length: int
    samplings: tuple[Sampling, ...] = (Sampling(),)
    owner: str = ""
    state: State | None = None
    scores: int | None = None
    scores_prompt: bool = False
    seconds: float = float("inf")


class Scored(NamedTuple):
    """A symbol, and if asked for: log p of it, and of the likeliest ones, from the plain logits."""

    symbol: int
    log_p: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class Ending(NamedTuple):
    """Why a text ended, and where it stood: symbols drawn last that `state` has not read yet."""

    reason: Reason
    state: State | None = None
    unread: tuple[int, ...] = ()


class Listener(Protocol):
    """Hears of one text, in the thread of the engine; it must not wait for anything."""

    def read(self, prompt: Sequence[Scored]) -> None:
        """The prompt is read; its scores, if the request asks for them."""

    def drawn(self, symbol: Scored) -> bool:
        """Take the next symbol; True ends the text behind it."""
        ...

    def ended(self, ending: Ending) -> None:
        """Nothing follows."""


def scored(logits: Tensor, symbols: Sequence[int], top: int | None) -> list[Scored]:
    """The `symbols`, N of them, with their scores by `logits` (N, V) if `top` says how many.

    Example:
        >>> import torch
        >>> [one] = scored(torch.tensor([[0.0, 0.0]]), [1], 1)
        >>> one.symbol, round(one.log_p, 3), len(one.top)
        (1, -0.693, 1)
    """
    if top is None or not symbols:
        return [Scored(symbol) for symbol in symbols]
    log_p = logits.detach().double().log_softmax(dim=-1)
    own = log_p.gather(-1, log_p.new_tensor(symbols).long()[:, None])[:, 0].tolist()
    best = log_p.topk(min(top, log_p.shape[-1]), dim=-1)
    rows = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    tops = [tuple(zip(ids, values, strict=True)) for ids, values in rows]
    return [Scored(*row) for row in zip(symbols, own, tops, strict=True)]
