"""Frames: batches of activations on a byte stream, each complete in itself.

    4 bytes   magic "CLT4"
    uint32    n, the rows in the frame
    uint64    number of the frame in its stream, from 0
    uint64    xxh3 of what follows: a safetensors file
    header    the same for all frames of n rows of one segment, which its metadata names
    body      document, row (n,) I64, token, position (n,) I32, activations (n, 2, L, D) F16|BF16|F32

All numbers are little-endian. A reader takes no number of it but n: all else follows from the server's index, and is
compared with what came.
"""

from __future__ import annotations

import functools
import json
import struct
from collections.abc import Callable, Sequence

from xxhash import xxh3_64

from clt.data.index import RowShape
from clt.data.raw_rows import COLUMN_BYTES, COLUMNS, RawRows, cut

MAGIC = b"CLT4"
ENDLESS = 10**9  # batches, the most of a stream: an answer of known length costs the server a copy less
_NAMES = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}
_START = struct.Struct("<4sIQQ")
_PIECE = 1 << 21  # bytes that the client hashes while they are in its cache
Fill = Callable[[memoryview], int]


class WireError(Exception):
    """Bytes that are not what was sent, or not what was asked for; asked again, the server may do better."""


@functools.lru_cache(maxsize=64)
def header(n: int, shape: RowShape, segment: str) -> bytes:
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


def frame_bytes(n: int, shape: RowShape, segment: str) -> int:
    """Bytes of a frame of n rows."""
    return _START.size + len(header(n, shape, segment)) + n * (COLUMN_BYTES + shape.row_bytes)


def frame(parts: Sequence[RawRows], sequence: int, shape: RowShape, segment: str) -> list[bytes | memoryview]:
    """One frame of all these rows, in pieces; the activations are not copied."""
    n = sum(len(part["row"]) for part in parts)
    head = header(n, shape, segment) + b"".join(part[name].tobytes() for name in COLUMNS for part in parts)
    pieces, digest = [part["rows"].reshape(-1).data for part in parts], xxh3_64(head)
    for piece in pieces:
        digest.update(piece)
    return [_START.pack(MAGIC, n, sequence, digest.intdigest()) + head, *pieces]


def read_frame(fill: Fill, sequence: int, shape: RowShape, segment: str, out: RawRows, at: int) -> int:
    """Read frame number `sequence` of a stream into `out`, from row `at` on; returns its rows, 0 if the stream is over.

    `fill` fills a view and returns how many bytes it did: fewer at the end alone. Raises WireError for anything but an
    intact frame of `shape` and `segment`.
    """
    start, room = bytearray(_START.size), len(out["rows"]) - at
    if (got := fill(memoryview(start))) == 0:
        return 0
    magic, n, number, checksum = _START.unpack(start)
    if got < len(start) or (magic, number) != (MAGIC, sequence) or not 0 < n <= room:
        raise WireError(f"found {bytes(start[:got])!r} where frame {sequence} of 1 to {room} rows was due")
    text = bytearray(len(header(n, shape, segment)))
    _fill(fill, memoryview(text))
    if text != header(n, shape, segment):
        raise WireError(f"frame {sequence} is not of {n} rows {shape} as the index says: {bytes(text)!r:.300}")
    digest = xxh3_64(text)
    for column in cut(out, at, at + n).values():  # in the order of the wire
        view = column.reshape(-1).view("u1").data
        for first in range(0, len(view), _PIECE):
            _fill(fill, piece := view[first : first + _PIECE])
            digest.update(piece)
    if digest.intdigest() != checksum:
        raise WireError(f"frame {sequence} is damaged: its checksum does not match")
    return n


def _fill(fill: Fill, view: memoryview) -> None:
    if (got := fill(view)) < len(view):
        raise WireError(f"the stream was cut off within a frame: found {got} bytes, wanted {len(view)}")
