"""Groups of shards: the rows of each group in the order of the text, and their shuffled places in its files."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch

from clt.config import Config
from clt.data.index import PARTIAL, ShardEntry, StoreIndex, rename_synced
from clt.data.sampler import permutation
from clt.data.shards import COLUMN_DTYPES, checksum, create_shard, write_at
from clt.data.state import ExtractionState
from clt.lm.forward import Rows, check_finite, forward_text
from clt.lm.load import LanguageModel
from clt.lm.text import Window

T = TypeVar("T")
STREAMS = {"train": 1, "heldout": 2}  # stream numbers of the shuffles; 0 is the reading order's
_WRITE_ROWS = 256  # that one thread writes at once


@dataclass(frozen=True)
class Placement:
    """Where rows are written: each group of `open_shards` shards of `shard_rows` rows is shuffled by itself."""

    path: Path
    index: StoreIndex
    """The index of the finished store, without its shards."""
    shard_rows: int
    open_shards: int
    shuffle: bool = True

    @property
    def group_rows(self) -> int:
        """Rows in a complete group; the last one may have fewer."""
        return self.shard_rows * self.open_shards


class OpenGroup:
    """The shards of one group while they are written. Each row is written to its shuffled place at once."""

    def __init__(self, placement: Placement, group: int) -> None:
        index, self.shard_rows, self.filled = placement.index, placement.shard_rows, 0
        rows = min(placement.group_rows, index.rows - group * placement.group_rows)
        self.sizes = [min(self.shard_rows, rows - first) for first in range(0, rows, self.shard_rows)]
        self.order = np.arange(rows)  # the place in the group of each row
        if placement.shuffle:
            self.order = permutation(rows, index.seed, group, STREAMS[index.text["part"]])
        first = group * placement.open_shards
        self.paths = [placement.path / f"shard_{first + i:05d}.h5" for i in range(len(self.sizes))]
        self.partials = [path.with_name(path.name + PARTIAL) for path in self.paths]
        self.columns = {name: np.empty(rows, dtype) for name, dtype in COLUMN_DTYPES.items()}
        shape = (index.n_layers, index.d_acts, index.dtype)
        self.offsets = [create_shard(path, size, *shape) for path, size in zip(self.partials, self.sizes)]
        self.files = contextlib.ExitStack()
        opened = [self.files.enter_context(path.open("r+b", buffering=0)) for path in self.partials]
        self.descriptors = [file.fileno() for file in opened]

    @property
    def full(self) -> bool:
        return self.filled == len(self.order)

    def add(self, rows: Rows, pool: Executor) -> None:
        """Write the next rows of the text (contiguous, CPU, storage dtype) to their places, with the pool's threads."""
        slots = self.order[self.filled : self.filled + len(rows)]
        data = rows.activations.reshape(-1).view(torch.uint8).numpy().data
        size, offsets = len(data) // len(rows), [offsets["tensor"] for offsets in self.offsets]
        shards, places = (numbers.tolist() for numbers in np.divmod(slots, self.shard_rows))

        def write(start: int) -> None:
            for i in range(start, min(start + _WRITE_ROWS, len(rows))):
                at = offsets[shards[i]] + places[i] * size
                write_at(self.descriptors[shards[i]], data[i * size : (i + 1) * size], at)

        list(pool.map(write, range(0, len(rows), _WRITE_ROWS)))
        for name, column in self.columns.items():
            column[slots] = getattr(rows, name)
        self.filled += len(rows)

    def finish(self) -> list[ShardEntry]:
        """Write the columns, hash the shards and rename them; returns their entries in the index.

        The shards are on disk for good when it returns.
        """
        assert self.full
        starts = range(0, len(self.order), self.shard_rows)
        with self.files:
            for fd, offsets, start, rows in zip(self.descriptors, self.offsets, starts, self.sizes):
                for name, column in self.columns.items():
                    write_at(fd, column[start : start + rows].view(np.uint8).data, offsets[name])
        with ThreadPoolExecutor(min(len(self.paths), os.cpu_count() or 1)) as pool:
            sums = list(pool.map(checksum, self.partials))
            list(pool.map(rename_synced, self.partials, self.paths))
        return [ShardEntry(file=p.name, rows=n, checksum=s) for p, n, s in zip(self.paths, self.sizes, sums)]


def rows_by_group(
    config: Config, placement: Placement, lm: LanguageModel, state: ExtractionState
) -> Iterator[tuple[Rows, ExtractionState | None]]:
    """The rows of the text from `state` on, in host memory, cut where groups end.

    The last rows of a group come with the state after them, which still lacks the shards. On a GPU a second stream
    updates the moments and copies the rows while the model computes the next batch. On a CPU the model uses all cores,
    and a thread beside it gained nothing (measured). Raises UserError for a value that overflows the storage dtype.
    """
    side = torch.cuda.Stream(lm.device) if lm.device.type == "cuda" else None
    with torch.cuda.stream(side):  # allocated on that stream, so that the model's stream does not reuse the memory
        moments = state.moments.to(lm.device)
    pieces = _cut(config, placement, lm, state)
    for batch, rows, end, computed in pieces if side is None else _one_ahead(pieces):
        with torch.cuda.stream(side):
            if side is not None and computed is not None:
                side.wait_event(computed)
                rows.activations.record_stream(side)
            moments.add(rows.activations)
            reached = None if end is None else ExtractionState([], *end, moments.to("cpu"))
            if side is not None:
                host = torch.empty_like(rows.activations, device="cpu", pin_memory=True)
                rows = dataclasses.replace(rows, activations=host.copy_(rows.activations, non_blocking=True))
            # A value that is not finite makes its sum of squares not finite, so the rows need no check of their own.
            # On a GPU this waits for the side stream, and so for the copy.
            if not moments.squares.isfinite().all():
                check_finite(lm, batch, rows)
        yield rows, reached


def _cut(
    config: Config, placement: Placement, lm: LanguageModel, state: ExtractionState
) -> Iterator[tuple[list[Window], Rows, tuple[int, int] | None, torch.Event | None]]:
    """(windows of the pass, rows, end, event), on the model's device, cut where groups end.

    end: `windows` and `skip_rows` of the state there, else None; event: on a GPU, when the rows are computed.
    """
    done, total, skip, windows = state.rows, placement.index.rows, state.skip_rows, state.windows
    for batch, rows in forward_text(config, placement.index.text["part"], lm, windows):
        computed = torch.cuda.current_stream(lm.device).record_event() if lm.device.type == "cuda" else None
        while skip < len(rows) and done < total:
            group_end = min((done // placement.group_rows + 1) * placement.group_rows, total)
            start, skip = skip, min(len(rows), skip + group_end - done)
            done += skip - start
            yield batch, rows[start:skip], (windows, skip) if done == group_end else None, computed
        if done == total:
            return
        skip, windows = 0, windows + len(batch)


def _one_ahead(items: Iterator[T]) -> Iterator[T]:
    """Yield each item after the next one was made, so that a GPU already works on the next one."""
    waiting: list[T] = []
    for item in items:
        yield from waiting
        waiting = [item]
    yield from waiting
