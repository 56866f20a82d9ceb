"""Where everything lies in the shared memory of a buffer."""

from __future__ import annotations

import mmap
from typing import Any

import numpy as np

from clt.data.shards import COLUMN_DTYPES, TENSOR_DTYPES
from clt.server.segment import PREFIX_BYTES

WORKERS = 256
"""Serving processes that one buffer can have."""
HEADER = np.dtype(
    [
        ("rows", "i8"), ("n_layers", "i8"), ("d_acts", "i8"), ("dtype", "S16"), ("min_fill", "i8"),
        ("segment", "S16"), ("tag", "S64"),
        ("created", "f8"), ("dirty", "i8"), ("closing", "i8"), ("joined", "i8"),
        ("n_valid", "i8"), ("n_free", "i8"), ("generated", "i8"), ("drawn", "i8"), ("dropped", "i8"),
        ("served_rows", "i8"), ("served_bytes", "i8"), ("mark", "i8", 3),
        ("state", "S16"), ("cause", "S1024"), ("pid", "i8"), ("restarts", "i8"), ("since", "f8"),
    ]
)  # fmt: skip
_WORKER = np.dtype([("pid", "i8"), ("start", "i8"), ("clients", "i8")])


def arrays(rows: int, n_layers: int, d_acts: int, dtype: str) -> tuple[dict[str, tuple[int, Any, Any]], int]:
    """(offset, shape, dtype) of every array of a buffer, and the bytes of all of it."""
    row_bytes = 2 * n_layers * d_acts * TENSOR_DTYPES[dtype].itemsize
    parts: dict[str, tuple[Any, Any]] = {
        "header": ((), HEADER),
        "workers": (WORKERS, _WORKER),
        "state": (rows, "u1"),
        "claim_pid": (rows, "i4"),
        "claim_start": (rows, "i8"),
        "valid": (rows, "i4"),
        "free": (rows, "i4"),
        **{name: (rows, column) for name, column in COLUMN_DTYPES.items()},
        "row": (rows, "i8"),
        "payload": ((rows, row_bytes), "u1"),
    }
    layout, offset = {}, PREFIX_BYTES
    for name, (shape, kind) in parts.items():
        step = mmap.PAGESIZE if name == "payload" else 64
        offset = -(-offset // step) * step
        layout[name] = (offset, shape, kind)
        offset += int(np.prod(shape)) * np.dtype(kind).itemsize
    return layout, offset


def buffer_bytes(rows: int, n_layers: int, d_acts: int, dtype: str) -> int:
    """Bytes of shared memory that a buffer takes."""
    return arrays(rows, n_layers, d_acts, dtype)[1]
