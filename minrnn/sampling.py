"""How the next symbol is drawn: from probabilities and one uniform number, each row by itself."""

import secrets
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from minrnn.configs import check_fields
from minrnn.splitmix import GAMMA, mixed


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

    def uniforms(self) -> "Uniforms":
        """The source of a text's uniform numbers, one for each symbol."""
        return Uniforms(secrets.randbits(63) if self.seed is None else self.seed)


@dataclass(slots=True)
class Uniforms:
    """Uniform numbers of one seed, the same on every device; it fits into a hundred bytes.

    Number n is SplitMix64's behind the mixed seed. A generator of torch or numpy would be kept for
    each of thousands of texts, in kilobytes, and asked for each number by itself.
    """

    seed: int
    """in [0, 2^63)"""
    count: int = 0
    """numbers drawn"""

    @staticmethod
    def next(sources: Sequence["Uniforms"]) -> np.ndarray:
        """The next number of each of R sources, (R,) float64 in [0, 1).

        Example:
            >>> one, other = Uniforms(0), Uniforms(0)
            >>> a, b = Uniforms.next([one, one])
            >>> bool(Uniforms.next([other])[0] == a != b)
            True
        """
        counts = []
        for source in sources:
            source.count += 1
            counts.append(source.count)
        seeds = mixed(np.array([source.seed for source in sources], dtype=np.uint64))
        states = seeds + np.array(counts, dtype=np.uint64) * np.uint64(GAMMA)
        return (mixed(states) >> np.uint64(11)) * 2.0**-53


def draw(logits: Tensor, samplings: Sequence[Sampling], random: Sequence[Uniforms]) -> Tensor:
    """Draw one symbol for each row; no row depends on the others.

        symbol = min {i: p_1 + ... + p_i > u},  u uniform in [0, 1)

    Args:
        logits: (B, V), before the softmax.
        samplings: B of them; their seeds are not used.
        random: B of them; each gives one number.

    Returns:
        (B,) int64, on the CPU.

    Raises:
        ValueError: the logits are not finite, or there are not B samplings and sources.

    Example:
        >>> logits = torch.tensor([[0.0, 5.0, 1.0]])
        >>> draw(logits, [Sampling(temperature=0)], [Uniforms(0)]).tolist()
        [1]
    """
    if not logits.dim() == 2 or not len(logits) == len(samplings) == len(random):
        raise ValueError(
            "`samplings` and `random` must have B entries for logits of shape (B, V), got "
            f"{len(samplings)} and {len(random)} for {tuple(logits.shape)}"
        )
    if not bool(torch.isfinite(logits).all()):
        raise ValueError("`logits` must be finite: the model's weights are broken")
    logits = logits.detach().to("cpu", torch.float64)
    u = torch.from_numpy(Uniforms.next(random))
    likeliest = logits.argmax(dim=-1)
    rows = [row for row, one in enumerate(samplings) if one.temperature > 0]
    if not rows:
        return likeliest
    chosen = [samplings[row] for row in rows]
    probabilities = _filtered(logits[rows], chosen)
    # (R, V), rising; the last one is about 1
    sums = probabilities.cumsum(dim=-1)
    drawn = torch.searchsorted(sums, u[rows, None] * sums[:, -1:], right=True)[:, 0]
    return likeliest.index_copy(0, torch.tensor(rows, device="cpu"), drawn)


def _filtered(logits: Tensor, samplings: Sequence[Sampling]) -> Tensor:
    """Probabilities (R, V), 0 for what the filters leave out; not normalised again."""
    smallest = torch.finfo(logits.dtype).tiny
    temperatures = logits.new_tensor([[max(one.temperature, smallest)] for one in samplings])
    # the largest is 0, so that a small temperature overflows to -inf only
    logits = logits - logits.max(dim=-1, keepdim=True).values
    probabilities = (logits / temperatures).softmax(dim=-1)
    V = logits.shape[-1]
    rows = [n for n, one in enumerate(samplings) if 0 < one.top_k < V or one.top_p < 1]
    if not rows:
        return probabilities
    chosen = [samplings[row] for row in rows]
    ks = torch.tensor([[min(one.top_k or V, V)] for one in chosen], device="cpu")
    ps = logits.new_tensor([[one.top_p] for one in chosen])
    ordered, order = probabilities[rows].sort(dim=-1, descending=True, stable=True)
    ordered = ordered.masked_fill(torch.arange(V, device="cpu") >= ks, 0.0)
    ordered = ordered / ordered.sum(dim=-1, keepdim=True)
    # a symbol stays if those before it have not reached top_p yet; the first one always stays
    before = ordered.cumsum(dim=-1) - ordered
    before[:, 0] = -1.0
    ordered = ordered.masked_fill(before >= ps, 0.0)
    kept = torch.zeros_like(ordered).scatter(-1, order, ordered)
    return probabilities.index_copy(0, torch.tensor(rows, device="cpu"), kept)
