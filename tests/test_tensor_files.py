"""Files of safetensors, written one tensor at a time."""

import hashlib
import io
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load

from minrnn import checkpoint, tensor_files
from minrnn.bench.memory import resident

DTYPES = sorted(tensor_files._DTYPES, key=str)


def _tensors() -> dict[str, torch.Tensor]:
    """Of each dtype, in sizes that would leave the next one at an odd place."""
    found = {f"{n:02}": torch.ones(3, dtype=dtype) for n, dtype in enumerate(DTYPES)}
    found |= {"ärger": torch.randn(4, 5).T, "a.scalar": torch.tensor(2.5), "b": torch.zeros(0, 3)}
    return found | {'q"uote\\': torch.arange(6).view(2, 3)[:, 1:], "sha256": torch.ones(1)}


def test_what_is_written_is_read_by_safetensors(tmp_path) -> None:
    tensors = _tensors()
    file = io.BytesIO()
    tensor_files.write(file, tensors, {"of": "us", "sha": '"sha256":"'}, hashlib.sha256())
    found = load(file.getvalue())
    assert found.keys() == tensors.keys()
    for name, x in tensors.items():
        assert found[name].dtype == x.dtype
        assert found[name].shape == x.shape
        bytes_ = [y.contiguous().reshape(-1).view(torch.uint8) for y in (found[name], x)]
        assert torch.equal(*bytes_), name


def test_each_tensor_is_read_once_in_order_and_checked(tmp_path) -> None:
    tensors, seen = _tensors(), []
    path = tmp_path / "x.safetensors"
    checkpoint.write_tensors(path, tensors, {"n": 1}, lambda x: seen.append(x) or x)
    assert all(x is tensors[name] for x, name in zip(seen, sorted(tensors), strict=True))
    found, notes = checkpoint.read_tensors(path)
    assert notes == checkpoint.read_notes(path) == {"n": 1}
    # the checksum is that of the other writer
    assert torch.equal(checkpoint.from_bytes(checkpoint.to_bytes(found, notes), "it")[0]["b"],
                       found["b"])  # fmt: skip
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="its content does not fit its checksum"):
        checkpoint.read_tensors(path)


def test_a_dtype_that_the_format_lacks_is_named(tmp_path) -> None:
    path = tmp_path / "x.safetensors"
    with pytest.raises(
        TypeError, match=r"`z` must have a dtype of safetensors, got torch\.complex128"
    ):
        checkpoint.write_tensors(path, {"z": torch.ones(1, dtype=torch.complex128)}, {})
    assert list(tmp_path.iterdir()) == []


def test_notes_of_something_else_are_refused(tmp_path) -> None:
    path = tmp_path / "x.safetensors"
    with pytest.raises(FileNotFoundError, match=r"x\.safetensors does not exist"):
        checkpoint.read_notes(path)
    for content in (b"", b"\x80\x04N.", torch.rand(9).numpy().tobytes()):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="is damaged or truncated"):
            checkpoint.read_notes(path)
    file = io.BytesIO()
    tensor_files.write(file, {}, {"format": "other"}, hashlib.sha256())
    path.write_bytes(file.getvalue())
    with pytest.raises(ValueError, match=r"must have format 'minrnn\.run/1', got 'other'"):
        checkpoint.read_notes(path)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_no_second_copy_is_held(tmp_path: Path) -> None:
    tensors = {str(n): torch.ones(4 << 20) for n in range(6)}
    before = resident(reset=True)
    checkpoint.write_tensors(tmp_path / "x.safetensors", tensors, {})
    # 101 MB in all; two copies of it were 200
    assert resident(peak=True) - before < 30e6
