"""State: what a model carries from one piece of a sequence to the next."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from safetensors import SafetensorError, safe_open
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
        ValueError: there are no parts, a name is empty or holds a dot, or the batch sizes differ.

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
            if not name or "." in name:
                raise ValueError(f"`parts` needs non-empty names without a dot, got {name!r}")
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
        """The streams `rows`, in that order; a row may be taken more than once."""
        device = rows.device if isinstance(rows, Tensor) else "cpu"
        rows = torch.as_tensor(rows, dtype=torch.long, device=device)
        return self.map(lambda x: x[rows.to(x.device)])

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
            with safe_open(path, framework="pt") as file:
                if (file.metadata() or {}).get("format") != _FORMAT:
                    raise ValueError(f"`path` must hold a {_FORMAT} file, {path} is none")
                names = file.keys()
                return State.unflatten({name: file.get_tensor(name) for name in names})
        except SafetensorError as error:
            raise ValueError(f"`path` holds a damaged state file, {path}: {error}") from error
