"""Which steps of a batch are tokens: padding is never read, packed sequences stay apart."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

# the label that no loss counts
IGNORED = -100


class Tokens:
    """The tokens of a batch, between padding that may be anywhere, in one or more sequences a row.

    Args:
        seen: (B, T) bool, False for padding.
        starts: (B, T) bool, True where a sequence starts from an empty state; the first token of a
            row always does.
    """

    def __init__(self, seen: Tensor, starts: Tensor | None = None) -> None:
        self.seen = seen
        # tokens of each row up to each step
        self.read = seen.cumsum(1)
        self.starts = seen & (self.read == 1)
        if starts is not None:
            self.starts = self.starts | (seen & starts)
        # the sequence of each token, and its step there
        first = self.starts[seen]
        self._sequence = first.cumsum(0) - 1
        steps = torch.arange(len(first), device=seen.device)
        self._step = steps - steps[first][self._sequence]
        self.num_sequences = int(first.sum())
        self._longest = int(self._step.max()) + 1 if len(first) else 0
        # a row has more than one
        self.is_packed = self.num_sequences > int(seen.any(1).sum())

    def gather(self, x: Tensor) -> Tensor:
        """The sequences of x (B, T, D) as rows (S, L, D), with zeros after the shorter ones."""
        rows = x.new_zeros(self.num_sequences, self._longest, x.shape[-1])
        return rows.index_put((self._sequence, self._step), x[self.seen])

    def scatter(self, y: Tensor) -> Tensor:
        """The inverse of `gather`; a step of padding has what the last token before it has."""
        # (number of tokens, D)
        flat = y[self._sequence, self._step]
        last = self.seen.flatten().cumsum(0).view_as(self.seen) - 1
        return _blank(flat[last.clamp(min=0)], self.read == 0)

    def targets(self, labels: Tensor) -> Tensor:
        """`labels` (B, T) without those of padding and those of tokens that nothing predicts."""
        return labels.masked_fill(~self.seen | self.starts, IGNORED)


def find_tokens(
    mask: Tensor | None, ids: Tensor | None, positions: Tensor | None, like: Tensor, pad_id: int
) -> Tokens | None:
    """The tokens of a batch; None if every step is one, in one sequence a row.

    Args:
        mask: (B, T) or more, of which the last T count: 0 for padding.
        ids: (B, T) or None; `pad_id` is padding whatever the mask says.
        positions: (B, T) or (1, T), or None; a token at 0 starts a sequence.
        like: (B, T) or (B, T, width), the batch.
        pad_id: the id of padding.

    Raises:
        ValueError: a shape does not fit.
    """
    B, T = like.shape[:2]
    seen = torch.ones(B, T, dtype=torch.bool, device=like.device)
    if mask is not None:
        if mask.dim() != 2 or mask.shape[0] != B or mask.shape[1] < T:
            raise ValueError(
                f"`attention_mask` must have shape (B, T) = ({B}, {T}), got {tuple(mask.shape)}"
            )
        seen = mask[:, -T:].bool().to(like.device)
    if ids is not None:
        seen = seen & (ids != pad_id)
    starts = None
    if positions is not None:
        if positions.dim() != 2 or positions.shape[0] not in (1, B) or positions.shape[1] != T:
            raise ValueError(
                f"`position_ids` must have shape (B, T) = ({B}, {T}), got {tuple(positions.shape)}"
            )
        starts = (positions == 0).to(like.device).expand(B, T)
    if bool(seen.all()) and (starts is None or not bool(starts[:, 1:].any())):
        return None
    return Tokens(seen, starts)


def spread(y: Tensor, read: Tensor) -> Tensor:
    """y (B, L, D), one entry a token, over the steps of `read` (B, T), the tokens up to each.

    A step of padding has what the last token before it has, zeros if there is none.
    """
    if y.shape[1] == 0:
        return y.new_zeros(*read.shape, y.shape[2])
    last = (read - 1).clamp(min=0)[:, :, None].expand(-1, -1, y.shape[2])
    return _blank(y.gather(1, last), read == 0)


def shifted(labels: Tensor) -> Tensor:
    """labels (B, T) of the step after each."""
    return F.pad(labels[:, 1:], (0, 1), value=IGNORED)


def group(keys: Sequence[int]) -> dict[int, list[int]]:
    """The places of each key."""
    places: dict[int, list[int]] = {}
    for place, key in enumerate(keys):
        places.setdefault(key, []).append(place)
    return places


def _blank(y: Tensor, empty: Tensor) -> Tensor:
    return y.masked_fill(empty[:, :, None], 0.0)


def model_inputs(ids: Tensor | None, embedded: Tensor | None) -> Tensor:
    """Ids (B, T), or what stands for them (B, T, width)."""
    if ids is not None and embedded is None:
        inputs, dims = ids, 2
    elif embedded is not None and ids is None:
        inputs, dims = embedded, 3
    else:
        raise ValueError("one of `input_ids` and `inputs_embeds` must be given, got both or none")
    if inputs.dim() != dims or inputs.shape[1] < 1:
        name, sizes = ("input_ids", "(B, T)") if dims == 2 else ("inputs_embeds", "(B, T, width)")
        raise ValueError(f"`{name}` must have shape {sizes} with T >= 1, got {tuple(inputs.shape)}")
    return inputs
