"""A store of activations on disk: random access to its rows, and its statistics."""

from __future__ import annotations

import contextlib
import resource
import weakref
from bisect import bisect_right
from collections.abc import Callable
from functools import partialmethod
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from clt.data.index import STATISTICS, read_index
from clt.data.raw_rows import RawRows, raw_rows
from clt.data.shards import COLUMN_DTYPES, dataset_offsets, read_at, row_bytes
from clt.data.statistics import Statistics
from clt.errors import UserError


class DiscBuffer(Dataset[Tensor]):
    """The rows of a store, by number: `buffer[i]` is (2, L, D), `buffer[rows]` or `buffer[a:b]` is (n, 2, L, D).

    Inputs are [:, 0], targets [:, 1], in the dtype they are stored in. May be used from several threads and after a
    fork. Raises UserError when the store is unfinished or damaged, IndexError for rows that do not exist.
    """

    threads = 2  # enough to read the page cache at memory speed and to keep a disk busy

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.index = read_index(path)
        shape, shards = self.index.shape, self.index.shards
        self._offsets = [dataset_offsets(self.path / shard["file"], shard["rows"], *shape) for shard in shards]
        self._row_bytes = row_bytes(*shape)
        self._firsts = [0, *accumulate(shard["rows"] for shard in shards)]
        self.statistics = Statistics.load(self.path / STATISTICS, (self.index.n_layers, self.index.d_acts))
        _allow_descriptors(len(shards))
        files = contextlib.ExitStack()
        self.close = weakref.finalize(self, files.close)  # also called by the garbage collector
        self._files = [files.enter_context((self.path / shard["file"]).open("rb", buffering=0)) for shard in shards]

    def __len__(self) -> int:
        return self.index.rows

    def __reduce__(self) -> tuple[type, tuple[Path]]:
        return DiscBuffer, (self.path,)  # spawned workers open the store for themselves

    def __getitem__(self, rows: Any) -> Tensor:
        if isinstance(rows, (int, np.integer)):
            return self[[rows]][0]
        return self.read(self._row_numbers(rows))

    def read(self, rows: np.ndarray, out: Tensor | None = None) -> Tensor:
        """Rows (n,) in any order -> (n, 2, L, D), into `out` (contiguous, storage dtype, CPU) when it is given."""
        shape, dtype = (len(rows), 2, self.index.n_layers, self.index.d_acts), getattr(torch, self.index.dtype)
        out = torch.empty(shape, dtype=dtype) if out is None else out
        assert (out.shape, out.dtype) == (shape, dtype), (out.shape, out.dtype)
        self._read("tensor", rows, out.view(-1).view(torch.uint8).numpy().data)
        return out

    def read_into(self, rows: np.ndarray, views: list[memoryview]) -> None:
        """Read rows (n,) in any order, each into its own of n views (as many bytes as a row has)."""
        self._read_ranges("tensor", rows, lambda start, end: views[start:end])

    def read_raw(self, rows: np.ndarray) -> RawRows:
        """Rows (n,) in any order, with their columns; `row` is their number."""
        columns = {name: self._column(name, rows) for name in COLUMN_DTYPES}
        return raw_rows(self.read(rows), {**columns, "row": rows})

    def _column(self, name: str, rows: Any) -> np.ndarray:
        numbers = self._row_numbers(rows)
        out = np.empty(len(numbers), COLUMN_DTYPES[name])
        self._read(name, numbers, out.view(np.uint8).data)
        return out

    # Each takes rows as `buffer[rows]` does, and gives (n,) integers.
    tokens = partialmethod(_column, "token")
    positions = partialmethod(_column, "position")  # in the window
    documents = partialmethod(_column, "document")  # numbers within the part of the text

    def _row_numbers(self, rows: Any) -> np.ndarray:
        """A slice or integers (list, array, tensor; negative ones count from the end) as row numbers (n,) int64."""
        if isinstance(rows, slice):
            return np.arange(*rows.indices(len(self)))
        numbers = np.asarray(rows)
        if numbers.size == 0:
            numbers = numbers.astype(np.int64)
        if numbers.ndim != 1 or numbers.dtype.kind not in "iu":
            raise IndexError(f"rows are an int, a slice or a list of ints, found {numbers.dtype} of {numbers.shape}")
        wrong = (numbers < -len(self)) | (numbers >= len(self))
        if wrong.any():
            raise IndexError(f"row {numbers[wrong][0]} of a store of {len(self)} rows")
        return np.where(numbers < 0, numbers + len(self), numbers)

    def _read(self, name: str, rows: np.ndarray, view: memoryview) -> None:
        """Read one dataset's rows (n,) into `view`, n times that dataset's row bytes."""
        size = self._row_bytes[name]
        self._read_ranges(name, rows, lambda start, end: [view[start * size : end * size]])

    def _read_ranges(self, name: str, rows: np.ndarray, views: Callable[[int, int], list[memoryview]]) -> None:
        """Read one dataset's rows (n,), consecutive ones with one call; rows[start:end] go into `views(start, end)`."""
        size, firsts = self._row_bytes[name], self._firsts
        starts = np.flatnonzero(np.diff(rows, prepend=-2) != 1)
        ends = [*starts[1:].tolist(), len(rows)]
        for start, end, row in zip(starts.tolist(), ends, rows[starts].tolist()):
            shard = bisect_right(firsts, row) - 1
            while start < end:  # consecutive rows may continue in the next shard
                stop = min(end, start + firsts[shard + 1] - row)
                offset = self._offsets[shard][name] + (row - firsts[shard]) * size
                read_at(self._files[shard], views(start, stop), offset)
                start, row, shard = stop, row + stop - start, shard + 1


def _allow_descriptors(count: int) -> None:
    """Raise the soft limit on open files (often 1024) for a store with more shards."""
    (soft, hard), wanted = resource.getrlimit(resource.RLIMIT_NOFILE), count + 256
    if soft != resource.RLIM_INFINITY and soft < wanted:
        if hard != resource.RLIM_INFINITY and hard < wanted:
            raise UserError(f"the store has {count} shards but only {hard} files may be open: raise `ulimit -n`")
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
