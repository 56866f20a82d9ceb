"""Write rows into shards, in background threads."""

from __future__ import annotations

import dataclasses
import os
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from clt.data.groups import OpenGroup, Placement
from clt.data.index import FORMAT_VERSION, STATISTICS, ShardEntry, StoreIndex, delete_unfinished, write_index
from clt.data.shards import COLUMN_DTYPES
from clt.data.state import ExtractionState
from clt.data.statistics import Moments
from clt.lm.forward import Rows

_WRITERS = max(1, min(4, (os.cpu_count() or 1) // 4))  # threads that write rows; the other cores compute them
_AHEAD = 2  # pieces that may wait to be written


class Writer:
    """Writes the rows of an extraction in background threads while the language model computes the next ones.

    Once the shards of a group are complete on disk, the state after them is saved and becomes `state`. So the state on
    disk may lack the last shards, but never names a shard that is not there. After an error in a thread nothing more
    is written; a later `put` or the end of the `with` block raises it. Leaving the block deletes the unfinished shards.
    """

    def __init__(self, placement: Placement, state: ExtractionState, identity: dict[str, Any]) -> None:
        self.state, self._placement, self._identity = state, placement, identity
        self._number, self._group = state.rows // placement.group_rows, None
        self._pool = ThreadPoolExecutor(_WRITERS, "clt-pwrite")
        self._adder, self._added = ThreadPoolExecutor(1, "clt-writer"), deque[Future[None]]()
        # A group is hashed, synced and renamed while the next one fills; one at a time, so that they finish in order.
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
    shard_rows: int = 32_768,
    columns: dict[str, np.ndarray] | None = None,
    **fields: Any,
) -> StoreIndex:
    """Write rows (n, 2, L, D) from memory as a store, without shuffling: synthetic data, tests, conversions.

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
    placement = Placement(Path(path), dataclasses.replace(index, **fields), shard_rows, open_shards=1, shuffle=False)
    placement.path.mkdir(parents=True, exist_ok=True)
    columns = columns or {name: np.zeros(n, dtype) for name, dtype in COLUMN_DTYPES.items()}
    rows, moments = Rows(tensor.cpu().contiguous(), **columns), Moments.zero(n_layers, d_acts)
    shards: list[ShardEntry] = []
    try:
        with ThreadPoolExecutor(_WRITERS) as pool:
            for number, first in enumerate(range(0, n, shard_rows)):
                part, group = rows[first : first + shard_rows], OpenGroup(placement, number)
                moments.add(part.activations)
                group.add(part, pool)
                shards += group.finish()
    finally:
        delete_unfinished(placement.path)
    moments.statistics().save(placement.path / STATISTICS)
    index = dataclasses.replace(placement.index, shards=shards)
    write_index(placement.path, index)
    return index
