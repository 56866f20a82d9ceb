"""The shuffle buffer: rows of activations in shared memory, filled by one process and drawn at random by many.

A slot goes FREE -> WRITING -> VALID -> READING -> FREE. The states are the truth; two dense lists of slots, the valid
and the free ones, make claiming quick. Only they are touched under the lock, never a payload. Whoever dies with the
lock leaves `dirty` set, and the next holder rebuilds the lists from the states; whoever dies with claimed rows leaves
them to `reclaim`, which knows the dead from claims that carry pid and start time.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import secrets
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from clt.data.shards import COLUMN_DTYPES
from clt.lm.forward import Rows
from clt.server.layout import HEADER, arrays, buffer_bytes
from clt.server.segment import PREFIX_BYTES, Segment, start_time
from clt.server.workers import Workers

if TYPE_CHECKING:
    from clt.server.generator import StoredRows

FREE, WRITING, VALID, READING = range(4)
LOCKED_ROWS = 1024
"""Rows that change their state under one hold of the lock, at most: it lasts for microseconds."""
SLOW_SHARE = 1 / 4
"""What a serving process may keep in memory of its own for clients that read slowly, of the buffer's size."""
_PIDS = 1 << 24  # more than Linux has: 2^22


class Batch(NamedTuple):
    """Rows drawn from the buffer, in memory of their own."""

    activations: Tensor
    """(n, 2, L, D) in storage dtype"""
    token: np.ndarray
    """(n,) int32"""
    position: np.ndarray
    """(n,) int32"""
    document: np.ndarray
    """(n,) int64"""
    row: np.ndarray
    """(n,) int64 serial numbers, unique within the segment"""


