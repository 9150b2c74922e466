"""What is larger than memory, or than 32 bits can count. Slow: it writes 4 GB and fills 13 GB."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, bfloat16

# a text of so many bytes may take so much more memory than a small one
LARGE = {"characters": (2_000_000_000, 500_000_000), "bpe:1000": (200_000_000, 150_000_000)}
TRAIN = """
import resource, sys, torch
torch.set_num_threads(2)
from minrnn.cli import main
assert main(sys.argv[1:]) == 0
print("peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


def _peak_memory(source: Path, out: Path, tokenizer: str) -> int:
    """The peak resident memory of a training on `source`, in bytes."""
    options = ["--context", "256", "--batch-size", "64", "--width", "16", "--num-layers", "1"]
    options += ["--steps", "60", "--eval-every", "30", "--valid-limit", "100000"]
    options += ["--tokenizer", tokenizer]
    command = ["train", "text", "--data", str(source), "--out", str(out), *options]
    done = subprocess.run(
        [sys.executable, "-c", TRAIN, *command], capture_output=True, text=True, timeout=3000
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout.splitlines()[-1].split()[1])


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("tokenizer", LARGE)
def test_memory_does_not_grow_with_the_text(tokenizer: str, tmp_path: Path) -> None:
    size, allowed = LARGE[tokenizer]
    piece = "".join(f"{n} times {n} is {n * n}, and née 漢.\n" for n in range(30_000)).encode()
    small, large = tmp_path / "small.txt", tmp_path / "large.txt"
    small.write_bytes(piece)
    with large.open("wb") as file:
        for _ in range(size // len(piece) + 1):
            file.write(piece)
    little = _peak_memory(small, tmp_path / "little", tokenizer)
    much = _peak_memory(large, tmp_path / "much", tokenizer)
    split = json.loads((tmp_path / "much" / "config.json").read_text())["split"]
    assert split["valid"][1] > (0.9 if tokenizer == "characters" else 0.2) * size
    print(
        f"peak {little / 1e6:.0f} MB on {len(piece) / 1e6:.1f} MB, {much / 1e6:.0f} MB on {size:,}"
    )
    assert much - little < allowed


FUSED = torch.ops.minrnn.mingru_fused
FUSED_BACKWARD = torch.ops.minrnn.mingru_fused_backward
OPTIONS = ("g", False, None, None, False)
# steps whose numbers are compared: after as many, nothing is left of the state before them
SOME = 4096


def _gates(T: int) -> Tensor:
    """(1, T, 16): k and v of 8 channels. Only the last steps are not those of every period."""
    gates = torch.randn(1, SOME, 16, dtype=bfloat16).repeat(1, T // SOME, 1)
    gates[:, -SOME:] = torch.randn(1, SOME, 16)
    return gates


def _by_threads(op: Callable[..., tuple[Tensor, Tensor]], *args: Any) -> Iterator[list[Tensor]]:
    """Results of one thread, which goes from row to row, and of two, which are sent to tiles."""
    before = torch.get_num_threads()
    for num in (1, 2):
        torch.set_num_threads(num)
        try:
            yield [*op(*args, *OPTIONS)]
        finally:
            torch.set_num_threads(before)


@pytest.mark.slow
def test_states_beyond_the_32nd_bit() -> None:
    T = 2**28 + SOME
    gates = _gates(T)
    short, short_T = FUSED(gates[:, -2 * SOME :], None, *OPTIONS)
    start, _ = FUSED(gates[:, :SOME], None, *OPTIONS)
    for found in _by_threads(FUSED, gates, None):
        h, h_T = found
        # the last steps are those beyond 2**31 in h, beyond 2**32 in the gates
        assert h[:, :-SOME].numel() == 2**31
        assert torch.equal(h[:, -SOME:], short[:, -SOME:])
        assert torch.equal(h_T, short_T)
        assert torch.equal(h[:, :SOME], start)
        # there is no room for two
        del h, found[:]


@pytest.mark.slow
def test_gradients_beyond_the_32nd_bit() -> None:
    T = 2**27 + SOME
    gates = _gates(T)
    h, _ = FUSED(gates, None, *OPTIONS)
    dh, dh_T = torch.randn(1, 1, 8, dtype=bfloat16).expand(1, T, 8), torch.randn(1, 8)
    first, last = slice(2 * SOME), slice(T - SOME, T)
    h0 = h[:, -SOME - 1].float()
    end, _ = FUSED_BACKWARD(dh[:, last], dh_T, gates[:, last], h0, h[:, last], *OPTIONS)
    start, start0 = FUSED_BACKWARD(dh[:, first], dh_T, gates[:, first], None, h[:, first], *OPTIONS)
    for found in _by_threads(FUSED_BACKWARD, dh, dh_T, gates, None, h):
        grad, dh0 = found
        assert grad[:, :-SOME].numel() == 2**31
        assert torch.equal(grad[:, last], end)
        assert torch.equal(grad[:, :SOME], start[:, :SOME])
        assert torch.equal(dh0, start0)
        del grad, found[:]
