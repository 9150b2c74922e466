"""Direct calls of every operator of `torch.ops.minrnn` with arguments that do not fit.

    python tests/fuzz_operators.py --rounds 2000 --seed 0 [--library build/asan/_native.so]

Each round takes a call that fits and spoils some of its arguments: wrong ranks, sizes, dtypes and
strides, lists too short, values out of range, freed memory. A call must end in an error, or in
what the same numbers in fresh contiguous memory give; and the checks in C++, in Python and in the
fake kernels must agree. A crash ends the process: `--log` has the round, `--only` runs it again.
"""

import argparse
import importlib
import os
import pkgutil
import random
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

LIES = (-(1 << 63), -1, 0, 1, 2, 3, 4, 5, 8, 33, 1 << 31, 1 << 62, (1 << 63) - 1)
NAMES = ("g", "identity", "tanh", "", "G", "relu", "g ", "g\0", "identity" * 99, "\u03c3")
DTYPES = (
    torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.int32,
    torch.int8, torch.bool, torch.complex64, torch.float8_e5m2,
)  # fmt: skip
OPS = torch.ops.minrnn


class Found(Exception):
    """A call that was taken and should not have been, or the other way round."""


def sizes_of(rng: random.Random) -> tuple[int, int, int]:
    """B, T, D: mostly small, some empty, some worth two threads."""
    if rng.random() < 0.05:
        return rng.choice([1, 2]), 1500, 24
    return rng.choice([0, 1, 1, 2, 3]), rng.choice([0, 1, 2, 5, 17]), rng.choice([0, 1, 3, 8, 33])


def recurrence(name: str, rng: random.Random) -> list[Any]:
    """Arguments that fit one of scan, mingru and minlstm, fused or not, forward or backward."""
    B, T, D = sizes_of(rng)
    plain = name.removesuffix("_backward").removesuffix("_fused")
    num = 3 if plain == "minlstm" else 2
    dtype = rng.choice(DTYPES[:4])
    state = torch.float64 if dtype == torch.float64 else torch.float32
    is_fused, is_packed = "_fused" in name, rng.random() < 0.3
    time_first = is_fused and rng.random() < 0.5
    B = 1 if is_packed else B
    lead = (T, B) if time_first else (B, T)
    cuts = sorted(rng.choices(range(T + 1), k=rng.randrange(4)))
    bounds = torch.tensor([0, *cuts, T], dtype=rng.choice([torch.int32, torch.int64]))
    rows = len(bounds) - 1 if is_packed else B
    gates = [torch.randn(*lead, num * D if is_fused else D, dtype=dtype)]
    gates *= 1 if is_fused else num
    if plain == "scan" and name.endswith("_backward"):
        gates = gates[:1]
    options = [] if plain == "scan" else [rng.choice(NAMES[:3])]
    options += [rng.random() < 0.5] if plain == "minlstm" else []
    options += [time_first] if is_fused else []
    h0 = None if rng.random() < 0.3 else torch.randn(rows, D, dtype=state)
    reset = None if rng.random() < 0.5 else torch.rand(*lead) < 0.3
    layout = [reset, bounds if is_packed else None, rng.random() < 0.5]
    if not name.endswith("_backward"):
        return [*gates, h0, *options, *layout]
    dh, h = (torch.randn(*lead, D, dtype=dtype) for _ in range(2))
    return [dh, torch.randn(rows, D, dtype=state), *gates, h0, h, *options, *layout]


def selective(name: str, rng: random.Random) -> list[Any]:
    """Arguments that fit `selective_scan`."""
    (B, T, D), N = sizes_of(rng), rng.choice([0, 1, 4])
    make: dict[str, Any] = {"dtype": rng.choice(DTYPES[:2])}
    u, dt, A = torch.randn(B, T, D, **make), torch.rand(B, T, D, **make), -torch.rand(D, N, **make)
    sides, states = torch.randn(2, B, T, N, **make), torch.randn(2, B, D * N, **make)
    args = [u, dt, A - 0.1, *sides, states[0], rng.random() < 0.5]
    return [torch.randn(B, T, D, **make), states[1], *args] if name.endswith("d") else args


def matrix(N: int, K: int, dtype: Any) -> list[Tensor]:
    """A packed matrix as `run_model` takes it."""
    from minrnn.ops.rows import pack

    packed, none = pack(torch.randn(N, K), dtype), torch.empty(0)
    return [packed.panels, none if packed.scale is None else packed.scale, torch.randn(N)]