class SharedBuffer:
    """`create` it in the process that owns it, `attach` to it in all others; threads may share one.

    `put` has one writer at a time, `draw` any number of readers.
    """

    def __init__(self, segment: Segment, shape: tuple[int, int, int, str]) -> None:
        self._segment = segment
        self.rows, self.n_layers, self.d_acts, self.dtype = shape
        found = {
            name: np.ndarray(size, dtype, segment.memory, offset)
            for name, (offset, size, dtype) in arrays(*shape)[0].items()
        }
        self._header, self._payload = found["header"], found["payload"]
        self._state, self._pid, self._start = found["state"], found["claim_pid"], found["claim_start"]
        self._valid, self._free = found["valid"], found["free"]
        self._columns = {name: found[name] for name in (*COLUMN_DTYPES, "row")}
        self.row_bytes = self._payload.shape[1]
        self._me = (os.getpid(), start_time(os.getpid()))
        self.workers = Workers(found["workers"], self._header, self._locked)
        self.random = np.random.default_rng()
        self.segment, self.tag = (self._header[name].item().decode() for name in ("segment", "tag"))

    @classmethod
    def create(
        cls, name: str, rows: int, n_layers: int, d_acts: int, dtype: str, min_fill: int, tag: str = ""
    ) -> SharedBuffer:
        """An empty buffer in the segment `name`, owned by this process; replaces a stale one of a dead owner.

        Readers wait until `min_fill` rows are valid; `tag` says which rows they are. Raises UserError when a
        living process owns the segment or there is not enough memory.
        """
        assert 0 <= min_fill <= rows < 2**31, (min_fill, rows)
        segment = Segment.create(name, buffer_bytes(rows, n_layers, d_acts, dtype))
        header = np.ndarray((), HEADER, segment.memory, PREFIX_BYTES)
        header["rows"], header["n_layers"], header["d_acts"], header["dtype"] = rows, n_layers, d_acts, dtype.encode()
        header["min_fill"], header["segment"], header["created"] = min_fill, secrets.token_hex(8).encode(), time.time()
        header["tag"] = tag.encode()
        header["state"], header["since"] = b"starting", time.time()
        header["dirty"] = 1  # the first to lock makes the lists
        segment.publish()
        return cls(segment, (rows, n_layers, d_acts, dtype))

    @classmethod
    def attach(cls, name: str) -> SharedBuffer:
        """The buffer in the segment `name`. Raises FileNotFoundError when there is none."""
        segment = Segment.attach(name)
        header = np.ndarray((), HEADER, segment.memory, PREFIX_BYTES)
        sizes = (int(header["rows"]), int(header["n_layers"]), int(header["d_acts"]), header["dtype"].item().decode())
        return cls(segment, sizes)

    # The writer

    def put(self, rows: Rows | StoredRows, mark: tuple[int, int, int] | None = None) -> int:
        """Write as many of `rows` as there is room for, at most LOCKED_ROWS; returns how many.

        `mark`, with that many added to its last number, is recorded under the lock that makes the rows valid.
        """
        slots = self.reserve(min(len(rows), LOCKED_ROWS))
        if len(slots) == 0:
            return 0
        part = rows[: len(slots)]
        memory, size = self._payload.reshape(-1).data, self.row_bytes
        part.copy_into([memory[start : start + size] for start in (slots.astype(np.int64) * size).tolist()])
        for name in COLUMN_DTYPES:
            self._columns[name][slots] = getattr(part, name)
        self.publish(slots, mark)
        return len(slots)

    def reserve(self, n: int) -> np.ndarray:
        """Claim up to n free slots for writing and give them serial numbers: FREE -> WRITING."""
        with self._locked() as header:
            free = int(header["n_free"])
            slots = self._free[max(free - n, 0) : free].copy()
            first = int(header["generated"])
            header["generated"] = first + len(slots)
            header["n_free"] = free - len(slots)
            self._claim(slots, WRITING)
        self._columns["row"][slots] = np.arange(first, first + len(slots))
        return slots

    def publish(self, slots: np.ndarray, mark: tuple[int, int, int] | None = None) -> None:
        """Hand reserved and written slots to the readers: WRITING -> VALID."""
        with self._locked() as header:
            valid = int(header["n_valid"])
            if mark is not None:  # first: a writer that is killed here loses its rows, and none comes twice
                header["mark"] = (mark[0], mark[1], mark[2] + len(slots))
            self._state[slots] = VALID
            self._valid[valid : valid + len(slots)] = slots
            header["n_valid"] = valid + len(slots)

    @property
    def mark(self) -> tuple[int, int, int]:
        """What `put` last recorded, (0, 0, 0) before."""
        with self._locked() as header:
            first, second, third = header["mark"].tolist()
            return first, second, third

    @mark.setter
    def mark(self, mark: tuple[int, int, int]) -> None:
        with self._locked() as header:
            header["mark"] = mark

    # The readers

    def draw(self, n: int) -> Batch | None:
        """n rows drawn uniformly without replacement; None while fewer than max(n, min_fill) are valid.

        Every row is drawn once at most, by whomever. Once the generator has stopped for good, min_fill no longer
        counts.
        """
        slots = self.claim(n)
        if slots is None:
            return None
        try:
            activations = torch.empty((n, 2, self.n_layers, self.d_acts), dtype=getattr(torch, self.dtype))
            self.copy(slots, activations.view(-1).view(torch.uint8).numpy().data)
            return Batch(activations, **self.columns(slots))
        finally:
            self.release(slots)

    def claim(self, n: int) -> np.ndarray | None:
        """The first part of `draw`: n random valid slots (n,) for reading, VALID -> READING, or None."""
        if not 0 < n <= self.rows:
            raise ValueError(f"a batch of {n} rows of a buffer of {self.rows}; wanted 1 to {self.rows}")
        parts: list[np.ndarray] = []
        for start in range(0, n, LOCKED_ROWS):
            slots = self._claim_valid(min(LOCKED_ROWS, n - start), n - start, first=start == 0)
            if slots is None:  # others have drawn them meanwhile
                for taken in parts:
                    self.publish(taken)
                return None
            parts.append(slots)
        return np.concatenate(parts)

    def _claim_valid(self, n: int, wanted: int, first: bool) -> np.ndarray | None:
        """n random valid slots; None when there are not `wanted`, or not min_fill at `first`."""
        places, seen = np.empty(0, np.int64), -1
        for last in (False, False, False, True):
            with self._locked() as header:
                valid, early = int(header["n_valid"]), first and header["state"] != b"stopped"
                if valid < wanted or (early and valid < header["min_fill"]):
                    return None
                if last and seen > valid:  # others are quicker, again and again
                    places, seen = self.random.choice(valid, n, replace=False), valid
                if 0 <= seen <= valid:  # rows that have come meanwhile are behind them in the list
                    slots = self._valid[places]
                    self._claim(slots, READING)
                    # Fill the holes below the new end with those above it that were not drawn.
                    end = valid - n
                    stays = np.ones(n, bool)
                    stays[places[places >= end] - end] = False
                    self._valid[places[places < end]] = self._valid[end:valid][stays]
                    header["n_valid"] = end
                    return slots
            places, seen = self.random.choice(valid, n, replace=False), valid  # it takes its time: not under the lock
        raise AssertionError("the last try does not fail")

    def copy(self, slots: np.ndarray, out: memoryview) -> None:
        """The bytes of the activations in claimed slots (n,), into `out`."""
        rows = np.frombuffer(out, np.uint8).reshape(len(slots), -1)
        np.take(self._payload, slots, axis=0, out=rows, mode="clip")  # "raise" would copy twice

    def columns(self, slots: np.ndarray) -> dict[str, np.ndarray]:
        """token, position, document and row (n,) of claimed slots."""
        return {name: column[slots] for name, column in self._columns.items()}

    def release(self, slots: np.ndarray) -> None:
        """The last part of `draw`: claimed slots that have been read, READING -> FREE."""
        for start in range(0, len(slots), LOCKED_ROWS):
            part = slots[start : start + LOCKED_ROWS]
            with self._locked() as header:
                self._give_back(part)
                header["drawn"] += len(part)

    def refresh(self) -> int:
        """Drop all valid rows; returns how many. Holds the lock for 1 to 4 nanoseconds a row."""
        with self._locked() as header:
            slots = self._valid[: int(header["n_valid"])].copy()
            header["n_valid"] = 0
            self._give_back(slots)
            header["dropped"] += len(slots)
            return len(slots)

    def reclaim(self) -> int:
        """Free the slots that dead processes had claimed (their rows are lost); returns how many."""
        suspects = np.flatnonzero((self._state == WRITING) | (self._state == READING))
        # As one number, because rows of two sort twenty times as slowly, and this is asked five times a second.
        owners = np.unique(self._start[suspects] * _PIDS + self._pid[suspects])
        freed = 0
        for start, pid in (divmod(owner, _PIDS) for owner in owners.tolist()):
            if start_time(pid) == start:
                continue
            with self._locked():  # a suspect may have become free, and another's, since
                claimed = (self._state[suspects] == WRITING) | (self._state[suspects] == READING)
                theirs = (self._pid[suspects] == pid) & (self._start[suspects] == start)
                slots = suspects[claimed & theirs]
                self._give_back(slots)
                freed += len(slots)
        return freed

    # Around the rows

    def stats(self) -> dict[str, Any]:
        """Everything worth knowing, as plain numbers and strings. rows_generated = valid + in_flight + the others."""
        with self._locked() as header:
            h = header.copy()
        rows, valid, free, generated = (int(h[name]) for name in ("rows", "n_valid", "n_free", "generated"))
        drawn, dropped, living = int(h["drawn"]), int(h["dropped"]), self.workers.clients()
        return {
            "segment": self.segment,
            "rows": rows,
            "valid": valid,
            "fill": valid / rows,
            "min_fill": int(h["min_fill"]),
            "in_flight": rows - free - valid,
            "rows_generated": generated,
            "rows_drawn": drawn,
            # What is in no slot and was neither drawn nor dropped went down with a process.
            "rows_lost": generated - (rows - free) - drawn - dropped,
            "rows_dropped": dropped,
            "rows_served": int(h["served_rows"]),
            "bytes_served": int(h["served_bytes"]),
            "clients": sum(living),
            "workers": len(living),
            "created": float(h["created"]),
            "epoch": int(h["mark"][0]),
            "windows": int(h["mark"][1]),
            "generator": self._generator(h),
        }

    def generator(self) -> dict[str, Any]:
        """The generator: {state: starting|running|failed|stopped, cause, pid, restarts, since (unix time)}."""
        with self._locked() as header:
            found = header.copy()
        return self._generator(found)

    def set_generator(self, state: str, cause: str = "", pid: int = 0, restarts: int | None = None) -> None:
        """Record what the generator does and, when it failed, why."""
        with self._locked() as header:
            header["state"], header["cause"], header["pid"] = state.encode(), cause.encode()[:1024], pid
            header["since"] = time.time()
            if restarts is not None:
                header["restarts"] = restarts

    def add_served(self, rows: int, bytes: int) -> None:
        """Count what a worker has sent."""
        with self._locked() as header:
            header["served_rows"] += rows
            header["served_bytes"] += bytes

    def give_up(self) -> None:
        """Of a buffer whose owner has died: drop the valid rows and return the memory, unless rows are just being read.

        Clients get no rows from it any more, but another buffer may not fit beside it.
        """
        self.refresh()
        self.reclaim()
        with self._locked() as header:
            if int(header["n_free"]) == self.rows:
                offset, shape, _ = arrays(self.rows, self.n_layers, self.d_acts, self.dtype)[0]["payload"]
                self._segment.memory.madvise(mmap.MADV_REMOVE, offset, int(np.prod(shape)))

    @property
    def filled(self) -> float:
        """The share of the slots that are not free."""
        return 1 - int(self._header["n_free"]) / self.rows

    def held_up(self, n: int) -> bool:
        """Whether readers of up to n rows may wait, and the generator cannot help them: too many rows are claimed."""
        return not int(self._header["n_free"]) and int(self._header["n_valid"]) < max(int(self._header["min_fill"]), n)

    @property
    def alive(self) -> bool:
        """Whether the process that created the buffer still runs. If not, close it and look for another."""
        return self._segment.owner_lives()

    def unlink(self) -> None:
        """Remove the segment's name; the memory goes when the last process has closed it."""
        self._segment.unlink()

    def close(self, stay: bool = False) -> None:
        """Unmap the buffer and leave it, or `stay` among those that keep it alive for as long as this process lives.

        If its owner is dead, its name is removed.
        """
        self.workers.leave(stay)
        del self.workers, self._header, self._payload, self._state, self._pid, self._start
        del self._valid, self._free, self._columns
        self._segment.close()

    @contextlib.contextmanager
    def _locked(self) -> Iterator[np.ndarray]:
        """The header, alone with it. An exception or a death inside leaves it dirty."""
        with self._segment.locked():
            if self._header["dirty"]:
                self._rebuild()
            self._header["dirty"] = 1
            yield self._header
            self._header["dirty"] = 0

    def _rebuild(self) -> None:
        for name, slots, state in (("n_valid", self._valid, VALID), ("n_free", self._free, FREE)):
            found = np.flatnonzero(self._state == state)
            slots[: len(found)] = found
            self._header[name] = len(found)

    def _claim(self, slots: np.ndarray, state: int) -> None:
        """Under the lock: first whose, then what, so that a claim never names a wrong process."""
        self._pid[slots], self._start[slots] = self._me
        self._state[slots] = state

    def _give_back(self, slots: np.ndarray) -> None:
        """Under the lock: slots that are in neither list become free."""
        free = int(self._header["n_free"])
        self._state[slots] = FREE
        self._free[free : free + len(slots)] = slots
        self._header["n_free"] = free + len(slots)

    def _generator(self, header: np.ndarray) -> dict[str, Any]:
        found = {name: header[name].item().decode("utf-8", "replace") for name in ("state", "cause")}
        found |= {name: header[name].item() for name in ("restarts", "since")}
        found["pid"] = header["pid"].item() or None
        if found["state"] != "stopped" and not self.alive:
            found |= {"state": "failed", "cause": f"the supervisor (process {self._segment.owner}) died"}
        return found
