"""Rows into shards: shuffled over the open shards of a group, written by a background thread."""

from __future__ import annotations

import dataclasses
import os
import queue
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clt.data.index import FORMAT_VERSION, PARTIAL, STATISTICS, ShardEntry, StoreIndex, publish, write_index
from clt.data.sampler import permutation
from clt.data.shards import COLUMN_DTYPES, checksum, create_shard, write_at
from clt.data.statistics import Moments

_WRITERS = max(1, min(4, (os.cpu_count() or 1) // 4))  # threads that write rows; the rest computes them
_PART = 256  # rows that one thread writes at once
STREAMS = {"train": 1, "heldout": 2}  # stream numbers of the shuffles; 0 is the reading order's


@dataclass(frozen=True)
class Rows:
    """Rows on their way to a store, in the order of the text."""

    tensor: Tensor
    """(n, 2, L, D), CPU, storage dtype"""
    token: np.ndarray
    position: np.ndarray
    document: np.ndarray

    def __len__(self) -> int:
        return len(self.tensor)

    def __getitem__(self, part: slice) -> Rows:
        return Rows(self.tensor[part], self.token[part], self.position[part], self.document[part])

    def copy_into(self, views: list[memoryview]) -> None:
        """The bytes of each row into its own of n views."""
        for view, row in zip(
            views, self.tensor.contiguous().view(len(self), -1).view(torch.uint8).numpy(), strict=True
        ):
            view[:] = row.data


@dataclass(frozen=True)
class Plan:
    """Where the rows of an extraction go."""

    path: Path
    index: StoreIndex
    """The finished store's index, but for its shards."""
    shard_rows: int
    open_shards: int
    shuffle: bool = True

    @property
    def group_rows(self) -> int:
        """Rows in a whole group."""
        return self.shard_rows * self.open_shards

    def shards(self, group: int) -> list[int]:
        """Rows of each shard of a group: all whole, but for the last of the store."""
        rows = min(self.group_rows, self.index.rows - group * self.group_rows)
        return [min(self.shard_rows, rows - first) for first in range(0, rows, self.shard_rows)]

    def order(self, group: int) -> np.ndarray:
        """The place in the group of each of its rows."""
        rows = sum(self.shards(group))
        if not self.shuffle:
            return np.arange(rows)
        return permutation(rows, self.index.seed, group, STREAMS[self.index.text["part"]])


class OpenGroup:
    """The shards of one group while they are written: each row goes to its random place at once."""

    def __init__(self, plan: Plan, group: int) -> None:
        index, sizes, first = plan.index, plan.shards(group), group * plan.open_shards
        self.sizes, self.order, self.shard_rows, self.filled = sizes, plan.order(group), plan.shard_rows, 0
        self.files = [plan.path / f"shard_{first + i:05d}.h5" for i in range(len(sizes))]
        self.partials = [file.with_name(file.name + PARTIAL) for file in self.files]
        self.columns = {name: np.empty(sum(sizes), dtype) for name, dtype in COLUMN_DTYPES.items()}
        self.descriptors: list[int] = []
        try:
            shape = (index.n_layers, index.d_acts, index.dtype)
            self.offsets = [create_shard(file, rows, *shape) for file, rows in zip(self.partials, sizes)]
            self.descriptors += [os.open(file, os.O_WRONLY | os.O_CLOEXEC) for file in self.partials]
        except BaseException:
            self.discard()
            raise

    @property
    def full(self) -> bool:
        return self.filled == len(self.order)

    def add(self, rows: Rows, spread: Callable[..., Iterable[None]] = map) -> None:
        """Write the next rows of the text to their places; `spread` maps over parts of them, perhaps on threads."""
        slots = self.order[self.filled : self.filled + len(rows)]
        data = rows.tensor.reshape(-1).view(torch.uint8).numpy().data
        size, offsets = len(data) // len(rows), [offsets["tensor"] for offsets in self.offsets]
        shards, places = (part.tolist() for part in np.divmod(slots, self.shard_rows))

        def write(part: range) -> None:
            for i in part:
                at = offsets[shards[i]] + places[i] * size
                write_at(self.descriptors[shards[i]], data[i * size : (i + 1) * size], at)

        list(spread(write, [range(i, min(i + _PART, len(rows))) for i in range(0, len(rows), _PART)]))
        for name, column in self.columns.items():
            column[slots] = getattr(rows, name)
        self.filled += len(rows)

    def publish(self) -> list[ShardEntry]:
        """Complete the shards, give them their names and return their entries."""
        assert self.full
        starts = range(0, len(self.order), self.shard_rows)
        for fd, offsets, start, rows in zip(self.descriptors, self.offsets, starts, self.sizes):
            for name, column in self.columns.items():
                write_at(fd, column[start : start + rows].view(np.uint8).data, offsets[name])
        self._close()
        with ThreadPoolExecutor(min(len(self.files), os.cpu_count() or 1)) as pool:
            sums = list(pool.map(checksum, self.partials))
            list(pool.map(publish, self.partials, self.files))
        return [ShardEntry(file=f.name, rows=n, checksum=s) for f, n, s in zip(self.files, self.sizes, sums)]

    def discard(self) -> None:
        """Delete the unfinished shards."""
        self._close()
        for partial in self.partials:
            partial.unlink(missing_ok=True)

    def _close(self) -> None:
        while self.descriptors:
            os.close(self.descriptors.pop())


class Writer:
    """Writes rows in background threads, so that the language model runs on meanwhile.

    `record(entries, note)` is called in one of them for each whole group, in order, with the note that came with its
    last rows. An error of a thread is raised by a later `put` or at the end of the `with` block; leaving that by an
    error, or an error of a thread, deletes the open groups.
    """

    def __init__(self, plan: Plan, first_group: int, record: Callable[[list[ShardEntry], object], None]) -> None:
        self._plan, self._group, self._record = plan, first_group, record
        self._queue: queue.Queue[tuple[Rows, object] | None] = queue.Queue(maxsize=2)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True, name="clt-writer")

    def __enter__(self) -> Writer:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._queue.put(None)
        self._thread.join()
        if self._error is not None and kind is None:
            raise self._error

    def put(self, rows: Rows, note: object = None) -> None:
        """Hand over rows of one group; those that complete it carry the note for `record`."""
        self._queue.put((rows, note))  # does not block for long: after an error the thread only empties the queue
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        try:
            self._write()
        except BaseException as error:  # noqa: BLE001 - raised again by put and __exit__, in the caller's thread
            self._error = error
            while self._queue.get() is not None:
                pass

    def _write(self) -> None:
        group: OpenGroup | None = None
        # A group is hashed, synced and named while the next one fills; one group at a time, so that they come in order.
        with ThreadPoolExecutor(1, "clt-publisher") as publisher, ThreadPoolExecutor(_WRITERS, "clt-pwrite") as pool:
            published: Future[None] | None = None
            try:
                while (item := self._queue.get()) is not None:
                    rows, note = item
                    group = group or OpenGroup(self._plan, self._group)
                    group.add(rows, pool.map)
                    if group.full:
                        if published is not None:
                            published.result()
                        published = publisher.submit(self._publish, group, note)
                        group, self._group = None, self._group + 1
                if published is not None:
                    published.result()
            finally:
                if group is not None:
                    group.discard()

    def _publish(self, group: OpenGroup, note: object) -> None:
        try:
            self._record(group.publish(), note)
        except BaseException:
            group.discard()
            raise


def write_store(
    path: str | Path,
    tensor: Tensor,
    shard_rows: int = 32_768,
    columns: dict[str, np.ndarray] | None = None,
    **fields: Any,
) -> StoreIndex:
    """Write rows (n, 2, L, D) that are in memory as a store, in their order: synthetic data, tests, conversions.

    `columns` gives token, position and document (n,), all zero when left out; `fields` sets fields of the index.
    """
    n, _, n_layers, d_acts = tensor.shape
    index = StoreIndex(
        format_version=FORMAT_VERSION,
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
    plan = Plan(Path(path), dataclasses.replace(index, **fields), shard_rows, open_shards=1, shuffle=False)
    plan.path.mkdir(parents=True, exist_ok=True)
    columns = columns or {name: np.zeros(n, dtype) for name, dtype in COLUMN_DTYPES.items()}
    rows, moments = Rows(tensor.cpu().contiguous(), **columns), Moments.zero(n_layers, d_acts)
    shards: list[ShardEntry] = []
    for number, first in enumerate(range(0, n, shard_rows)):
        group, part = OpenGroup(plan, number), rows[first : first + shard_rows]
        group.add(part)
        moments.add(part.tensor)
        shards += group.publish()
    moments.statistics().save(plan.path / STATISTICS)
    index = dataclasses.replace(plan.index, shards=shards)
    write_index(plan.path, index)
    return index