def linear_rows(name: str, rng: random.Random) -> list[Any]:
    """Arguments that fit `linear_rows`."""
    N, K, M = rng.choice([1, 4, 32, 70]), rng.choice([1, 3, 7, 8]), rng.choice([0, 1, 5])
    panels, scale, bias = matrix(N, K, rng.choice(["float32", "bfloat16", "int8"]))
    return [torch.randn(M, K), panels, scale if len(scale) else None, bias, N, K]


def run_model(name: str, rng: random.Random) -> list[Any]:
    """Arguments that fit `run_model`."""
    B, T, width, D, V = rng.choice([1, 2]), rng.choice([1, 5]), 8, rng.choice([3, 16]), 5
    gates, conv, inner = rng.choice([2, 3]), rng.choice([0, 1, 4]), rng.choice([0, 12])
    dtype, none, one = rng.choice(["float32", "bfloat16", "int8"]), torch.empty(0), torch.ones(8)
    weights, states = [], []
    for _ in range(rng.choice([0, 1, 2])):
        convolution = [torch.randn(conv, width), one, *matrix(width, width, dtype)]
        weights += convolution if conv else [none] * 5
        weights += [one, *matrix(gates * D, width, dtype), *matrix(width, D, dtype)]
        feed_forward = [one, *matrix(max(1, inner), width, dtype)]
        feed_forward += matrix(width, max(1, inner), dtype)
        weights += feed_forward if inner else [none] * 7
        states += [torch.randn(B, D), torch.randn(B, conv - 1, width) if conv else none]
    weights += [one, *matrix(V, width, dtype)]
    ids = torch.randint(V, (B, T))
    sizes = [D, gates, conv, inner]
    return [ids, torch.randn(V, width), weights, states, sizes, rng.choice(NAMES[:3]), True]


MAKERS = {"linear_rows": linear_rows, "run_model": run_model}


def spoiled(x: Any, rng: random.Random) -> Any:
    """An argument of the same type in the schema, most often one that does not fit."""
    if isinstance(x, bool):
        return not x
    if isinstance(x, int):
        return rng.choice(LIES)
    if isinstance(x, str):
        return rng.choice(NAMES)
    if isinstance(x, list):
        return spoiled_list(x, rng)
    if x is None:
        return torch.randn(rng.choices([0, 1, 2, 3, 8], k=rng.randrange(4)))
    return spoiled_tensor(x, rng)


def spoiled_list(x: list[Any], rng: random.Random) -> list[Any]:
    """Shorter, longer, in another order, or with an entry spoiled."""
    x, at = list(x), rng.randrange(len(x) + 1)
    way = rng.randrange(5)
    if way == 0:
        return x[:at]
    if way == 1:
        return [*x[:at], *(x[:1] or [torch.randn(3)]), *x[at:]]
    if way == 2:
        rng.shuffle(x)
    elif x:
        x[at % len(x)] = spoiled(x[at % len(x)], rng)
    return [torch.empty(0) if entry is None else entry for entry in x]


