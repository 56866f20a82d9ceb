"""Frames: batches of activations on a byte stream, each complete in itself.

    4 bytes   magic "CLT1"
    uint32    kind: 0 a batch, 1 an error that ends the stream
    uint64    sequence number of the frame in its stream, from 0
    uint64    bytes of the payload
    payload   a batch: safetensors with document, row (n,) I64, token, position (n,) I32 and activations (n, 2, L, D)
              F16|BF16|F32, and `segment` in its metadata; an error: JSON {"error": reason, "retry_after": seconds}
    uint64    checksum of all bytes before it: xxh3, 64 bits

All numbers are little-endian. The checksum comes last, so that a frame can be sent while it is made; it is xxh3 and not
CRC-32, which is too slow not to be seen (2.3 against 15 GB/s measured).
"""

from __future__ import annotations

import functools
import json
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import xxhash

from clt.server.buffer import Batch

MAGIC = b"CLT1"
HEADER, CHECKSUM = struct.Struct("<4sIQQ"), struct.Struct("<Q")
BATCH, ERROR = 0, 1
MAX_PAYLOAD = 8 << 30
"""Bytes that a reader takes for a payload at most: more is a damaged header."""
PIECE = 1 << 21
"""Bytes that are copied, hashed and sent at once: less costs more calls of Python, more did not gain (measured)."""
_LINE = 64  # bytes of a cache line
_READ_AHEAD = 1 << 16  # bytes of a frame that buffers between `readinto` and the socket may hold already, at most
_DTYPES = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}
_ITEMSIZE = {"float16": 2, "bfloat16": 2, "float32": 4}
# Before the activations, whose start is then a multiple of 8 in the payload.
_COLUMNS = {"document": ("I64", np.dtype("<i8")), "row": ("I64", np.dtype("<i8")),
            "token": ("I32", np.dtype("<i4")), "position": ("I32", np.dtype("<i4"))}  # fmt: skip


class WireError(Exception):
    """Bytes that are not what was sent: damaged, cut off, out of order, or not a frame at all."""


class StreamEnded(Exception):
    """An error frame: the server ended the stream and says why."""

    def __init__(self, reason: str, retry_after: float) -> None:
        super().__init__(reason)
        self.retry_after = retry_after


class Frame(NamedTuple):
    """One batch as it came; its tensor and arrays view the received payload."""

    sequence: int
    batch: Batch
    segment: str
    """The buffer that the row numbers belong to; empty for held-out rows, which are numbered for good."""


