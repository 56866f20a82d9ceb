"""The shuffle buffer: blocks of rows in shared memory, filled by one process and taken whole by many.

A block goes FREE -> OPEN -> FULL -> FREE. The generator scatters each row over the open blocks, so a full block is a
random sample of the last fills. A serving process copies a full block out and frees it at once: no client, however
slow, ever holds shared memory. Every lock is one byte of the file, owned by an open file description: the kernel
releases it when its holder dies, in whatever PID namespace. Nobody waits for one: a locked block is left to its holder,
and a block whose holder dies before it is freed is still full.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import secrets
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from clt.data.index import ITEM_BYTES, RowShape
from clt.data.lock import ByteLocks
from clt.data.raw_rows import COLUMNS, RawRows, cut, empty_rows
from clt.errors import UserError
from clt.memory import allocate, open_own, page_aligned
from clt.ranges import MOST_WORKERS

FREE, OPEN, FULL = range(3)
GENERATOR, LEADER, _LINES = ((1 << 40) + i for i in range(3))  # locks; serving process i holds _LINES + i
FOLDER, _MAGIC = Path("/dev/shm"), "cltblk03"
_COLUMNS = np.dtype(list(COLUMNS.items()))  # of a row, together: to write to four places takes the generator longer
_BITS = np.dtype((np.void, _COLUMNS.itemsize))  # the same as one value: numpy copies a structure field by field
_LINE = np.dtype([(name, "i8") for name in ("clients", "held", "drawn", "dropped")])  # of a serving process
_HEADER = np.dtype([
    ("magic", "S8"), ("tag", "S128"), ("segment", "S16"), ("dtype", "S16"), ("sizes", "i8", 5),
    ("state", "S16"), ("cause", "S1024"), ("pid", "i8"), ("restarts", "i8"), ("refreshes", "i8"), ("changes", "i8"),
    ("history", "f8", (300, 3)), ("lines", _LINE, MOST_WORKERS),
])  # fmt: skip


class Buffer:
    """The buffer of that name, for any process; `put` is for the one that holds GENERATOR.

    Raises FileNotFoundError when there is none, UserError for what cannot be one of ours.
    """

    def __init__(self, name: str) -> None:
        self.path = FOLDER / f"clt-{name}"
        descriptor = open_own(self.path)
        weakref.finalize(self, os.close, descriptor)  # else a buffer that was removed keeps its memory
        self.locks, size = ByteLocks(descriptor), os.fstat(descriptor).st_size
        memory = mmap.mmap(descriptor, 0) if size > _HEADER.itemsize else bytes(_HEADER.itemsize)
        self.header = np.ndarray((), _HEADER, memory)
        texts = (self.header[name].item().decode("latin-1") for name in ("magic", "tag", "segment", "dtype"))
        (magic, self.tag, self.segment, dtype), sizes = texts, self.header["sizes"].tolist()
        self.blocks, self.block_rows, self.open_blocks, self.shape = *sizes[:3], RowShape(sizes[3], sizes[4], dtype)
        if magic != _MAGIC or dtype not in ITEM_BYTES or size != (plan := _layout(sizes[0], sizes[1], self.shape))[-1]:
            raise UserError(f"{self.path} is not a shuffle buffer of this version: remove it, or set server.name")
        tables, block, first, _ = plan
        found = np.ndarray((), tables, memory)
        self.state, self._progress, self.lines = found["state"], found["progress"], self.header["lines"]
        self._blocks, self._memory = np.ndarray(self.blocks, block, memory, first)["body"], memoryview(memory)
        self._columns = self._blocks["columns"].view(_BITS)
        self._first_row = self._blocks["rows"].ctypes.data - self.header.ctypes.data
        # Of the places in a block; the same for every generator, as they go on with each other's open blocks.
        self._order, self.random = np.random.default_rng(0).permutation(self.block_rows), np.random.default_rng()
        # If all were equally likely, all would be full at the same time, again and again.
        shares = np.linspace(1, 2, self.open_blocks)
        self._shares = shares / shares.sum()
        self.line, self._own = np.zeros((), _LINE), MOST_WORKERS  # this process's, once it has joined
        self._rest, self._refreshes = empty_rows(0, self.shape), int(self.header["refreshes"])  # rest of a block

    @classmethod
    def create(
        cls, name: str, sizes: tuple[int, int, int], shape: RowShape, tag: str = "", mark: tuple[int, ...] = (0, 0, 0)
    ) -> Buffer:
        """An empty buffer of (blocks, rows of a block, open blocks), in place of any other. Raises as `allocate`."""
        assert 0 < sizes[2] <= sizes[0] < 1 << 31, sizes
        tables, _, _, size = _layout(sizes[0], sizes[1], shape)
        begin = np.zeros((), tables)
        for key, value in {"magic": _MAGIC, "tag": tag, "segment": secrets.token_hex(8), "dtype": shape.dtype,
                           "sizes": (*sizes, *shape[:2]), "state": "starting"}.items():  # fmt: skip
            begin["header"][key] = value
        begin["progress"]["mark"] = mark
        allocate(FOLDER / f"clt-{name}", size, begin.tobytes())
        return cls(name)

    @property
    def progress(self) -> np.ndarray:
        """A copy of what the generator has done: mark, rows generated, dropped, filled (if open), the last refresh."""
        while True:
            changes = int(self.header["changes"])
            copy = self._progress[changes % 2, ...].copy()
            if changes == self.header["changes"]:  # else it may be half of one change and half of another
                return copy

    @contextlib.contextmanager
    def _change(self) -> Iterator[np.ndarray]:
        """A copy of the progress that takes its place at one stroke, whenever this process may be killed."""
        new = self._progress[(int(self.header["changes"]) + 1) % 2, ...]
        new[...] = self.progress
        yield new
        self.header["changes"] += 1

    def put(self, rows: Any, mark: tuple[int, int, int]) -> int:
        """Put the first of the rows (a slice-able with columns and `copy_into`), each into an open block at random.

        Returns how many, 0 when the buffer is full. They count once `mark` is recorded, with their number added to its
        last entry.
        """
        if len(opened := self._opened()) == 0:
            return 0
        filled = (before := self.progress)["filled"][opened]
        most = self.open_blocks * max(2, self.block_rows // 8)  # each call costs as much as many small rows
        wanted = self.random.multinomial(min(len(rows), most), self._shares)
        counts = np.minimum(wanted, self.block_rows - filled)
        n = int(counts.sum())
        mix, first = self.random.permutation(n), np.cumsum(counts) - counts
        block = np.repeat(opened, counts)[mix]
        place = self._order[(np.repeat(filled - first, counts) + np.arange(n))[mix]]
        part, columns, size = rows[:n], np.empty(n, _COLUMNS), self.shape.row_bytes
        at = self._first_row + block * self._blocks.strides[0] + place * size
        part.copy_into([self._memory[start : start + size] for start in at.tolist()])
        for name in ("token", "position", "document"):
            columns[name] = getattr(part, name)
        columns["row"] = before["generated"] + np.arange(n)
        self._columns[block, place] = columns.view(_BITS)
        with self._change() as new:
            new["mark"], new["generated"] = (mark[0], mark[1], mark[2] + n), new["generated"] + n
            new["filled"][opened] += counts
        if new["refreshed"] == self.header["refreshes"]:  # else the next call drops them
            self.state[opened[filled + counts == self.block_rows]] = FULL
        return n

    def room(self) -> int:
        """How many blocks are free; 0 while `put` lacks blocks to open."""
        missing, free = self.open_blocks - int((self.state == OPEN).sum()), int((self.state == FREE).sum())
        return free if free >= missing else 0

    def _opened(self) -> np.ndarray:
        """The open blocks, always as many as the header says: with fewer, neighbours in the text would lie together."""
        opened, free = np.flatnonzero(self.state == OPEN), np.flatnonzero(self.state == FREE)
        with self._change() as new:
            if new["refreshed"] != (refreshes := int(self.header["refreshes"])):
                new["dropped"] += new["filled"][opened].sum()
                new["filled"][opened], new["refreshed"] = 0, refreshes
            done = new["filled"][opened] == self.block_rows  # a generator was killed before it said so
            free = free[: self.open_blocks - int((~done).sum())]
            new["filled"][free] = 0
        self.state[opened[done]] = FULL
        opened = opened[~done]
        if len(opened) + len(free) < self.open_blocks:
            return opened[:0]
        self.state[free] = OPEN
        return np.concatenate([opened, free])

    def say(self, state: str, cause: str = "", pid: int = 0) -> None:
        """Record what the generator does (starting, running, failed) and, when it failed, why."""
        self.header["cause"], self.header["pid"], self.header["state"] = cause.encode()[:1024], pid, state.encode()

    def draw(self, n: int) -> list[RawRows] | None:
        """n rows, at most a block, that nobody else gets; None while there are none."""
        if self._refreshes != self.header["refreshes"]:
            self._count("dropped", len(self._rest["row"]))
            self._rest, self._refreshes = cut(self._rest, 0, 0), int(self.header["refreshes"])
        parts = [self._rest] if len(self._rest["row"]) else []
        if len(self._rest["row"]) < n:
            if (block := self._claim()) is None:
                return None
            parts.append(self._copy(block))
            self._free(block, "held")
        missing = n - sum(len(part["row"]) for part in parts[:-1])
        self._rest = cut(parts[-1], missing, self.block_rows)
        self._count("drawn", n)
        return [*parts[:-1], cut(parts[-1], 0, missing)]

    def _count(self, what: str, n: int) -> None:
        self.line["held"] -= n
        self.line[what] += n

    def _copy(self, block: int) -> RawRows:
        source = self._blocks[block : block + 1]
        copy = page_aligned(source.nbytes)  # as a block is
        np.copyto(copy, source.view("u1"))
        (columns, rows) = copy.view(source.dtype)[0]
        return {**{name: columns[name] for name in COLUMNS}, "rows": rows}

    def _claim(self) -> int | None:
        """A random full block, locked; those that others have locked are left to them."""
        full = np.flatnonzero(self.state == FULL)
        start = self.random.integers(len(full)) if len(full) else 0
        for at in range(len(full)):
            if self.locks.hold(block := int(full[(start + at) % len(full)])):
                if self.state[block] == FULL:
                    return block
                self.locks.drop(block)
        return None

    def _free(self, block: int, count: str) -> None:
        self.line[count] += self.block_rows
        self.state[block] = FREE
        self.locks.drop(block)

    def refresh(self) -> int:
        """Drop all rows; returns how many. Generator and serving processes drop theirs before they go on."""
        dropped = int(self.progress["filled"][self.state == OPEN].sum())
        self.header["refreshes"] += 1
        while (block := self._claim()) is not None:
            self._free(block, "dropped")
            dropped += self.block_rows
        return dropped

    def removed(self) -> bool:
        """Whether the file has gone, or another has taken its name."""
        return os.fstat(self.locks.descriptor).st_nlink == 0

    def join(self) -> None:
        """Take a line among the serving processes. Raises UserError when there is none."""
        for number in range(MOST_WORKERS):
            if self.locks.hold(_LINES + number):
                self._own, self.line = number, self.lines[number]  # the counts of a dead one go on
                self.line["clients"] = self.line["held"] = 0
                return
        raise UserError(f"the shared buffer serves {MOST_WORKERS} processes already: lower server.workers")

    def leave(self) -> None:
        """Give the line back, where it has one."""
        self.locks.drop(_LINES + self._own)
        self._own = MOST_WORKERS

    def living(self) -> np.ndarray:
        """The lines of the serving processes that live, as they are now."""
        return self.lines[[i for i in range(MOST_WORKERS) if i == self._own or self.locks.taken(_LINES + i)]]

    def stats(self) -> dict[str, Any]:
        """What is worth knowing. rows_generated = valid + open + in_flight + rows_drawn + rows_dropped + rows_lost."""
        done = self.progress  # taken first: a row that moves meanwhile is counted twice, never as lost
        full, lines, living = int((self.state == FULL).sum()), self.lines.copy(), self.living()
        generated, history = int(done["generated"]), self.header["history"]
        rows = {
            "valid": full * self.block_rows, "open": int(done["filled"][self.state == OPEN].sum()),
            "in_flight": int(living["held"].sum()), "rows_drawn": int(lines["drawn"].sum()),
            "rows_dropped": int(lines["dropped"].sum() + done["dropped"]),
        }  # fmt: skip
        return {
            **rows, "rows_generated": generated, "rows_lost": max(0, generated - sum(rows.values())),
            "bytes_drawn": rows["rows_drawn"] * self.shape.row_bytes, "rows": self.blocks * self.block_rows,
            "block_rows": self.block_rows, "fill": min(1.0, full / (self.blocks - self.open_blocks + 1)),
            "segment": self.segment, "clients": int(living["clients"].sum()), "workers": len(living),
            "generator": self.generator(), "history": history[history[:, 0] > 0].tolist(),
        }  # fmt: skip

    def generator(self) -> dict[str, Any]:
        """The generator: {state: starting|running|failed, cause, pid, restarts}."""
        texts = {name: self.header[name].item().decode(errors="replace") for name in ("state", "cause")}
        return {**texts, "pid": int(self.header["pid"]), "restarts": int(self.header["restarts"])}


def _layout(blocks: int, block_rows: int, shape: RowShape) -> tuple[np.dtype, np.dtype, int, int]:
    """The dtypes of the header and of a block, both padded to whole pages; the first block's offset; its size."""
    numbers = [(name, "i8") for name in ("generated", "dropped", "refreshed")]
    progress = [("mark", "i8", 3), *numbers, ("filled", "i8", blocks)]
    tables = np.dtype([("header", _HEADER), ("progress", progress, 2), ("state", "i4", blocks)])
    formats = [np.dtype((_COLUMNS, block_rows)), np.dtype(("u1", (block_rows, shape.row_bytes)))]
    first, at = (-(-dtype.itemsize // mmap.PAGESIZE) * mmap.PAGESIZE for dtype in (tables, formats[0]))
    body = np.dtype({"names": ["columns", "rows"], "formats": formats, "offsets": [0, at]})
    size = -(-body.itemsize // mmap.PAGESIZE) * mmap.PAGESIZE
    block = np.dtype({"names": ["body"], "formats": [body], "itemsize": size})
    return tables, block, first, first + blocks * size