def spoiled_tensor(x: Tensor, rng: random.Random) -> Tensor | None:
    """Another rank, size, dtype, layout or place; other values; or None."""
    if not is_plain(x):
        return x
    axis = rng.randrange(max(1, x.dim()))
    has_axis = x.dim() > 0
    if has_axis and rng.random() < 0.4:
        return one_size(x, axis, rng)
    ways = [
        lambda: x[None],
        lambda: x.flatten(),
        lambda: torch.tensor(1).to(x.dtype),
        lambda: x.select(axis, 0) if has_axis and x.shape[axis] else x[None],
        lambda: x.narrow(axis, 0, x.shape[axis] // 2) if has_axis else x,
        lambda: x.repeat_interleave(2, axis) if has_axis else x,
        lambda: x.new_zeros([size + rng.choice([-1, 1]) if size else 1 for size in x.shape]),
        lambda: x.new_zeros(rng.choices([0, 1, 2, 5], k=rng.randrange(5))),
        lambda: x.transpose(0, x.dim() - 1) if has_axis else x,
        lambda: x.transpose(0, -1).contiguous().transpose(0, -1) if has_axis else x,
        lambda: torch.stack([x, x], dim=-1)[..., 0],
        lambda: x[:1].expand(x.shape) if has_axis and x.shape[0] else x,
        lambda: x.new_zeros(1).expand([1 << 50] * max(1, x.dim())),
        lambda: x.new_zeros([1] * x.dim()).expand([*x.shape[:-1], 1 << 50]) if x.dim() == 1 else x,
        lambda: x.to(rng.choice(DTYPES)),
        lambda: x.view(torch.uint8) if x.dtype.itemsize == 1 else x.to(rng.choice(DTYPES)),
        lambda: freed(x),
        lambda: x.to("meta"),
        lambda: x.to_sparse() if has_axis else x,
        lambda: None,
        lambda: torch.ops.aten._neg_view(x) if x.is_floating_point() else x,
        lambda: other_values(x, rng),
        lambda: other_values(x, rng),
    ]
    try:
        return rng.choice(ways)()
    except RuntimeError:
        # a way that torch does not go for this dtype
        return x


def one_size(x: Tensor, axis: int, rng: random.Random) -> Tensor:
    """Ones in fresh memory, one size another."""
    sizes, size = list(x.shape), x.shape[axis]
    sizes[axis] = rng.choice([0, 1, max(0, size - 1), size + 1, 2 * size])
    return x.new_ones(sizes)


def freed(x: Tensor) -> Tensor:
    """A tensor whose storage has been given back, as sharded training does between steps."""
    x = x.clone()
    x.untyped_storage().resize_(x.untyped_storage().nbytes() // 2)
    return x


def other_values(x: Tensor, rng: random.Random) -> Tensor:
    """For bounds and ids, what lies outside; for numbers, the extremes."""
    values = x.clone()
    if values.numel() == 0:
        return values
    if values.dtype == torch.bool:
        return ~values
    wild = [-(1 << 31), -1, 0, 2, 9, (1 << 31) - 1]
    if values.is_floating_point() or values.is_complex():
        wild = [float("nan"), float("inf"), -1e4, 0.0]
    elif values.dtype == torch.int64:
        wild += [-(1 << 63), 1 << 62, 1 << 40]
    elif values.dtype == torch.int8:
        wild = [-128, -1, 127]
    values.view(-1)[rng.randrange(values.numel())] = rng.choice(wild)
    return values


def tensors_of(args: list[Any]) -> list[Tensor | None]:
    """All tensors among arguments."""
    found: list[Tensor | None] = []
    for x in args:
        entries = x if isinstance(x, list) else [x]
        found += [y for y in entries if isinstance(y, Tensor)]
    return found


def is_plain(x: Tensor | None) -> bool:
    """Whether a tensor is what all kernels know, and small enough to copy."""
    if x is None or x.layout != torch.strided or x.device.type != "cpu" or x.numel() > 1 << 22:
        return False
    last = x.storage_offset() + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))
    return x.numel() == 0 or last < x.untyped_storage().nbytes() // x.element_size()


def copied(args: list[Any]) -> list[Any]:
    """The same numbers in fresh contiguous memory."""
    return [
        copied(x) if isinstance(x, list) else x.resolve_neg().clone(
            memory_format=torch.contiguous_format
        ) if isinstance(x, Tensor) else x
        for x in args
    ]  # fmt: skip


def attempt(run: Any, args: list[Any]) -> tuple[list[Tensor] | None, str]:
    """What a call returns, or None and its error."""
    try:
        out = run(*args)
    except Exception as error:  # every refusal is right
        return None, f"{type(error).__name__}: {error}"
    return [x for x in tensors_of([*out] if isinstance(out, tuple) else [out]) if x is not None], ""


def checked_in_python(name: str) -> Any:
    """Run the checks of pure torch and of the fake kernels; None where there are none."""
    from minrnn.ops import direct, rows
    from minrnn.ops import selective as selective_scan

    if name == "run_model":
        return None
    if name == "linear_rows":
        return lambda *args: rows._check_call(*args)
    if name == "selective_scan":
        return lambda *args: selective_scan._check(*args[:6])
    if name == "selective_scan_backward":
        return lambda *args: selective_scan._check_gradient(*args[:8])
    return lambda *args: direct.check_call(name, args, read_bounds=True)


