"""What every configuration checks of itself: that its fields hold what they are declared to."""

import dataclasses
import math
import types
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints


def check_fields(config: Any) -> None:
    """Compare each field of a dataclass with its annotation; numbers must be finite.

    Raises:
        TypeError: a field holds another type; the message names it.
        ValueError: a choice is unknown (the known are shown), or a number is not finite.
    """
    for name, kind in get_type_hints(type(config)).items():
        if name in {field.name for field in dataclasses.fields(config)}:
            _check(name, getattr(config, name), kind)


def _check(name: str, value: Any, kind: Any) -> None:
    if get_origin(kind) is Literal:
        known = get_args(kind)
        if value not in known:
            shown = ", ".join(map(repr, known))
            raise ValueError(f"`{name}` must be one of {shown}, got {value!r}")
        return
    if get_origin(kind) is tuple:
        _check_tuple(name, value, get_args(kind))
        return
    optional = get_origin(kind) in (types.UnionType, Union)
    kinds = get_args(kind) if optional else (kind,)
    pair = next((k for k in kinds if get_origin(k) is tuple), None)
    if pair is not None and value is not None:
        _check_tuple(name, value, get_args(pair))
        return
    kinds = tuple(tuple if k is pair else k for k in kinds)
    # an int will do where a float is wanted, a bool is no number
    accepted = (*kinds, int) if float in kinds else kinds
    if not isinstance(value, accepted) or (isinstance(value, bool) and bool not in kinds):
        wanted = " or ".join("None" if k is type(None) else k.__name__ for k in kinds)
        raise TypeError(f"`{name}` must be {wanted}, got {value!r}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"`{name}` must be finite, got {value}")


def _check_tuple(name: str, value: Any, kinds: tuple[Any, ...]) -> None:
    """`value` against tuple[kind, ...] or tuple[kind, kind]."""
    if not isinstance(value, tuple):
        raise TypeError(f"`{name}` must be tuple, got {value!r}")
    many = kinds[-1] is Ellipsis
    if not many and len(value) != len(kinds):
        raise ValueError(f"`{name}` must have {len(kinds)} parts, got {value!r}")
    for part, kind in zip(value, kinds[:1] * len(value) if many else kinds, strict=True):
        _check(name, part, kind)
