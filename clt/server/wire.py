"""Frames: batches of activations on a byte stream, each complete in itself.

    4 bytes   magic "CLT3"
    uint32    n, the rows in the frame
    uint64    number of the frame in its stream, from 0
    uint64    xxh3 of the body
    uint64    xxh3 of everything above and of the header that follows
    header    of a safetensors payload, the same for all frames of n rows of one segment, which its metadata names
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

MAGIC = b"CLT3"
COLUMNS = {"document": "<i8", "row": "<i8", "token": "<i4", "position": "<i4"}
ITEM_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4}
Part = dict[str, np.ndarray]
"""Rows in memory: the COLUMNS (n,), then `rows` (n, row_bytes) uint8, contiguous."""
_NAMES = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}
_START, _START_BYTES = struct.Struct("<4sIQQ"), 32  # with the checksum behind it
_COLUMN_BYTES = 24  # of all columns, a row
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


def empty_part(n: int, shape: Shape) -> Part:
    """Memory for n rows. Of numpy, as it takes huge pages: in torch's, clients spend their time on page faults."""
    return {**{name: np.empty(n, kind) for name, kind in COLUMNS.items()}, "rows": np.empty((n, shape.row_bytes), "u1")}


def cut(part: Part, start: int, stop: int) -> Part:
    """Rows start .. stop - 1, without a copy."""
    return {name: column[start:stop] for name, column in part.items()}


def tensor_of(part: Part, shape: Shape) -> Tensor:
    """The activations (n, 2, L, D) of these rows, without a copy."""
    rows = torch.from_numpy(part["rows"]).view(getattr(torch, shape.dtype))
    return rows.view(-1, 2, shape.n_layers, shape.d_acts)


def part_of(activations: Tensor, columns: Mapping[str, np.ndarray]) -> Part:
    """Contiguous rows (n, 2, L, D) on the CPU, not copied, and their columns (n,)."""
    rows = activations.flatten(1).view(torch.uint8).numpy()
    return {**{name: columns[name].astype(kind) for name, kind in COLUMNS.items()}, "rows": rows}


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
    return _START_BYTES + len(header(n, shape, segment)) + n * (_COLUMN_BYTES + shape.row_bytes)


def frame(parts: Sequence[Part], sequence: int, shape: Shape, segment: str) -> list[bytes | memoryview]:
    """The pieces of one frame of all these rows; the activations are not copied."""
    columns = b"".join(part[name].tobytes() for name in COLUMNS for part in parts)
    rows, digest = [part["rows"].reshape(-1).data for part in parts], xxh3_64(columns)
    for each in rows:
        digest.update(each)
    n = len(columns) // _COLUMN_BYTES
    return [_head(n, sequence, shape, segment, digest.intdigest()) + columns, *rows]


def _head(n: int, sequence: int, shape: Shape, segment: str, body_sum: int) -> bytes:
    """A frame's bytes before its body."""
    start, text = _START.pack(MAGIC, n, sequence, body_sum), header(n, shape, segment)
    return start + xxh3_64_intdigest(start + text).to_bytes(8, "little") + text


def read_frame(
    fill: Callable[[memoryview], int], begin: Callable[[int], None], sequence: int, shape: Shape, segment: str,
    out: Part, at: int,
) -> int:  # fmt: skip
    """Read frame number `sequence` of a stream into `out`, from row `at` on; returns its rows, 0 if the stream is over.

    `fill` fills a view and returns how many bytes it did: fewer at the end alone. `begin` is told how many bytes are to
    come as soon as that is known. Raises WireError for anything but an intact frame of `shape` and `segment`.
    """
    start, room = bytearray(_START_BYTES), len(out["rows"]) - at
    begin(len(start))
    if (got := fill(memoryview(start))) == 0:
        return 0
    magic, n, number, body_sum = _START.unpack_from(start)
    if got < len(start) or (magic, number) != (MAGIC, sequence) or not 0 < n <= room:
        raise WireError(f"found {bytes(start[:got])!r} where frame {sequence} of 1 to {room} rows was due")
    text = bytearray(len(header(n, shape, segment)))
    begin(frame_bytes(n, shape, segment) - len(start))
    _whole(fill, memoryview(text))
    if start + text != _head(n, sequence, shape, segment, body_sum):
        raise WireError(
            f"frame {sequence} is damaged, or not of {n} rows {shape} as the index says: {bytes(text)!r:.300}"
        )
    digest = xxh3_64()
    for column in cut(out, at, at + n).values():  # in the order of the wire
        view = column.reshape(-1).view("u1").data
        for first in range(0, len(view), _PIECE):
            _whole(fill, piece := view[first : first + _PIECE])
            digest.update(piece)
    if digest.intdigest() != body_sum:
        raise WireError(f"frame {sequence} is damaged: its body's checksum does not match")
    return n


def _whole(fill: Callable[[memoryview], int], view: memoryview) -> None:
    if (got := fill(view)) < len(view):
        raise WireError(f"the stream was cut off within a frame: found {got} bytes, wanted {len(view)}")