def compare(name: str, args: list[Any]) -> bool:
    """One call: whether it was taken. Raises Found."""
    has_first = args[0] is not None and args[1] is not None
    plain = has_first and all(map(is_plain, tensors_of(args)))
    before = copied(args) if plain else args
    out, error = attempt(getattr(OPS, name), args)
    check = checked_in_python(name)
    if plain and check is not None:
        refused = attempt(check, args)[1]
        if (out is None) != bool(refused):
            raise Found(f"C++ says {error or 'yes'!r}, Python {refused or 'yes'!r}")
    if out is not None and plain:
        compare_results(name, args, before, out)
    return out is not None


def compare_results(name: str, args: list[Any], before: list[Any], out: list[Tensor]) -> None:
    """What a call returned with what it returns for the same numbers in contiguous memory."""
    again, error = attempt(getattr(OPS, name), before)
    if again is None:
        raise Found(f"the same in contiguous memory is refused: {error}")
    for x, y in zip(out, again, strict=True):
        # in double, since no tolerance is taken for 8 bits
        torch.testing.assert_close(
            x.double(), y.double(), rtol=1e-4, atol=1e-5, equal_nan=True, msg=f"{x}, {y}"
        )
    for x, y in zip(tensors_of(args), tensors_of(before), strict=True):
        assert x is not None
        if not bool(((x == y) | (x != x)).all()):
            raise Found("an input was written to")
    if name == "run_model":
        return
    fakes = attempt(getattr(OPS, name), [_meta(x) for x in args])[0]
    kinds = [[(x.shape, x.dtype) for x in found or []] for found in (out, fakes)]
    if kinds[0] != kinds[1]:
        raise Found(f"results {kinds[0]}, the fake kernel says {kinds[1]}")


def _meta(x: Any) -> Any:
    return x.to("meta") if isinstance(x, Tensor) else x


def one_round(names: list[str], seed: int) -> bool:
    """Spoil and make one call; whether it was taken."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    torch.set_num_threads(rng.choice([1, 2]))
    name = rng.choice(names)
    make = MAKERS.get(name, selective if name.startswith("selective") else recurrence)
    args = make(name, rng)
    for _ in range(rng.choice([0, 1, 1, 1, 2, 3])):
        at = rng.randrange(len(args))
        args[at] = spoiled(args[at], rng)
    try:
        return compare(name, args)
    except (Found, AssertionError) as error:
        raise Found(f"round {seed}: {name}({described(args)}): {error}") from error


def described(args: list[Any]) -> str:
    """Arguments on one line."""
    shown = [
        f"{x.dtype}{tuple(x.shape)}/{x.stride() if x.layout == torch.strided else x.layout}"
        if isinstance(x, Tensor)
        else described(x) if isinstance(x, list) else repr(x)
        for x in args
    ]  # fmt: skip
    return ", ".join(shown)


def main() -> int:
    """Run the rounds and say how many calls were taken."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, default=None)
    parser.add_argument("--log", type=Path, default=None)
    parser.add_argument("--operator", default=None)
    parser.add_argument("--library", type=Path, default=None)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    if options.library is not None:
        load, library = torch.ops.load_library, options.library
        torch.ops.load_library = lambda path: load(library)  # pyright: ignore[reportAttributeAccessIssue]
    from minrnn import info, ops

    # every module that defines operators
    for module in pkgutil.iter_modules(ops.__path__):
        if not module.name.startswith("_"):
            importlib.import_module(f"minrnn.ops.{module.name}")
    assert set(info.kernels()["CPU"].values()) == {"compiled"}, "no compiled kernels to test"
    schemas = torch._C._jit_get_all_schemas()
    names = sorted({s.name.split("::")[1] for s in schemas if s.name.startswith("minrnn::")})
    names = [name for name in names if options.operator in (None, name)]
    log = os.open(options.log or os.devnull, os.O_WRONLY | os.O_CREAT)
    taken, wrong, first = 0, 0, options.seed * 10_000_000
    rounds = range(first, first + options.rounds) if options.only is None else [options.only]
    for seed in rounds:
        os.pwrite(log, f"{seed:20}".encode(), 0)
        try:
            taken += one_round(names, seed)
        except Found as error:
            wrong += 1
            print(error)
    print(
        f"{len(names)} operators, {len(rounds)} calls: {taken} taken, {wrong} wrong, others refused"
    )
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
