"""One safetensors file, written by several processes at once: each puts its slices of the tensors in their places.

The file is the same whatever the number of processes, and any safetensors reader reads it.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from clt.errors import UserError

NAMES = {torch.float32: "F32", torch.float64: "F64", torch.int64: "I64", torch.uint8: "U8"}


class Part(NamedTuple):
    """What this process has of a tensor: all of it (`dim` None), or `tensor` from `start` on along dimension `dim`."""

    tensor: Tensor
    shape: tuple[int, ...]
    """Shape of the whole."""
    dim: int | None = None
    start: int = 0
    writes: bool = True
    """Whether it is this process that writes this part."""


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
    """Make the file with its header and all of its space, which is then there. Raises OSError on a full disk."""
    header, _, size = offsets(parts)
    with path.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, size)
        file.write(header)


def snapshot(parts: dict[str, Part]) -> dict[str, Part]:
    """Copies, on the CPU, of the parts that this process writes; the others keep their shapes and no data.

    What lies on a GPU is copied in the order of its current stream, while this returns at once: the copies are whole
    when that stream has come so far.
    """
    return {
        name: part._replace(tensor=_copy(part.tensor) if part.writes else part.tensor.new_empty(0, device="cpu"))
        for name, part in parts.items()
    }


def _copy(tensor: Tensor) -> Tensor:
    # Into pageable memory the copy would be slow, and wait. Torch keeps pinned memory for the next snapshot.
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
    return host.copy_(tensor.detach(), non_blocking=True)


def write(path: Path, parts: dict[str, Part]) -> None:
    """Write this process's parts (contiguous, on the CPU) into a file that `create` made, and sync it."""
    _, places, _ = offsets(parts)
    descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        for name, part in parts.items():
            if part.writes:
                _write_part(descriptor, part, places[name])
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_part(descriptor: int, part: Part, at: int) -> None:
    data = part.tensor.reshape(-1).view(torch.uint8).numpy().data
    dim = part.dim or 0
    inner = math.prod(part.shape[dim + 1 :]) * part.tensor.element_size()  # bytes of one index along dim
    stride = inner * (part.shape[dim] if part.shape else 1)
    run = len(data) if part.dim is None else inner * part.tensor.shape[dim]  # contiguous bytes
    for i in range(len(data) // run if run else 0):
        start = at + i * stride + part.start * inner
        piece = data[i * run : (i + 1) * run]
        while piece:
            written = os.pwrite(descriptor, piece, start)
            piece, start = piece[written:], start + written


def read(path: Path, parts: dict[str, Part]) -> None:
    """Fill each part's tensor in place from the file.

    Raises UserError when the file is damaged, lacks one of the tensors or has it in another shape.
    """
    try:
        with safe_open(path, "pt") as file:
            missing = sorted(parts.keys() - file.keys())
            if missing:
                raise UserError(f"{path} has no {', '.join(missing)}: it is of another run or another version")
            for name, part in parts.items():
                stored = file.get_slice(name)
                if tuple(stored.get_shape()) != tuple(part.shape):
                    raise UserError(f"{name} in {path} is {stored.get_shape()}, wanted {list(part.shape)}")
                if part.dim is None:
                    part.tensor.copy_(file.get_tensor(name))
                else:
                    end = part.start + part.tensor.shape[part.dim]
                    part.tensor.copy_(stored[(slice(None),) * part.dim + (slice(part.start, end),)])
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} is damaged ({error}); delete its checkpoint to go on from the one before") from error
