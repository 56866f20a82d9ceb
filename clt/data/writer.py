"""Write rows into shards: each group of shards is open at a time, and gets its rows in a shuffled order."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections import deque
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clt.data.index import PARTIAL, STATISTICS, ShardEntry, StoreIndex, delete_unfinished, rename_synced, write_index
from clt.data.sampler import permutation
from clt.data.shards import COLUMN_DTYPES, checksum, create_shard, write_at
from clt.data.spec import DataConfig
from clt.data.state import ExtractionState
from clt.data.statistics import Moments
from clt.lm.forward import Rows

STREAMS = {"train": 1, "heldout": 2}  # stream numbers of the shuffles; 0 is the reading order's
_WRITERS = max(1, min(4, (os.cpu_count() or 1) // 4))  # threads that write rows; the other cores compute them
_WRITE_ROWS = 256  # that one thread writes at once
_AHEAD = 2  # pieces that may wait to be written


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
        shape = index.shape
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
        """Write the columns, then hash, sync and rename the shards; returns their entries in the index."""
        starts = range(0, len(self.order), self.shard_rows)
        with self.files:
            for fd, offsets, start, rows in zip(self.descriptors, self.offsets, starts, self.sizes):
                for name, column in self.columns.items():
                    write_at(fd, column[start : start + rows].view(np.uint8).data, offsets[name])
        with ThreadPoolExecutor(min(len(self.paths), os.cpu_count() or 1)) as pool:
            sums = list(pool.map(checksum, self.partials))
            list(pool.map(rename_synced, self.partials, self.paths))
        return [ShardEntry(file=p.name, rows=n, checksum=s) for p, n, s in zip(self.paths, self.sizes, sums)]


class Writer:
    """Writes the rows of an extraction in background threads while the language model computes the next ones.

    Once the shards of a group are complete on disk, the state after them is saved and becomes `state`. So the state on
    disk may lack the last shards, but never names a shard that is not there. After an error in a thread no later group
    is finished; a later `put` or the end of the `with` block raises it. Leaving the block deletes unfinished shards.
    """

    def __init__(self, placement: Placement, state: ExtractionState, identity: dict[str, Any]) -> None:
        self.state, self._placement, self._identity = state, placement, identity
        self._number, self._group = state.rows // placement.group_rows, None
        self._pool = ThreadPoolExecutor(_WRITERS, "clt-pwrite")
        self._adder, self._added = ThreadPoolExecutor(1, "clt-writer"), deque[Future[None]]()
        # One thread hashes, syncs and renames a group while the next one fills. So groups finish in order.
        self._finisher, self._finished = ThreadPoolExecutor(1, "clt-finisher"), deque[Future[None]]()

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for executor in (self._adder, self._finisher, self._pool):
            executor.shutdown()
        if self._group is not None:
            self._group.files.close()
        delete_unfinished(self._placement.path)
        if kind is None:
            for future in (*self._added, *self._finished):
                future.result()

    def put(self, rows: Rows, reached: ExtractionState | None = None) -> None:
        """Hand over the next rows, all of one group. The last rows of a group come with the state after them."""
        if len(self._added) == _AHEAD:
            self._added.popleft().result()
        previous = self._added[-1] if self._added else None
        self._added.append(self._adder.submit(self._add, rows, reached, previous))

    def _add(self, rows: Rows, reached: ExtractionState | None, previous: Future[None] | None) -> None:
        if previous is not None:
            previous.result()  # raises: these rows must not take the places of rows that could not be written
        self._group = self._group or OpenGroup(self._placement, self._number)
        self._group.add(rows, self._pool)
        assert self._group.full == (reached is not None)
        if reached is not None:
            if self._finished:
                self._finished.popleft().result()
            self._finished.append(self._finisher.submit(self._finish, self._group, reached))
            self._group, self._number = None, self._number + 1

    def _finish(self, group: OpenGroup, reached: ExtractionState) -> None:
        state = dataclasses.replace(reached, shards=self.state.shards + group.finish())
        state.save(self._placement.path, self._identity)
        self.state = state


def write_store(
    path: str | Path,
    tensor: Tensor,
    shard_rows: int = DataConfig.shard_rows,
    columns: dict[str, np.ndarray] | None = None,
    **fields: Any,
) -> StoreIndex:
    """Write rows (n, 2, L, D) from memory as a store, without shuffling: synthetic data, tests, conversions.

    `columns` gives token, position and document (n,), all zero when left out; `fields` sets fields of the index.
    """
    n, _, n_layers, d_acts = tensor.shape
    index = StoreIndex(
        model="none",
        revision=None,
        tokenizer_hash="none",
        layers=list(range(n_layers)),
        input_sites=[f"input.{layer}" for layer in range(n_layers)],
        output_sites=[f"output.{layer}" for layer in range(n_layers)],
        text={"part": "train"},
        seed=0,
        context=1024,
        n_layers=n_layers,
        d_acts=d_acts,
        dtype=str(tensor.dtype).removeprefix("torch."),
        rows=n,
        shards=[],
    )
    index = dataclasses.replace(index, **fields)
    placement = Placement(Path(path), index, shard_rows, open_shards=-(-n // shard_rows), shuffle=False)
    placement.path.mkdir(parents=True, exist_ok=True)
    columns = columns or {name: np.zeros(n, dtype) for name, dtype in COLUMN_DTYPES.items()}
    rows, moments = Rows(tensor.cpu().contiguous(), **columns), Moments.zero(n_layers, d_acts)
    for part in rows.activations.split(shard_rows):
        moments.add(part)
    try:
        with ThreadPoolExecutor(_WRITERS) as pool:
            group = OpenGroup(placement, 0)
            group.add(rows, pool)
        index = dataclasses.replace(placement.index, shards=group.finish())
    finally:
        delete_unfinished(placement.path)
    moments.statistics().save(placement.path / STATISTICS)
    write_index(placement.path, index)
    return index
