"""Frames: batches of activations on a byte stream, each complete in itself.

    4 bytes   magic "CLT2"
    uint32    n, the rows in the frame
    uint64    number of the frame in its stream, from 0
    16 bytes  segment: the buffer that the row numbers belong to, in ASCII; zeros for held-out rows
    uint64    xxh3 of the body
    uint64    xxh3 of everything above and of the header that follows
    header    of a safetensors payload, the same for all frames of n rows of one segment
    body      document, row (n,) I64, token, position (n,) I32, activations (n, 2, L, D) F16|BF16|F32

All numbers are little-endian. Header and body together are a safetensors file. A reader needs no number of it but n:
all else follows from the server's index, and is compared with what came.
"""

from __future__ import annotations

import functools
import json
import struct
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from xxhash import xxh3_64, xxh3_64_intdigest

MAGIC = b"CLT2"
COLUMNS = {"document": "<i8", "row": "<i8", "token": "<i4", "position": "<i4"}
COLUMN_BYTES = 24
"""Bytes of all columns, a row."""
ITEM_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4}
_PIECE = 1 << 21
_NAMES = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}
_FIXED, _SUM = struct.Struct("<4sIQ16sQ"), struct.Struct("<Q")


class WireError(Exception):
    """Bytes that are not what was sent, or not what was asked for."""


class Batch(NamedTuple):
    """Rows in memory of their own."""

    activations: Tensor
    """(n, 2, L, D) in the server's dtype"""
    token: np.ndarray
    """(n,) int32"""
    position: np.ndarray
    """(n,) int32"""
    document: np.ndarray
    """(n,) int64"""
    row: np.ndarray
    """(n,) int64 serial numbers, unique within the segment; of held-out rows their numbers in the store"""
    segment: str


class Shape(NamedTuple):
    """Of the rows of one server."""

    n_layers: int
    d_acts: int
    dtype: str

    @property
    def row_bytes(self) -> int:
        """Bytes of the activations (2, L, D) of a row."""
        return 2 * self.n_layers * self.d_acts * ITEM_BYTES[self.dtype]


@functools.lru_cache(maxsize=64)
def header(n: int, shape: Shape, segment: str) -> bytes:
    """The safetensors header of n rows."""
    at, tensors = 0, {}
    for name, kind in COLUMNS.items():
        size = n * int(kind[-1])
        tensors[name] = {"dtype": f"I{8 * int(kind[-1])}", "shape": [n], "data_offsets": [at, at := at + size]}
    dims = [n, 2, shape.n_layers, shape.d_acts]
    offsets = [at, at + n * shape.row_bytes]
    tensors["activations"] = {"dtype": _NAMES[shape.dtype], "shape": dims, "data_offsets": offsets}
    text = json.dumps({"__metadata__": {"segment": segment}, **tensors}).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


class Slice(NamedTuple):
    """Rows start .. stop - 1 of a body of n rows."""

    body: np.ndarray
    n: int
    start: int
    stop: int


def frame_bytes(n: int, shape: Shape, segment: str) -> int:
    """Bytes of a frame of n rows."""
    return _FIXED.size + _SUM.size + len(header(n, shape, segment)) + n * (COLUMN_BYTES + shape.row_bytes)


def count_of(slices: Sequence[Slice]) -> int:
    """How many rows these are."""
    return sum(part.stop - part.start for part in slices)


def columns_of(slices: Sequence[Slice]) -> dict[str, np.ndarray]:
    """The columns (n,) of all these rows."""
    at, columns = 0, {}
    for name, kind in COLUMNS.items():
        whole = [np.frombuffer(p.body, kind, p.n, at * p.n)[p.start : p.stop] for p in slices]
        columns[name] = np.concatenate(whole)
        at += int(kind[-1])
    return columns


def activations_of(part: Slice, shape: Shape) -> Tensor:
    """The activations (n, 2, L, D) of these rows, without a copy."""
    dims, at = (2, shape.n_layers, shape.d_acts), COLUMN_BYTES * part.n
    flat = torch.frombuffer(part.body, dtype=getattr(torch, shape.dtype), offset=at)
    return flat.view(part.n, *dims)[part.start : part.stop]


