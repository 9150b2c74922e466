"""Tensors written to a safetensors file one at a time, so that none is copied before its turn."""

import hashlib
import json
from collections.abc import Callable, Mapping
from typing import BinaryIO

import torch
from torch import Tensor

# the names of the format's dtypes: https://huggingface.co/docs/safetensors
_DTYPES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.complex64: "C64",
    torch.uint16: "U16",
    torch.uint32: "U32",
    torch.uint64: "U64",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}


def write(
    file: BinaryIO,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    digest: "hashlib._Hash",
    read: Callable[[Tensor], Tensor] = lambda x: x,
) -> None:
    """Write `tensors` and strings, and what `digest` is in the end as the string "sha256".

    Args:
        file: at its start; it can seek.
        tensors: of any device.
        metadata: strings for the header.
        digest: updated by each tensor (name, dtype, shape, content), in the order of the names.
        read: makes the tensor to be written of each of `tensors`, once, in the order of the names.

    Raises:
        TypeError: the format has no such dtype.
        OSError: the file cannot be written.
    """
    # the format has no holes, and readers want each tensor at a multiple of its dtype's size
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    offsets, end = {}, 0
    for name in order:
        offsets[name] = end
        end += tensors[name].numel() * tensors[name].dtype.itemsize
    blank = "0" * digest.digest_size * 2
    header: dict[str, object] = {"__metadata__": {**metadata, "sha256": blank}}
    for name in order:
        x, begin = tensors[name], offsets[name]
        if x.dtype not in _DTYPES:
            raise TypeError(f"`{name}` must have a dtype of safetensors, got {x.dtype}")
        header[name] = {
            "dtype": _DTYPES[x.dtype],
            "shape": list(x.shape),
            "data_offsets": [begin, begin + x.numel() * x.dtype.itemsize],
        }
    content = json.dumps(header, separators=(",", ":")).encode("utf-8")
    content += b" " * (-len(content) % 8)
    file.write(len(content).to_bytes(8, "little") + content)
    for name in sorted(tensors):
        x = read(tensors[name]).detach().cpu().contiguous()
        update(digest, name, x)
        file.seek(8 + len(content) + offsets[name])
        file.write(_bytes(x))
        del x
    # of the same length: "sha256" stands last in what stands first
    begin = content.index(b'"sha256":"' + blank.encode()) + len('"sha256":"')
    file.seek(8 + begin)
    file.write(digest.hexdigest().encode())
    file.seek(0, 2)


def update(digest: "hashlib._Hash", name: str, x: Tensor) -> None:
    """Add a tensor of the CPU to a digest."""
    digest.update(f"{name} {x.dtype} {tuple(x.shape)}".encode())
    digest.update(_bytes(x))


def _bytes(x: Tensor) -> memoryview:
    return x.reshape(-1).view(torch.uint8).numpy().data
