"""State: what a model carries from one piece of a sequence to the next."""

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load as deserialize
from safetensors.torch import save
from torch import Tensor

from minrnn.files import write_atomically

_FORMAT = "minrnn.State/1"


class State(Mapping[str, "Tensor | State"]):
    """An immutable tree of named tensors, each with the batch first.

    Modules name the parts; nobody else needs to know them. Selecting rows, putting streams into
    one batch, forking, saving and restoring are therefore written once, here, for every model.
    To fork a state, use it twice: nothing ever writes to it.

    Args:
        parts: a name for each tensor (B, ...) or inner State; names are non-empty and hold no dot.

    Raises:
        ValueError: there are no parts, a name is empty or holds a dot, a tensor has no axis, or the
            batch sizes differ.
        TypeError: a part is neither a tensor nor a State.

    Example:
        >>> state = State({"conv": torch.zeros(3, 2, 4), "rnn": State({"h": torch.ones(3, 5)})})
        >>> state.batch_size, state.num_bytes
        (3, 156)
        >>> state.select([0, 2]).batch_size
        2
        >>> both = State.concatenate([state.select([0]), state])
        >>> both["rnn"]["h"].shape
        torch.Size([4, 5])
    """

    def __init__(self, parts: Mapping[str, "Tensor | State"]) -> None:
        for name in parts:
            if not isinstance(name, str) or not name or "." in name:
                raise ValueError(f"`parts` needs non-empty names without a dot, got {name!r}")
        for name, x in parts.items():
            if not isinstance(x, Tensor | State):
                raise TypeError(f"`parts` must hold tensors and States, got {name} = {x!r:.80}")
            if isinstance(x, Tensor) and x.dim() == 0:
                raise ValueError(f"`parts` must have the batch first, {name} has no axis")
        sizes = {x.batch_size if isinstance(x, State) else x.shape[0] for x in parts.values()}
        if len(sizes) != 1:
            raise ValueError(f"`parts` must have one batch size B, got {sorted(sizes)}")
        self._parts = dict(parts)

    def __getitem__(self, name: str) -> "Tensor | State":
        return self._parts[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    # states are compared as objects: equality of tensors is not one truth value
    def __eq__(self, other: object) -> bool:
        return self is other

    def __hash__(self) -> int:
        return id(self)

    def __len__(self) -> int:
        return len(self._parts)

    def __repr__(self) -> str:
        shapes = {name: tuple(x.shape) for name, x in self.flatten().items()}
        return f"State({shapes})"

    @property
    def batch_size(self) -> int:
        """The number of streams, B."""
        return next(iter(self.flatten().values())).shape[0]

    @property
    def num_bytes(self) -> int:
        """The memory that the tensors' elements take."""
        return sum(x.numel() * x.element_size() for x in self.flatten().values())

    def tensor(self, name: str) -> Tensor:
        """The part `name`, which must be a tensor."""
        part = self._parts[name]
        assert isinstance(part, Tensor)
        return part

    def inner(self, name: str) -> "State":
        """The part `name`, which must be a State."""
        part = self._parts[name]
        assert isinstance(part, State)
        return part

    def map(self, function: Callable[[Tensor], Tensor]) -> "State":
        """A State of `function` of every tensor, e.g. `state.map(torch.Tensor.detach)`."""
        return State(
            {k: x.map(function) if isinstance(x, State) else function(x) for k, x in self.items()}
        )

    def select(self, rows: Sequence[int] | Tensor) -> "State":
        """The streams `rows`, in that order.

        Args:
            rows: (N,) row numbers in [0, B), any of them more than once; or a mask, (B,) bool,
                which selects the rows where it is True.

        Raises:
            ValueError: a number is negative or >= B, `rows` has not one axis, or a mask has not B
                entries.
            TypeError: `rows` holds neither integers nor bools.

        Example:
            >>> state = State({"h": torch.arange(3)[:, None]})
            >>> state.select([2, 0])["h"].flatten().tolist()
            [2, 0]
            >>> state.select(torch.tensor([True, False, True]))["h"].flatten().tolist()
            [0, 2]
        """
        numbers = row_numbers(rows, self.batch_size)
        return self.map(lambda x: x.index_select(0, numbers.to(x.device)))

    @staticmethod
    def concatenate(states: Sequence["State"]) -> "State":
        """One batch of the streams of all `states`, which must come from the same model.

        Raises:
            ValueError: there are none, or their parts differ in name or shape.
        """
        if not states:
            raise ValueError("`states` must hold at least one State, got none")
        flat = [state.flatten() for state in states]
        shapes = [{name: tuple(x.shape[1:]) for name, x in parts.items()} for parts in flat]
        for number, other in enumerate(shapes):
            if other != shapes[0]:
                raise ValueError(
                    f"`states` must have equal parts, but number {number} has {other} "
                    f"where the first has {shapes[0]}"
                )
        return State.unflatten({name: torch.cat([x[name] for x in flat]) for name in flat[0]})

    def flatten(self) -> dict[str, Tensor]:
        """Every tensor by its dotted name."""
        flat: dict[str, Tensor] = {}
        for name, x in self.items():
            if isinstance(x, State):
                flat.update({f"{name}.{inner}": y for inner, y in x.flatten().items()})
            else:
                flat[name] = x
        return flat

    @staticmethod
    def unflatten(flat: Mapping[str, Tensor]) -> "State":
        """The inverse of `flatten`.

        Raises:
            ValueError: one name is both a tensor and the beginning of another.
        """
        parts: dict[str, Tensor | State] = {}
        inner: dict[str, dict[str, Tensor]] = {}
        for name, x in flat.items():
            head, _, rest = name.partition(".")
            if rest:
                parts.setdefault(head, x)
                inner.setdefault(head, {})[rest] = x
            else:
                parts[head] = x
        if any(name in inner for name in flat):
            raise ValueError(f"`flat` names a tensor and parts of it, got {sorted(flat)}")
        return State(parts | {name: State.unflatten(group) for name, group in inner.items()})

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the state to a safetensors file, atomically."""
        tensors = {name: x.detach().cpu().clone() for name, x in self.flatten().items()}
        write_atomically(path, save(tensors, metadata={"format": _FORMAT}))

    @staticmethod
    def load(path: str | os.PathLike[str]) -> "State":
        """Read a state that `save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is not a state file, or is damaged.
        """
        if not os.path.isfile(path):
            raise FileNotFoundError(f"`path` must name a state file, got {os.fspath(path)!r}")
        try:
            tensors, metadata = read_safetensors(path)
        except SafetensorError as error:
            raise ValueError(f"`path` holds a damaged state file, {path}: {error}") from error
        if metadata.get("format") != _FORMAT:
            raise ValueError(f"`path` must hold a {_FORMAT} file, {path} is none")
        return State.unflatten(tensors)


def read_safetensors(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read the tensors and the metadata of a safetensors file.

    Raises:
        SafetensorError: the file is damaged or truncated.
    """
    try:
        os.fspath(path).encode("utf-8")
    except UnicodeEncodeError:
        # safetensors opens no file of such a name
        return parse_safetensors(Path(path).read_bytes())
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        # the names are a method's, not a mapping's
        names = file.keys()
        return {name: file.get_tensor(name) for name in names}, metadata


def parse_safetensors(content: bytes) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The same of the bytes of a file.

    Raises:
        SafetensorError: they are damaged or truncated.
    """
    tensors = deserialize(content)
    # 8 bytes say how long the header is
    size = int.from_bytes(content[:8], "little")
    return tensors, json.loads(content[8 : 8 + size]).get("__metadata__", {})


def row_numbers(rows: Sequence[int] | Sequence[bool] | Tensor, batch_size: int) -> Tensor:
    """Return the row numbers, (N,) int64, that `rows` selects from a batch.

    As in torch's indexing a mask of bools selects the rows where it is True. Unlike there, negative
    numbers are an error: -1 often means "none", and would silently be the last row.

    Args:
        rows: (N,) integers in [0, batch_size), or (batch_size,) bools.
        batch_size: rows of the batch, B.

    Raises:
        ValueError: a number is negative or >= B, `rows` has not one axis, or a mask has not B
            entries.
        TypeError: `rows` holds neither integers nor bools, or both.

    Example:
        >>> row_numbers([True, False, True], 3), row_numbers([2, 2, 0], 3)
        (tensor([0, 2]), tensor([2, 2, 0]))
    """
    found = _as_vector(rows)
    if found.numel() == 0 and found.dtype != torch.bool:
        return found.long()
    # uint8 is a mask to torch and a number to NumPy
    if found.is_floating_point() or found.is_complex() or found.dtype == torch.uint8:
        raise TypeError(f"`rows` must hold integers or bools, got {found.dtype}")
    if found.dtype == torch.bool:
        if len(found) != batch_size:
            raise ValueError(
                f"`rows` as a mask must have B = {batch_size} entries, got {len(found)}"
            )
        return found.nonzero()[:, 0]
    found = found.long()
    inside = (found >= 0) & (found < batch_size)
    if torch.compiler.is_compiling():
        # a graph has no values yet: the same check, at each of its runs
        torch.ops.aten._assert_async.msg(inside.all(), f"`rows` must be in [0, {batch_size})")
    elif found.device.type != "meta" and not inside.all():
        bad = int(found[~inside][0])
        raise ValueError(f"`rows` must be in [0, B) = [0, {batch_size}), got {bad}")
    return found


def _as_vector(rows: Sequence[int] | Sequence[bool] | Tensor) -> Tensor:
    """`rows` as a tensor of one axis."""
    if not isinstance(rows, Tensor):
        kinds = {isinstance(row, bool) for row in rows} if isinstance(rows, Sequence) else set()
        if len(kinds) == 2:
            raise TypeError(f"`rows` must hold integers or bools, not both, got {rows!r:.80}")
        try:
            rows = torch.as_tensor(rows, device="cpu")
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(
                f"`rows` must be (N,) integers or (B,) bools, got {rows!r:.80}"
            ) from error
    if rows.dim() != 1:
        raise ValueError(f"`rows` must have one axis, (N,), got shape {tuple(rows.shape)}")
    return rows
