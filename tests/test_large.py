"""A text larger than what may be kept in memory. Slow: it writes 4 GB and reads them twice."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SIZE = 2_000_000_000
ALLOWED = 500_000_000
TRAIN = """
import resource, sys, torch
torch.set_num_threads(2)
from minrnn.cli import main
assert main(sys.argv[1:]) == 0
print("peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


def _peak_memory(source: Path, out: Path) -> int:
    """The peak resident memory of a training on `source`, in bytes."""
    options = ["--context", "256", "--batch-size", "64", "--width", "16", "--num-layers", "1"]
    options += ["--steps", "60", "--eval-every", "30", "--valid-limit", "100000"]
    command = ["train", "text", "--data", str(source), "--out", str(out), *options]
    done = subprocess.run(
        [sys.executable, "-c", TRAIN, *command], capture_output=True, text=True, timeout=3000
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout.splitlines()[-1].split()[1])


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_memory_does_not_grow_with_the_text(tmp_path: Path) -> None:
    piece = "".join(f"{n} times {n} is {n * n}, and née 漢.\n" for n in range(30_000)).encode()
    small, large = tmp_path / "small.txt", tmp_path / "large.txt"
    small.write_bytes(piece)
    with large.open("wb") as file:
        for _ in range(SIZE // len(piece) + 1):
            file.write(piece)
    little = _peak_memory(small, tmp_path / "little")
    much = _peak_memory(large, tmp_path / "much")
    split = json.loads((tmp_path / "much" / "config.json").read_text())["split"]
    assert split["valid"][1] > 0.9 * SIZE
    print(f"peak {little / 1e6:.0f} MB on {len(piece) / 1e6:.1f} MB, {much / 1e6:.0f} MB on 2 GB")
    assert much - little < ALLOWED