def body_of(activations: Tensor, columns: Mapping[str, np.ndarray]) -> Slice:
    """Rows (n, 2, L, D) and their columns (n,) as `frame` takes them."""
    n = len(activations)
    parts = [np.ascontiguousarray(columns[name], kind).view(np.uint8) for name, kind in COLUMNS.items()]
    return Slice(np.concatenate([*parts, np.asarray(as_bytes(activations))]), n, 0, n)


def frame(slices: Sequence[Slice], sequence: int, shape: Shape, segment: str) -> list[bytes | memoryview]:
    """The pieces of one frame of all these rows; the activations are not copied."""
    columns = b"".join(column.tobytes() for column in columns_of(slices).values())
    rows, digest = [as_bytes(activations_of(part, shape)) for part in slices], xxh3_64(columns)
    for part in rows:
        digest.update(part)
    n = count_of(slices)
    fixed, head = _FIXED.pack(MAGIC, n, sequence, segment.encode(), digest.intdigest()), header(n, shape, segment)
    return [b"".join((fixed, _SUM.pack(xxh3_64_intdigest(fixed + head)), head, columns)), *rows]


def read_frame(
    fill: Callable[[memoryview], int], shape: Shape, out: Tensor, sequence: int, begin: Callable[[int], None]
) -> tuple[dict[str, np.ndarray], str] | None:
    """The columns (n,) and the segment of the next frame, whose activations go into the first n rows of `out`.

    None where the stream ended between two frames. `fill` fills a view and returns how many bytes it did: fewer at the
    end alone. `begin` is told how many bytes are to come once that is known. Raises WireError for anything but an
    intact frame number `sequence` of that shape with 1 to len(out) rows.
    """
    start = bytearray(_FIXED.size + _SUM.size)
    got = fill(memoryview(start))
    if got == 0:
        return None
    magic, n, number, name, body_sum = _FIXED.unpack_from(start)
    if got < len(start) or magic != MAGIC:
        raise WireError(f"found {bytes(start[: min(got, 24)])!r} where a frame starts with {MAGIC!r}")
    if number != sequence or not 0 < n <= len(out):
        raise WireError(f"frame {number} of {n} rows came where frame {sequence} of 1 to {len(out)} rows was due")
    segment = name.rstrip(b"\0").decode("latin-1")
    if segment and not (segment.isascii() and segment.isalnum()):
        raise WireError(f"found the segment {segment!r}, wanted letters and digits")
    wanted = header(n, shape, segment)
    begin(len(wanted) + n * (COLUMN_BYTES + shape.row_bytes))
    found, columns = bytearray(len(wanted)), np.empty(n * COLUMN_BYTES, np.uint8)
    _whole(fill, memoryview(found))
    if xxh3_64_intdigest(start[: _FIXED.size] + found) != _SUM.unpack_from(start, _FIXED.size)[0]:
        raise WireError(f"frame {number} is damaged: its header's checksum does not match")
    if found != wanted:
        raise WireError(f"frame {number} is not of {n} rows {shape} as the server's index says: {bytes(found)!r:.300}")
    digest = xxh3_64()
    for view in (columns.data, as_bytes(out[:n])):
        for at in range(0, len(view), _PIECE):  # hashed while it is still in the cache
            _whole(fill, part := view[at : at + _PIECE])
            digest.update(part)
    if digest.intdigest() != body_sum:
        raise WireError(f"frame {number} is damaged: its body's checksum does not match")
    at, arrays = 0, {}
    for name, kind in COLUMNS.items():
        arrays[name] = np.frombuffer(columns, kind, n, at)
        at += arrays[name].nbytes
    return arrays, segment


def _whole(fill: Callable[[memoryview], int], view: memoryview) -> None:
    if (got := fill(view)) < len(view):
        raise WireError(f"the stream was cut off within a frame: found {got} bytes, wanted {len(view)}")


def as_bytes(rows: Tensor) -> memoryview:
    """The bytes of contiguous rows on the CPU, without a copy."""
    return rows.view(-1).view(torch.uint8).numpy().data