@dataclass(frozen=True)
class Layout:
    """Where everything lies in a frame of n rows, and the bytes that are the same in all of them."""

    n: int
    head: bytes
    """The payload's safetensors header."""
    offsets: dict[str, int]
    """Byte of the frame at which each tensor starts."""
    size: int
    """Bytes of the frame."""
    row_bytes: int

    @property
    def payload_bytes(self) -> int:
        return self.size - HEADER.size - CHECKSUM.size

    def pieces(
        self, columns: Mapping[str, np.ndarray], sequence: int, copy: Callable[[slice, memoryview], None]
    ) -> Iterator[memoryview]:
        """The frame in pieces of about PIECE bytes, each in memory of its own.

        `columns` are token, position, document and row (n,); `copy(rows, out)` writes the bytes of some rows, which it
        is asked for in their order, each once.
        """
        digest, step = xxhash.xxh3_64(), max(1, PIECE // self.row_bytes)
        for first in range(0, self.n, step):
            rows = slice(first, min(first + step, self.n))
            before = self._opening(columns, sequence) if first == 0 else b""
            end = len(before) + (rows.stop - first) * self.row_bytes
            last = rows.stop == self.n
            piece = _aligned(end + last * CHECKSUM.size, len(before))
            piece[: len(before)] = before
            copy(rows, piece[len(before) : end])
            digest.update(piece[:end])
            if last:
                CHECKSUM.pack_into(piece, end, digest.intdigest())
            yield piece

    def _opening(self, columns: Mapping[str, np.ndarray], sequence: int) -> bytes:
        """All that comes before the activations."""
        arrays = [np.ascontiguousarray(columns[name], dtype).tobytes() for name, (_, dtype) in _COLUMNS.items()]
        header = HEADER.pack(MAGIC, BATCH, sequence, self.payload_bytes)
        return b"".join([header, self.head, *arrays])


@functools.lru_cache(maxsize=64)
def layout(n: int, n_layers: int, d_acts: int, dtype: str, segment: str = "") -> Layout:
    """The layout of a frame of n rows (2, L, D)."""
    tensors, offsets, at = {}, {}, 0
    for name, (kind, column) in _COLUMNS.items():
        tensors[name] = {"dtype": kind, "shape": [n], "data_offsets": [at, at := at + n * column.itemsize]}
    row_bytes = 2 * n_layers * d_acts * _ITEMSIZE[dtype]
    end = at + n * row_bytes
    tensors["activations"] = {"dtype": _DTYPES[dtype], "shape": [n, 2, n_layers, d_acts], "data_offsets": [at, end]}
    text = json.dumps({"__metadata__": {"segment": segment}, **tensors}).encode()
    text += b" " * (-len(text) % 8)
    head = struct.pack("<Q", len(text)) + text
    start = HEADER.size + len(head)
    offsets = {name: start + tensor["data_offsets"][0] for name, tensor in tensors.items()}
    return Layout(n, head, offsets, start + end + CHECKSUM.size, row_bytes)


def _aligned(size: int, at: int) -> memoryview:
    """Memory of which byte `at` starts a cache line, as most rows in the buffer do.

    `rep movsb`, glibc's and the kernel's way to copy, runs at a fifth of its speed (measured on Zen 3) when the
    destination lies a few bytes further into its page than the source does into its own.
    """
    memory = np.empty(size + _LINE, np.uint8)
    start = -(memory.__array_interface__["data"][0] + at) % _LINE
    return memory[start : start + size].data


def as_bytes(rows: torch.Tensor) -> memoryview:
    """The bytes of contiguous rows on the CPU, without a copy."""
    return rows.view(-1).view(torch.uint8).numpy().data


def error_frame(sequence: int, reason: str, retry_after: float) -> bytes:
    """The frame that ends a stream before its time."""
    payload = json.dumps({"error": reason, "retry_after": retry_after}).encode()
    frame = HEADER.pack(MAGIC, ERROR, sequence, len(payload)) + payload
    return frame + CHECKSUM.pack(xxhash.xxh3_64_intdigest(frame))


def read_frame(
    readinto: Callable[[memoryview], int], sequence: int, wake: Callable[[int], None] = lambda _: None
) -> Frame | None:
    """The next frame from `readinto` (fills some of a buffer, returns how much; 0 at the end), or None at the end.

    `wake` is told how many bytes are worth waiting for: never more than are still to come of the frame. Raises
    StreamEnded for an error frame and WireError for anything but an intact frame number `sequence`.
    """
    header = memoryview(bytearray(HEADER.size))
    if not _fill(readinto, header, may_end=True):
        return None
    magic, kind, found, size = HEADER.unpack(header)
    if magic != MAGIC or kind not in (BATCH, ERROR) or size > MAX_PAYLOAD:
        raise WireError(f"found {bytes(header[:24])!r} where a frame starts with {MAGIC!r}")
    payload, digest = np.empty(size, np.uint8).data, xxhash.xxh3_64(header)
    for start in range(0, size, PIECE):
        part = payload[start : start + PIECE]
        wake(PIECE if size - start - len(part) > PIECE + _READ_AHEAD else 1)
        _fill(readinto, part)
        digest.update(part)
    checksum = memoryview(bytearray(CHECKSUM.size))
    _fill(readinto, checksum)
    if CHECKSUM.unpack(checksum) != (digest.intdigest(),):
        raise WireError(f"frame {found} is damaged: its checksum does not match")
    if found != sequence:
        raise WireError(f"frame {found} came where frame {sequence} was due")
    if kind == ERROR:
        error = json.loads(bytes(payload))
        raise StreamEnded(error["error"], error["retry_after"])
    return Frame(found, *decode(payload))


def _fill(readinto: Callable[[memoryview], int], view: memoryview, may_end: bool = False) -> bool:
    done = 0
    while done < len(view):
        count = readinto(view[done:])
        if not count:
            if may_end and done == 0:
                return False
            raise WireError(f"the stream was cut off within a frame: found {done} bytes, wanted {len(view)}")
        done += count
    return True


def decode(payload: memoryview) -> tuple[Batch, str]:
    """A batch whose tensor and arrays view the safetensors `payload`, and its segment; WireError for anything else."""
    try:
        (length,) = struct.unpack_from("<Q", payload)
        tree = json.loads(bytes(payload[8 : 8 + length]))
        dtype = next(name for name, kind in _DTYPES.items() if kind == tree["activations"]["dtype"])
        n, two, n_layers, d_acts = tree["activations"]["shape"]
        wanted = layout(n, n_layers, d_acts, dtype, segment := tree["__metadata__"]["segment"])
        if n < 1 or two != 2 or wanted.head != payload[: len(wanted.head)] or wanted.payload_bytes != len(payload):
            raise ValueError("its tensors are not those of a batch")
    except (ValueError, KeyError, TypeError, StopIteration, struct.error) as error:
        raise WireError(f"the payload is not a batch ({error})") from error
    start = {name: offset - HEADER.size for name, offset in wanted.offsets.items()}
    flat = torch.frombuffer(payload, dtype=getattr(torch, dtype), offset=start["activations"])
    columns = {name: np.frombuffer(payload, kind, n, start[name]) for name, (_, kind) in _COLUMNS.items()}
    return Batch(flat.view(n, 2, n_layers, d_acts), **columns), segment
