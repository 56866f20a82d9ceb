"""Rows in memory: the bytes of their activations, and columns that say where they come from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from clt.data.index import RowShape

COLUMNS = {"document": "<i8", "row": "<i8", "token": "<i4", "position": "<i4"}
COLUMN_BYTES = sum(np.dtype(kind).itemsize for kind in COLUMNS.values())  # of a row
RawRows = dict[str, np.ndarray]
"""Rows: the COLUMNS (n,), then `rows` (n, row_bytes) uint8, contiguous."""


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


def empty_rows(n: int, shape: RowShape) -> RawRows:
    """Memory for n rows. Of numpy, as it takes huge pages: in torch's, clients spend their time on page faults."""
    return {**{name: np.empty(n, kind) for name, kind in COLUMNS.items()}, "rows": np.empty((n, shape.row_bytes), "u1")}


def cut(rows: RawRows, start: int, stop: int) -> RawRows:
    """Rows start .. stop - 1, without a copy."""
    return {name: column[start:stop] for name, column in rows.items()}


def tensor_of(rows: RawRows, shape: RowShape) -> Tensor:
    """The activations (n, 2, L, D) of these rows, without a copy."""
    numbers = torch.from_numpy(rows["rows"]).view(getattr(torch, shape.dtype))
    return numbers.view(-1, 2, shape.n_layers, shape.d_acts)


def raw_rows(activations: Tensor, columns: Mapping[str, np.ndarray]) -> RawRows:
    """Contiguous rows (n, 2, L, D) on the CPU, not copied, and their columns (n,)."""
    rows = activations.flatten(1).view(torch.uint8).numpy()
    return {**{name: columns[name].astype(kind) for name, kind in COLUMNS.items()}, "rows": rows}
