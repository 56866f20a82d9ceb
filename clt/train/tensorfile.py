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


class TensorSlice(NamedTuple):
    """What this process has of a tensor: all of it (`dim` None), or a slice along dimension `dim` from `start` on."""

    tensor: Tensor
    shape: tuple[int, ...]
    """Shape of the whole."""
    dim: int | None = None
    start: int = 0
    writes: bool = True
    """Whether this process writes the slice."""


def offsets(slices: dict[str, TensorSlice]) -> tuple[bytes, dict[str, int], int]:
    """The header of the file, the place of each tensor in it, and its size in bytes."""
    entries, places, at = {}, {}, 0
    for name, cut in slices.items():
        end = at + math.prod(cut.shape) * cut.tensor.element_size()
        entries[name] = {"dtype": NAMES[cut.tensor.dtype], "shape": cut.shape, "data_offsets": [at, end]}
        places[name], at = at, end
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    return header, {name: place + len(header) for name, place in places.items()}, at + len(header)


def create(path: Path, slices: dict[str, TensorSlice]) -> None:
    """Write the header and allocate all of the file's space. Raises OSError on a full disk."""
    header, _, size = offsets(slices)
    with path.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, size)
        file.write(header)


def snapshot(slices: dict[str, TensorSlice]) -> dict[str, TensorSlice]:
    """Copy what this process writes to the CPU; other slices keep their tensors.

    GPU tensors are copied asynchronously in the current stream.
    """
    return {name: cut._replace(tensor=_copy(cut.tensor)) if cut.writes else cut for name, cut in slices.items()}


def _copy(tensor: Tensor) -> Tensor:
    # A copy into pageable memory would be slow and block. Torch reuses pinned memory for the next snapshot.
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
    return host.copy_(tensor.detach(), non_blocking=True)


def write(path: Path, slices: dict[str, TensorSlice]) -> None:
    """Write this process's slices (contiguous, on the CPU) into a file that `create` made, and sync it."""
    _, places, _ = offsets(slices)
    descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        for name, cut in slices.items():
            if cut.writes and cut.tensor.numel():
                _write_slice(descriptor, cut, places[name])
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_slice(descriptor: int, cut: TensorSlice, at: int) -> None:
    dim, itemsize = cut.dim or 0, cut.tensor.element_size()
    runs = cut.tensor.reshape(math.prod(cut.shape[:dim]), -1)  # each is contiguous in the file
    stride = math.prod(cut.shape[dim:]) * itemsize
    first = at + cut.start * math.prod(cut.shape[dim + 1 :]) * itemsize
    for i, run in enumerate(runs.view(torch.uint8).numpy()):
        piece, place = run.data, first + i * stride
        while piece:
            written = os.pwrite(descriptor, piece, place)
            piece, place = piece[written:], place + written


def read(path: Path, slices: dict[str, TensorSlice]) -> None:
    """Fill each slice's tensor from the file.

    Raises UserError when the file is damaged, lacks one of the tensors or has it in another shape.
    """
    with reading(path, "delete its checkpoint to go on from the one before"), safe_open(path, "pt") as file:
        missing = sorted(slices.keys() - file.keys())
        if missing:
            raise ValueError(f"it has no {', '.join(missing)}: it is of another run or another version")
        for name, cut in slices.items():
            stored = file.get_slice(name)
            if tuple(stored.get_shape()) != tuple(cut.shape):
                raise ValueError(f"{name} is {stored.get_shape()}, wanted {list(cut.shape)}")
            if cut.dim is None:
                cut.tensor.copy_(file.get_tensor(name))
            else:
                end = cut.start + cut.tensor.shape[cut.dim]
                cut.tensor.copy_(stored[(slice(None),) * cut.dim + (slice(cut.start, end),)])
