"""Runs Python with the packages of an extra only, as if nothing else were installed.

    python -m tests.extras MODULE,... COMMAND

hides the named modules and executes COMMAND.
"""

import sys
from importlib import metadata
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PROJECT = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
EXTRAS: dict[str, list[str]] = PROJECT["optional-dependencies"]


def packages_of(extra: str | None) -> set[str]:
    """All that `pip install minrnn[extra]` brings, the packages of packages included."""
    found: set[tuple[str, str]] = set()
    waiting = [("minrnn", extra or "")]
    while waiting:
        name, of = waiting.pop()
        if (name, of) in found:
            continue
        found.add((name, of))
        for line in _requirements(name, of):
            need = Requirement(line)
            if need.marker is None or need.marker.evaluate({"extra": of}):
                inner = canonicalize_name(need.name)
                waiting += [(inner, ""), *((inner, one) for one in need.extras)]
    return {name for name, _ in found}


def _requirements(name: str, extra: str) -> list[str]:
    # ours as they stand in the file, whatever was installed
    if name == "minrnn":
        return [*PROJECT["dependencies"], *(EXTRAS[extra] if extra else [])]
    try:
        return metadata.requires(name) or []
    except metadata.PackageNotFoundError:
        # a test that needs it fails by itself
        return []


def hidden_by(extra: str | None) -> set[str]:
    """The importable modules that are installed here and would not be with `extra` alone."""
    there = packages_of(extra)
    return {
        module
        for module, packages in metadata.packages_distributions().items()
        if not there & {canonicalize_name(name) for name in packages}
    }


def hide(modules: set[str]) -> None:
    """Make the `modules` look as if they were not installed."""
    find = PathFinder.find_spec

    def find_others(name: str, *args: Any, **kwargs: Any) -> Any:
        return None if name.partition(".")[0] in modules else find(name, *args, **kwargs)

    # some call it on an instance
    PathFinder.find_spec = staticmethod(find_others)


if __name__ == "__main__":
    hide(set(sys.argv[1].split(",")))
    code = sys.argv[2]
    del sys.argv[1:]
    exec(compile(code, "command", "exec"), {"__name__": "__main__"})
