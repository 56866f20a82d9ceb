"""Frames: batches of activations on a byte stream, each complete in itself.

    4 bytes   magic "CLT1"
    uint32    kind: 0 a batch, 1 an error that ends the stream
    uint64    sequence number of the frame in its stream, from 0
    uint64    bytes of the payload
    uint64    checksum of the payload: xxh3, 64 bits
    payload   a batch: safetensors with document, row (n,) I64, token, position (n,) I32 and activations (n, 2, L, D)
              F16|BF16|F32, and `segment` in its metadata; an error: JSON {"error": reason, "retry_after": seconds}

All numbers are little-endian. xxh3 and not CRC-32: it is fast enough (15 against 2.3 GB/s measured) not to be seen.
"""

from __future__ import annotations

import functools
import json
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import xxhash

from clt.server.buffer import Batch

MAGIC = b"CLT1"
HEADER = struct.Struct("<4sIQQQ")
BATCH, ERROR = 0, 1
MAX_PAYLOAD = 8 << 30
"""Bytes that a reader takes for a payload at most: more is a damaged header."""
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

    def put(self, frame: memoryview, batch: Batch, sequence: int) -> None:
        """Complete a frame whose activations are already in `activations(frame)`."""
        frame[HEADER.size : HEADER.size + len(self.head)] = self.head
        for name, (_, dtype) in _COLUMNS.items():
            column = np.ascontiguousarray(getattr(batch, name), dtype).view(np.uint8)
            frame[self.offsets[name] : self.offsets[name] + column.nbytes] = column.data
        payload = frame[HEADER.size :]
        HEADER.pack_into(frame, 0, MAGIC, BATCH, sequence, len(payload), xxhash.xxh3_64_intdigest(payload))

    def activations(self, frame: memoryview) -> memoryview:
        """The part of the frame that the n rows go to."""
        return frame[self.offsets["activations"] :]


@functools.lru_cache(maxsize=64)
def layout(n: int, n_layers: int, d_acts: int, dtype: str, segment: str = "") -> Layout:
    """The layout of a frame of n rows (2, L, D)."""
    tensors, offsets, at = {}, {}, 0
    for name, (kind, column) in _COLUMNS.items():
        tensors[name] = {"dtype": kind, "shape": [n], "data_offsets": [at, at := at + n * column.itemsize]}
    end = at + n * 2 * n_layers * d_acts * _ITEMSIZE[dtype]
    tensors["activations"] = {"dtype": _DTYPES[dtype], "shape": [n, 2, n_layers, d_acts], "data_offsets": [at, end]}
    text = json.dumps({"__metadata__": {"segment": segment}, **tensors}).encode()
    text += b" " * (-len(text) % 8)
    head = struct.pack("<Q", len(text)) + text
    start = HEADER.size + len(head)
    offsets = {name: start + tensor["data_offsets"][0] for name, tensor in tensors.items()}
    return Layout(n, head, offsets, start + end)


def as_bytes(rows: torch.Tensor) -> memoryview:
    """The bytes of contiguous rows on the CPU, without a copy."""
    return rows.view(-1).view(torch.uint8).numpy().data


def error_frame(sequence: int, reason: str, retry_after: float) -> bytes:
    """The frame that ends a stream before its time."""
    payload = json.dumps({"error": reason, "retry_after": retry_after}).encode()
    return HEADER.pack(MAGIC, ERROR, sequence, len(payload), xxhash.xxh3_64_intdigest(payload)) + payload


def read_frame(readinto: Callable[[memoryview], int], sequence: int) -> Frame | None:
    """The next frame from `readinto` (fills some of a buffer, returns how much; 0 at the end), or None at the end.

    Raises StreamEnded for an error frame and WireError for anything but an intact frame number `sequence`.
    """
    header = memoryview(bytearray(HEADER.size))
    if not _fill(readinto, header, may_end=True):
        return None
    magic, kind, found, size, checksum = HEADER.unpack(header)
    if magic != MAGIC or kind not in (BATCH, ERROR) or size > MAX_PAYLOAD:
        raise WireError(f"found {bytes(header[:24])!r} where a frame starts with {MAGIC!r}")
    payload = np.empty(size, np.uint8).data
    _fill(readinto, payload)
    if xxhash.xxh3_64_intdigest(payload) != checksum:
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
        if n < 1 or two != 2 or wanted.head != payload[: len(wanted.head)] or wanted.size != HEADER.size + len(payload):
            raise ValueError("its tensors are not those of a batch")
    except (ValueError, KeyError, TypeError, StopIteration, struct.error) as error:
        raise WireError(f"the payload is not a batch ({error})") from error
    start = {name: offset - HEADER.size for name, offset in wanted.offsets.items()}
    flat = torch.frombuffer(payload, dtype=getattr(torch, dtype), offset=start["activations"])
    columns = {name: np.frombuffer(payload, kind, n, start[name]) for name, (_, kind) in _COLUMNS.items()}
    return Batch(flat.view(n, 2, n_layers, d_acts), **columns), segment
