"""One safetensors file, written by several processes at once: each writes its slices of the tensors in place.

safetensors' own writer wants whole tensors in one process. The bytes do not depend on the number of processes.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from clt.files import reading

NAMES = {
    torch.float32: "F32",
    torch.float64: "F64",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.uint8: "U8",
}


class Part(NamedTuple):
    """What this process has of a tensor: all of it (`dim` None), or a slice along dimension `dim` from `start` on."""

    tensor: Tensor
    shape: tuple[int, ...]
    """Shape of the whole."""
    dim: int | None = None
    start: int = 0
    writes: bool = True
    """Whether this process writes the slice."""


def offsets(parts: dict[str, Part]) -> tuple[bytes, dict[str, int], int]:
    """The header of the file, the place of each tensor in it, and its size in bytes."""
    entries, places, at = {}, {}, 0
    for name, part in parts.items():
        end = at + math.prod(part.shape) * part.tensor.element_size()
        entries[name] = {"dtype": NAMES[part.tensor.dtype], "shape": part.shape, "data_offsets": [at, end]}
        places[name], at = at, end
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    return header, {name: place + len(header) for name, place in places.items()}, at + len(header)


def create(path: Path, parts: dict[str, Part]) -> None:
    """Write the header and allocate all of the file's space. Raises OSError on a full disk."""
    header, _, size = offsets(parts)
    with path.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, size)
        file.write(header)


def snapshot(parts: dict[str, Part]) -> dict[str, Part]:
    """Copy what this process writes to the CPU; other parts keep their tensors.

    GPU tensors are copied asynchronously in the current stream.
    """
    return {name: part._replace(tensor=_copy(part.tensor)) if part.writes else part for name, part in parts.items()}


def _copy(tensor: Tensor) -> Tensor:
    # A copy into pageable memory would be slow and block. Torch reuses pinned memory for the next snapshot.
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
    return host.copy_(tensor.detach(), non_blocking=True)


def write(path: Path, parts: dict[str, Part]) -> None:
    """Write this process's parts (contiguous, on the CPU) into a file that `create` made, and sync it."""
    _, places, _ = offsets(parts)
    descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        for name, part in parts.items():
            if part.writes and part.tensor.numel():
                _write_part(descriptor, part, places[name])
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_part(descriptor: int, part: Part, at: int) -> None:
    dim, itemsize = part.dim or 0, part.tensor.element_size()
    runs = part.tensor.reshape(math.prod(part.shape[:dim]), -1)  # each is contiguous in the file
    stride = math.prod(part.shape[dim:]) * itemsize
    first = at + part.start * math.prod(part.shape[dim + 1 :]) * itemsize
    for i, run in enumerate(runs.view(torch.uint8).numpy()):
        piece, place = run.data, first + i * stride
        while piece:
            written = os.pwrite(descriptor, piece, place)
            piece, place = piece[written:], place + written


def read(path: Path, parts: dict[str, Part]) -> None:
    """Fill each part's tensor from the file.

    Raises UserError when the file is damaged, lacks one of the tensors or has it in another shape.
    """
    with reading(path, "delete its checkpoint to go on from the one before"), safe_open(path, "pt") as file:
        missing = sorted(parts.keys() - file.keys())
        if missing:
            raise ValueError(f"it has no {', '.join(missing)}: it is of another run or another version")
        for name, part in parts.items():
            stored = file.get_slice(name)
            if tuple(stored.get_shape()) != tuple(part.shape):
                raise ValueError(f"{name} is {stored.get_shape()}, wanted {list(part.shape)}")
            if part.dim is None:
                part.tensor.copy_(file.get_tensor(name))
            else:
                end = part.start + part.tensor.shape[part.dim]
                part.tensor.copy_(stored[(slice(None),) * part.dim + (slice(part.start, end),)])
