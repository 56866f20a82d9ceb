"""The shuffle buffer: blocks of rows in shared memory, filled by one process and taken whole by many.

A block goes FREE -> OPEN -> FULL -> FREE. The generator scatters each row over the open blocks, so a full block is a
random sample of the last fills. A serving process copies a full block out and frees it at once: no client, however
slow, ever holds shared memory. Every lock is one byte of the file, owned by an open file description: the kernel
releases it when its holder dies, in whatever PID namespace. Nobody waits for one: a locked block is left to its holder,
and a block whose holder dies before it is freed is still full.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import secrets
import stat
import struct
import time
import weakref
from pathlib import Path
from typing import Any

import numpy as np

from clt.errors import UserError
from clt.memory import check_memory, too_large
from clt.server.wire import COLUMNS, ITEM_BYTES, Shape, Slice, count_of

FREE, OPEN, FULL = range(3)
GENERATOR, LEADER, _LINES = ((1 << 40) + i for i in range(3))
"""Locks beside those of the blocks; serving process i holds _LINES + i while it lives."""
FOLDER = Path("/dev/shm")
_FLOCK = struct.Struct("hhqqi4x")  # struct flock of 64-bit Linux
_MAGIC, _WORKERS, _LINES_AT, _STATES_AT = b"cltblk02", 128, 12_288, 16_384
_HEADER = np.dtype([
    ("magic", "S8"), ("tag", "S128"), ("segment", "S16"), ("dtype", "S16"), ("sizes", "i8", 5), ("mark", "i8", 3),
    ("state", "S16"), ("cause", "S1024"), ("pid", "i8"), ("restarts", "i8"), ("generated", "i8"), ("dropped", "i8"),
    ("refreshes", "i8"), ("refreshed", "i8"), ("history", "f8", (300, 3)),
])  # fmt: skip
_LINE = np.dtype([(name, "i8") for name in ("clients", "held", "drawn", "dropped")])
_STATE = np.dtype([("state", "i4"), ("filled", "i4")])
_NOTHING = Slice(np.empty(0, "u1"), 0, 0, 0)


class Buffer:
    """The buffer of that name, for any process; `put` is for the one that holds GENERATOR.

    Raises FileNotFoundError when there is none, UserError for what cannot be one of ours.
    """

    def __init__(self, name: str) -> None:
        self.path = FOLDER / f"clt-{name}"
        self._fd = _open(self.path)
        weakref.finalize(self, os.close, self._fd)  # else a buffer that was removed keeps its memory
        size = os.fstat(self._fd).st_size
        memory = mmap.mmap(self._fd, 0) if size > _STATES_AT else bytes(_STATES_AT)
        self.header = np.ndarray((), _HEADER, memory)
        texts = (self.header[name].item().decode("latin-1") for name in ("magic", "tag", "segment", "dtype"))
        (magic, self.tag, self.segment, dtype), sizes = texts, self.header["sizes"].tolist()
        self.blocks, self.block_rows, self.open_blocks = sizes[:3]
        self.shape = Shape(sizes[3], sizes[4], dtype)
        known = magic == _MAGIC.decode() and dtype in ITEM_BYTES
        if not known or size != _layout(self.blocks, self.block_rows, self.shape)[-1]:
            raise UserError(f"{self.path} is not a shuffle buffer of this version: remove it, or set server.name")
        self.lines = np.ndarray(_WORKERS, _LINE, memory, _LINES_AT)
        states = np.ndarray(self.blocks, _STATE, memory, _STATES_AT)
        self.state, self.filled = states["state"], states["filled"]
        block, first, _ = _layout(self.blocks, self.block_rows, self.shape)
        self._blocks = np.ndarray(self.blocks, block, memory, first)["body"]
        # Of the places in a block; the same for every generator, as they go on with each other's open blocks.
        self._order, self.random = np.random.default_rng(0).permutation(self.block_rows), np.random.default_rng()
        self.line, self._own = np.zeros((), _LINE), _WORKERS  # this process's, once it has joined
        self._rest, self._refreshes = _NOTHING, int(self.header["refreshes"])  # of a block that was not used up

    @classmethod
    def create(
        cls, name: str, blocks: int, block_rows: int, open_blocks: int, shape: Shape, tag: str = "",
        mark: tuple[int, int, int] = (0, 0, 0),
    ) -> Buffer:  # fmt: skip
        """An empty buffer, in the place of any other of that name. Raises UserError when the memory is not there."""
        assert 0 < open_blocks <= blocks < 1 << 31, (open_blocks, blocks)
        texts = (_MAGIC, tag.encode(), secrets.token_hex(8).encode(), shape.dtype.encode())
        sizes = (blocks, block_rows, open_blocks, shape.n_layers, shape.d_acts)
        header = np.array((*texts, sizes, mark, b"starting", b"", 0, 0, 0, 0, 0, 0, 0), _HEADER)
        partial, size = FOLDER / f"clt-{name}.partial", _layout(blocks, block_rows, shape)[-1]
        check_memory(size, FOLDER)
        descriptor = _open(partial, os.O_CREAT)
        try:
            os.truncate(descriptor, 0)
            os.posix_fallocate(descriptor, 0, size)  # claimed now: later it would be a SIGBUS
        except OSError as error:
            partial.unlink()
            raise UserError(too_large(size, f"it cannot be allocated ({error.strerror})")) from error
        os.pwrite(descriptor, header.tobytes(), 0)
        os.close(descriptor)
        os.rename(partial, FOLDER / f"clt-{name}")
        return cls(name)

    def hold(self, at: int) -> bool:
        """Lock a byte; False when another process (or another Buffer) has locked it."""
        with contextlib.suppress(BlockingIOError, PermissionError):  # both mean that
            self._lock(fcntl.F_OFD_SETLK, fcntl.F_WRLCK, at)
            return True
        return False

    def drop(self, at: int) -> None:
        """Unlock a byte."""
        self._lock(fcntl.F_OFD_SETLK, fcntl.F_UNLCK, at)

    def _lock(self, command: int, kind: int, at: int) -> int:
        return _FLOCK.unpack(fcntl.fcntl(self._fd, command, _FLOCK.pack(kind, os.SEEK_SET, at, 1, 0)))[0]

    def put(self, rows: Any, mark: tuple[int, int, int]) -> int:
        """Put the first of the rows (a slice-able with columns and `copy_into`), each into another open block.

        Returns how many; 0 where the buffer is full. `mark`, with that many added to its last number, is recorded
        before they count: a generator killed in between loses these rows, and none comes twice.
        """
        if len(opened := self._opened()) == 0:
            return 0
        # If all were equally likely, all would be full at the same time, again and again.
        weights, n = np.linspace(1, 2, len(opened)), min(len(rows), -(-len(opened) // 2))
        block = self.random.choice(opened, n, replace=False, p=weights / weights.sum())
        place, number, part = self._order[self.filled[block]], int(self.header["generated"]), rows[:n]
        places = self._blocks["rows"]
        part.copy_into([places[at].data for at in zip(block.tolist(), place.tolist())])
        for name in ("token", "position", "document"):
            self._blocks[name][block, place] = getattr(part, name)
        self._blocks["row"][block, place] = np.arange(number, number + n)
        self.header["mark"], self.header["generated"] = (mark[0], mark[1], mark[2] + n), number + n
        self.filled[block] += 1
        if self.header["refreshed"] == self.header["refreshes"]:  # else the next call drops them
            self.state[block[self.filled[block] == self.block_rows]] = FULL
        return n

    def room(self) -> float:
        """The share that is free of the blocks that are not open; 0 while `put` lacks blocks to open."""
        missing, free = self.open_blocks - int((self.state == OPEN).sum()), int((self.state == FREE).sum())
        return free / (self.blocks - self.open_blocks + missing) if free >= missing else 0.0

    def _opened(self) -> np.ndarray:
        """The open blocks, always as many as the header says: with fewer, neighbours in the text would lie together."""
        opened = np.flatnonzero(self.state == OPEN)
        if self.header["refreshed"] != self.header["refreshes"]:
            self.header["dropped"] += int(self.filled[opened].sum())
            self.filled[opened], self.header["refreshed"] = 0, self.header["refreshes"]
        done = self.filled[opened] == self.block_rows  # a generator was killed before it said so
        self.state[opened[done]] = FULL
        opened = opened[~done]
        missing = self.open_blocks - len(opened)
        free = np.flatnonzero(self.state == FREE)[:missing]
        if len(free) < missing:
            return free[:0]
        self.filled[free], self.state[free] = 0, OPEN
        return np.concatenate([opened, free])

    def say(self, state: str, cause: str = "", pid: int = 0) -> None:
        """Record what the generator does (starting, running, failed) and, when it failed, why."""
        self.header["cause"], self.header["pid"], self.header["state"] = cause.encode()[:1024], pid, state.encode()

    def note(self) -> None:
        """Add (second, rows drawn, fill) to the history."""
        found = self.stats()
        self.header["history"][:-1] = self.header["history"][1:]
        self.header["history"][-1] = (time.time(), found["rows_drawn"], found["fill"])

    def draw(self, n: int) -> list[Slice] | None:
        """n rows, at most a block, that nobody else gets; None while there are none."""
        if self._refreshes != self.header["refreshes"]:
            self._count("dropped", self._rest.stop - self._rest.start)
            self._rest, self._refreshes = _NOTHING, int(self.header["refreshes"])
        parts, rest = [], self._rest
        if rest.stop - rest.start < n:
            if (block := self._claim()) is None:
                return None
            parts = [rest] if rest.start < rest.stop else []
            rest = Slice(self._copy(block), self.block_rows, 0, self.block_rows)
            self._free(block, "held")
        cut = rest.start + n - count_of(parts)
        self._rest = rest._replace(start=cut)
        self._count("drawn", n)
        return [*parts, rest._replace(stop=cut)]

    def _count(self, what: str, n: int) -> None:
        self.line["held"] -= n
        self.line[what] += n

    def _copy(self, block: int) -> np.ndarray:
        """Into memory that starts a cache line, as a block does: to other places a copy may take five times as long."""
        source = self._blocks[block : block + 1].view("u1")
        memory = np.empty(len(source) + 64, "u1")
        start = -memory.__array_interface__["data"][0] % 64
        np.copyto(body := memory[start : start + len(source)], source)
        return body

    def _claim(self) -> int | None:
        """A random full block, locked; those that others have locked are left to them."""
        full = np.flatnonzero(self.state == FULL)
        start = self.random.integers(len(full)) if len(full) else 0
        for at in range(len(full)):
            if self.hold(block := int(full[(start + at) % len(full)])):
                if self.state[block] == FULL:
                    return block
                self.drop(block)
        return None

    def _free(self, block: int, count: str) -> None:
        self.line[count] += self.block_rows
        self.state[block] = FREE
        self.drop(block)

    def refresh(self) -> int:
        """Drop all rows; returns how many. Generator and serving processes drop theirs before they go on."""
        dropped = int(self.filled[self.state == OPEN].sum())
        self.header["refreshes"] += 1
        while (block := self._claim()) is not None:
            self._free(block, "dropped")
            dropped += self.block_rows
        return dropped

    def is_current(self) -> bool:
        """Whether the file of that name is still this buffer: another server may have made a new one."""
        with contextlib.suppress(FileNotFoundError):
            return os.path.samestat(os.stat(self.path), os.fstat(self._fd))
        return False

    def join(self) -> None:
        """Take a line among the serving processes. Raises UserError when there is none."""
        for number in range(_WORKERS):
            if self.hold(_LINES + number):
                self._own, self.line = number, self.lines[number]  # the counts of a dead one go on
                self.line["clients"] = self.line["held"] = 0
                return
        raise UserError(f"the shared buffer serves {_WORKERS} processes already: lower server.workers")

    def leave(self) -> None:
        """The opposite, where it has joined."""
        self.drop(_LINES + self._own)
        self._own = _WORKERS

    def living(self) -> np.ndarray:
        """The lines of the serving processes that live, as they are now."""
        held = (self._lock(fcntl.F_OFD_GETLK, fcntl.F_WRLCK, _LINES + i) != fcntl.F_UNLCK for i in range(_WORKERS))
        return self.lines[[i for i, other in enumerate(held) if other or i == self._own]]

    def stats(self) -> dict[str, Any]:
        """What is worth knowing. rows_generated = valid + open + in_flight + rows_drawn + rows_dropped + rows_lost."""
        h = self.header.copy()  # first: rows that move on meanwhile are counted twice at worst, and none as lost
        full, opened = int((self.state == FULL).sum()), int(self.filled[self.state == OPEN].sum())
        lines, living, generated, valid = self.lines.copy(), self.living(), int(h["generated"]), full * self.block_rows
        drawn, dropped = int(lines["drawn"].sum()), int(lines["dropped"].sum() + h["dropped"])
        gone = drawn + dropped + (flight := int(living["held"].sum()))
        return {
            "segment": self.segment, "rows": self.blocks * self.block_rows, "block_rows": self.block_rows,
            "fill": min(1.0, full / (self.blocks - self.open_blocks + 1)), "valid": valid, "open": opened,
            "in_flight": flight, "rows_generated": generated, "rows_drawn": drawn, "rows_dropped": dropped,
            "rows_lost": max(0, generated - valid - opened - gone), "bytes_drawn": drawn * self.shape.row_bytes,
            "clients": int(living["clients"].sum()), "workers": len(living), "generator": self.generator(),
            "history": h["history"][h["history"][:, 0] > 0].tolist(),
        }  # fmt: skip

    def generator(self) -> dict[str, Any]:
        """The generator: {state: starting|running|failed, cause, pid, restarts}."""
        texts = {name: self.header[name].item().decode(errors="replace") for name in ("state", "cause")}
        return {**texts, "pid": int(self.header["pid"]), "restarts": int(self.header["restarts"])}


def _layout(blocks: int, block_rows: int, shape: Shape) -> tuple[np.dtype, int, int]:
    """A block, where the first one starts, and bytes of the file."""
    columns = [(name, kind, block_rows) for name, kind in COLUMNS.items()]  # one after the other, as on the wire
    body = np.dtype([*columns, ("rows", "u1", (block_rows, shape.row_bytes))])
    block = np.dtype({"names": ["body"], "formats": [body], "itemsize": _pages(body.itemsize)})
    first = _pages(_STATES_AT + _STATE.itemsize * blocks)
    return block, first, first + blocks * block.itemsize


def _pages(size: int) -> int:
    return -(-size // mmap.PAGESIZE) * mmap.PAGESIZE


def _open(path: Path, flags: int = 0) -> int:
    """A descriptor of a file that is this user's alone; FileNotFoundError when there is none, UserError for others."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK | flags, 0o600)
        found = os.fstat(descriptor)
        if stat.S_ISREG(found.st_mode) and found.st_uid == os.geteuid() and not found.st_mode & 0o077:
            return descriptor
        os.close(descriptor)
        told = f"is {stat.filemode(found.st_mode)} of user {found.st_uid}"
    except OSError as error:
        if isinstance(error, FileNotFoundError):
            raise
        told = f"cannot be opened ({error.strerror})"  # a link, a directory
    raise UserError(f"{path} {told}; wanted a regular file of this user with mode 600: remove it, or set server.name")
