"""Frames: batches of activations on a byte stream, each complete in itself.

    4 bytes   magic "CLT2"
    uint32    n, the rows in the frame
    uint64    number of the frame in its stream, from 0
    16 bytes  segment: the buffer that the row numbers belong to, in ASCII; zeros for held-out rows
    uint64    xxh3 of the body
    uint64    xxh3 of everything above and of the header that follows
    header    of a safetensors payload, the same for all frames of n rows of one segment
    body      document, row (n,) I64, token, position (n,) I32, activations (n, 2, L, D) F16|BF16|F32

All numbers are little-endian. Header and body together are a safetensors file. A reader takes no number of it but n:
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
_NAMES = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}
_FIXED, _START = struct.Struct("<4sIQ16sQ"), 48  # bytes before the header
_PIECE = 1 << 21  # bytes that are hashed while they are still in the cache


class WireError(Exception):
    """Bytes that are not what was sent, or not what was asked for; asked again, the server may do better."""


class Shape(NamedTuple):
    """Of the rows of one server."""

    n_layers: int
    d_acts: int
    dtype: str

    @property
    def row_bytes(self) -> int:
        """Bytes of the activations (2, L, D) of a row."""
        return 2 * self.n_layers * self.d_acts * ITEM_BYTES[self.dtype]


class Batch(NamedTuple):
    """Rows in memory of their own, with their columns (n,).

    `row` are serial numbers, unique within the segment; of held-out rows, which have no segment, those in the store.
    """

    activations: Tensor
    """(n, 2, L, D) in the server's dtype"""
    token: np.ndarray
    position: np.ndarray
    document: np.ndarray
    row: np.ndarray
    segment: str


def empty_batch(n: int, shape: Shape, segment: str) -> Batch:
    """Memory for n rows."""
    # Of numpy, which asks for huge pages; with torch's, a client spends its time on page faults (measured).
    rows = torch.from_numpy(np.empty(n * shape.row_bytes, np.uint8)).view(getattr(torch, shape.dtype))
    return Batch(rows.view(n, 2, shape.n_layers, shape.d_acts), **{name: np.empty(n, kind) for name, kind in COLUMNS.items()}, segment=segment)


class Slice(NamedTuple):
    """Rows start .. stop - 1 of a body of n rows."""

    body: np.ndarray
    n: int
    start: int
    stop: int


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


def frame_bytes(n: int, shape: Shape, segment: str) -> int:
    """Bytes of a frame of n rows."""
    return _START + len(header(n, shape, segment)) + n * (COLUMN_BYTES + shape.row_bytes)


def count_of(slices: Sequence[Slice]) -> int:
    """How many rows these are."""
    return sum(part.stop - part.start for part in slices)


def columns_of(slices: Sequence[Slice]) -> dict[str, np.ndarray]:
    """The columns (n,) of all these rows."""
    at, columns = 0, {}
    for name, kind in COLUMNS.items():
        whole = [np.frombuffer(part.body, kind, part.n, at * part.n)[part.start : part.stop] for part in slices]
        columns[name] = np.concatenate(whole)
        at += int(kind[-1])
    return columns


def activations_of(part: Slice, shape: Shape) -> Tensor:
    """The activations (n, 2, L, D) of these rows, without a copy."""
    flat = torch.frombuffer(part.body, dtype=getattr(torch, shape.dtype), offset=COLUMN_BYTES * part.n)
    return flat.view(part.n, 2, shape.n_layers, shape.d_acts)[part.start : part.stop]


def body_of(activations: Tensor, columns: Mapping[str, np.ndarray]) -> Slice:
    """Rows (n, 2, L, D) and their columns (n,) as `frame` takes them."""
    n = len(activations)
    parts = [np.ascontiguousarray(columns[name], kind).view(np.uint8) for name, kind in COLUMNS.items()]
    return Slice(np.concatenate([*parts, np.asarray(as_bytes(activations))]), n, 0, n)


def as_bytes(rows: Tensor) -> memoryview:
    """The bytes of contiguous rows on the CPU, without a copy."""
    return rows.view(-1).view(torch.uint8).numpy().data


def frame(slices: Sequence[Slice], sequence: int, shape: Shape, segment: str) -> list[bytes | memoryview]:
    """The pieces of one frame of all these rows; the activations are not copied."""
    columns = b"".join(column.tobytes() for column in columns_of(slices).values())
    rows, digest = [_rows_of(part, shape) for part in slices], xxh3_64(columns)
    for part in rows:
        digest.update(part)
    return [_head(count_of(slices), sequence, shape, segment, digest.intdigest()) + columns, *rows]


def _rows_of(part: Slice, shape: Shape) -> memoryview:
    """The bytes of the activations of these rows; for each frame, tensors would cost more than the checksum."""
    first, last = (COLUMN_BYTES * part.n + row * shape.row_bytes for row in (part.start, part.stop))
    return part.body.data[first:last]


def _head(n: int, sequence: int, shape: Shape, segment: str, body_sum: int) -> bytes:
    """A frame's bytes before its body."""
    fixed, text = _FIXED.pack(MAGIC, n, sequence, segment.encode(), body_sum), header(n, shape, segment)
    return fixed + xxh3_64_intdigest(fixed + text).to_bytes(8, "little") + text


def read_frame(
    fill: Callable[[memoryview], int], begin: Callable[[int], None], shape: Shape, sequence: int, out: Batch, at: int
) -> int:
    """Read frame number `sequence` of a stream into `out`, from row `at` on; returns its rows, 0 if the stream is over.

    `fill` fills a view and returns how many bytes it did: fewer at the end alone. `begin` is told how many bytes are to
    come as soon as that is known. Raises WireError for anything but an intact frame of `shape` and `out`'s segment.
    """
    start, room = bytearray(_START), len(out.row) - at
    begin(len(start))
    if (got := fill(memoryview(start))) == 0:
        return 0
    magic, n, number, _, body_sum = _FIXED.unpack_from(start)
    if got < len(start) or (magic, number) != (MAGIC, sequence) or not 0 < n <= room:
        raise WireError(f"found {bytes(start[:got])!r} where frame {sequence} of 1 to {room} rows was due")
    text = bytearray(len(header(n, shape, out.segment)))
    begin(len(text) + n * (COLUMN_BYTES + shape.row_bytes))
    _whole(fill, memoryview(text))
    if start + text != _head(n, sequence, shape, out.segment, body_sum):
        raise WireError(
            f"frame {sequence} is damaged, or not of {n} rows {shape} as the index says: {bytes(text)!r:.300}"
        )
    digest = xxh3_64()
    columns = [getattr(out, name)[at : at + n].view(np.uint8).data for name in COLUMNS]
    for view in (*columns, as_bytes(out.activations[at : at + n])):
        for first in range(0, len(view), _PIECE):
            _whole(fill, piece := view[first : first + _PIECE])
            digest.update(piece)
    if digest.intdigest() != body_sum:
        raise WireError(f"frame {sequence} is damaged: its body's checksum does not match")
    return n


def _whole(fill: Callable[[memoryview], int], view: memoryview) -> None:
    if (got := fill(view)) < len(view):
        raise WireError(f"the stream was cut off within a frame: found {got} bytes, wanted {len(view)}")
