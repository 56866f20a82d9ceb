"""The shuffle buffer: blocks of rows in shared memory, filled by one process and taken whole by many.

A block goes FREE -> OPEN -> FULL -> TAKEN -> FREE. The generator scatters each row over the open blocks, so a full
block is a random sample of the last fills. A serving process copies a full block out and frees it at once: no client,
however slow, ever holds shared memory. Every lock is one byte of the file, owned by an open file description: the
kernel releases it when its holder dies, in whatever PID namespace. Nobody waits for one: a block that is locked is left
to its holder, and a taken block that is not locked belonged to a process that died.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import secrets
import stat
import struct
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

from clt.errors import UserError
from clt.memory import check_memory, too_large
from clt.server.wire import COLUMN_BYTES, COLUMNS, ITEM_BYTES, Shape

FREE, OPEN, FULL, TAKEN = range(4)
GENERATOR, LEADER, _LINES = ((1 << 40) + i for i in range(3))
"""Locks beside those of the blocks; serving process i holds _LINES + i while it lives."""
FOLDER = Path("/dev/shm")
_FLOCK = struct.Struct("hhqqi4x")  # struct flock of 64-bit Linux
_MAGIC, _WORKERS, _STATES = b"cltblk01", 128, 16_384
_HEADER = np.dtype([
    ("magic", "S8"), ("tag", "S64"), ("rows_tag", "S64"), ("segment", "S16"), ("dtype", "S16"), ("blocks", "i8"),
    ("block_rows", "i8"), ("open_blocks", "i8"), ("n_layers", "i8"), ("d_acts", "i8"), ("created", "f8"),
    ("generated", "i8"), ("dropped", "i8"), ("refreshes", "i8"), ("refreshed", "i8"), ("mark", "i8", 3),
    ("state", "S16"), ("cause", "S1024"), ("pid", "i8"), ("restarts", "i8"),
])  # fmt: skip
_LINE = np.dtype([(name, "i8") for name in ("clients", "held", "drawn", "dropped", "served_rows", "served_bytes")])


class Buffer:
    """`create` or `attach`. `put` is the generator's alone, who holds GENERATOR; all else is anybody's."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path, self._fd, self._thread = path, descriptor, threading.Lock()
        size = os.fstat(descriptor).st_size
        self._memory = memory = mmap.mmap(descriptor, 0) if size >= _STATES else bytes(_STATES)
        self.header = h = np.ndarray((), _HEADER, memory)
        names = ("blocks", "block_rows", "open_blocks", "n_layers", "d_acts")
        blocks, n, self.open_blocks, n_layers, d_acts = (int(h[name]) for name in names)
        self.dtype, self.segment, self.tag = (h[name].item().decode("latin-1") for name in ("dtype", "segment", "tag"))
        self.shape, known = Shape(n_layers, d_acts, self.dtype), h["magic"] == _MAGIC and self.dtype in ITEM_BYTES
        if not known or size != _first_block(blocks) + blocks * _stride(n, self.shape.row_bytes):
            raise UserError(f"{path} is not a shuffle buffer of this version: remove it, or set another server.name")
        self.blocks, self.block_rows, self.rows, self.row_bytes = blocks, n, blocks * n, self.shape.row_bytes
        self.lines = np.ndarray(_WORKERS, _LINE, memory, mmap.PAGESIZE)
        self.line, self.own = np.zeros((), _LINE), None  # this process's, once it has joined
        self.state = np.ndarray(blocks, "u1", memory, _STATES)
        self.filled = np.ndarray(blocks, "i4", memory, _STATES + -(-blocks // 64) * 64)
        at, self._stride = _first_block(blocks), _stride(n, self.row_bytes)
        self._bodies = np.ndarray((blocks, n * (COLUMN_BYTES + self.row_bytes)), "u1", memory, at, (self._stride, 1))
        self._columns: dict[str, np.ndarray] = {}
        for name, kind in COLUMNS.items():  # in each block one after the other, as on the wire
            self._columns[name] = np.ndarray((blocks, n), kind, memory, at, (self._stride, int(kind[-1])))
            at += n * int(kind[-1])
        self._rows_at, self._weights, self.random = at, None, np.random.default_rng()
        # Of the places in a block; the same for every generator, as they go on with each other's open blocks.
        self._order = np.random.default_rng(0).permutation(n)

    @classmethod
    def create(
        cls, name: str, blocks: int, block_rows: int, open_blocks: int, shape: tuple[int, int, str],
        tags: tuple[str, str] = ("", ""), mark: tuple[int, int, int] = (0, 0, 0),
    ) -> Buffer:  # fmt: skip
        """An empty buffer, in the place of any other of that name; its rows come from behind `mark` in the text.

        Raises UserError when the memory is not there or something else has the name.
        """
        assert 0 < open_blocks <= blocks < 1 << 31, (open_blocks, blocks)
        texts = (_MAGIC, tags[0].encode(), tags[1].encode(), secrets.token_hex(8).encode(), shape[2].encode())
        numbers = (blocks, block_rows, open_blocks, shape[0], shape[1], time.time(), 0, 0, 0, 0, mark)
        header = np.array((*texts, *numbers, b"starting", b"", 0, 0), _HEADER).tobytes()
        path, partial = FOLDER / f"clt-{name}", FOLDER / f"clt-{name}.partial"
        with contextlib.suppress(FileNotFoundError):
            os.close(_open(path))  # what cannot be ours is told, not replaced
        size = _first_block(blocks) + blocks * _stride(block_rows, Shape(*shape).row_bytes)
        check_memory(size, FOLDER)
        descriptor = _open(partial, os.O_CREAT)
        try:
            os.truncate(descriptor, 0)
            os.posix_fallocate(descriptor, 0, size)  # claimed now: later it would be a SIGBUS
        except OSError as error:
            partial.unlink()
            raise UserError(too_large(size, f"it cannot be allocated ({error.strerror})")) from error
        os.pwrite(descriptor, header, 0)
        os.rename(partial, path)
        return cls(path, descriptor)

    @classmethod
    def attach(cls, name: str) -> Buffer:
        """The buffer of that name. FileNotFoundError when there is none, UserError for what cannot be one of ours."""
        return cls(FOLDER / f"clt-{name}", _open(FOLDER / f"clt-{name}"))

    def hold(self, at: int) -> bool:
        """Lock a byte; False when another process (or another Buffer) has locked it."""
        with contextlib.suppress(BlockingIOError, PermissionError):  # both mean that
            self._lock(fcntl.F_OFD_SETLK, fcntl.F_WRLCK, at)
            return True
        return False

    def drop(self, at: int) -> None:
        """Unlock a byte."""
        self._lock(fcntl.F_OFD_SETLK, fcntl.F_UNLCK, at)

    def held(self, at: int) -> bool:
        """Whether another has locked a byte."""
        return self._lock(fcntl.F_OFD_GETLK, fcntl.F_WRLCK, at) != fcntl.F_UNLCK

    def _lock(self, command: int, kind: int, at: int) -> int:
        return _FLOCK.unpack(fcntl.fcntl(self._fd, command, _FLOCK.pack(kind, os.SEEK_SET, at, 1, 0)))[0]

    def put(self, rows: Any, mark: tuple[int, int, int]) -> int:
        """Scatter rows (a slice-able with columns and `copy_into`) over the open blocks; returns how many of them.

        That is not all where a block got full, and 0 where the buffer is. `mark`, with that many added to its last
        number, is recorded before they count: a generator killed in between loses these rows, and none comes twice.
        """
        if len(opened := self._opened()) == 0:
            return 0
        block = self._choose(opened, min(len(rows), self.block_rows))
        order = np.argsort(block, kind="stable")
        first = np.flatnonzero(np.diff(block[order], prepend=-1))
        rank = np.empty_like(order)  # how many rows before it go to the same block
        rank[order] = np.arange(len(block)) - np.repeat(first, np.diff(first, append=len(block)))
        place = self.filled[block] + rank
        over = np.flatnonzero(place >= self.block_rows)
        n = int(over[0]) if len(over) else len(block)
        block, place, part = block[:n], self._order[place[:n]], rows[:n]
        memory, at = memoryview(self._memory), self._rows_at + block * self._stride + place * self.row_bytes
        part.copy_into([memory[start : start + self.row_bytes] for start in at.tolist()])
        number = int(self.header["generated"])
        for name in ("token", "position", "document"):
            self._columns[name][block, place] = getattr(part, name)
        self._columns["row"][block, place] = np.arange(number, number + n)
        self.header["mark"], self.header["generated"] = (mark[0], mark[1], mark[2] + n), number + n
        np.add.at(self.filled, block, 1)
        full = opened[self.filled[opened] == self.block_rows]
        if len(full) and self.header["refreshed"] == self.header["refreshes"]:  # else the next call drops them
            self._weights, self.state[full] = None, FULL
        return n

    def _opened(self) -> np.ndarray:
        """The open blocks, always as many as the header says: with fewer, neighbours in the text would lie together."""
        opened = np.flatnonzero(self.state == OPEN)
        if self.header["refreshed"] != self.header["refreshes"]:
            self.header["dropped"] += int(self.filled[opened].sum())
            self.filled[opened], self.header["refreshed"] = 0, self.header["refreshes"]
        if (missing := self.open_blocks - len(opened)) > 0:
            free = np.flatnonzero(self.state == FREE)[:missing]
            if len(free) < missing:
                self.reclaim()
                return free[:0]
            self.filled[free], self.state[free] = 0, OPEN
            opened = np.concatenate([opened, free])
        if not self.filled[opened].any():
            self._weights = np.cumsum(np.arange(1.0, len(opened) + 1))
        return opened

    def _choose(self, opened: np.ndarray, n: int) -> np.ndarray:
        """n of the open blocks; at first with weights, or all would be full at the same time, again and again."""
        if self._weights is None or len(self._weights) != len(opened):
            return opened[self.random.integers(len(opened), size=n)]
        return opened[np.searchsorted(self._weights, self.random.random(n) * self._weights[-1], "right")]

    def reclaim(self) -> None:
        """Free the blocks of processes that died while they copied them; the generator's, too."""
        for block in np.flatnonzero(self.state == TAKEN).tolist():
            if self.hold(block):
                self.state[block] = FREE if self.state[block] == TAKEN else self.state[block]
                self.drop(block)

    def say(self, state: str, cause: str = "", pid: int = 0) -> None:
        """Record what the generator does (starting, running, failed) and, when it failed, why."""
        self.header["cause"], self.header["pid"], self.header["state"] = cause.encode()[:1024], pid, state.encode()

    @property
    def ready(self) -> bool:
        """Whether a full block is there."""
        return bool((self.state == FULL).any())

    def take(self) -> np.ndarray | None:
        """The body of a full block, chosen at random (bytes,) uint8; None when there is none."""
        with self._thread:
            if (block := self._claim()) is None:
                return None
            try:
                self.state[block] = TAKEN
                body = _aligned(self._bodies.shape[1])
                np.copyto(body, self._bodies[block])
                self.line["held"] += self.block_rows
            finally:
                self.state[block] = FREE
                self.drop(block)
        return body

    def _claim(self) -> int | None:
        """A random full block, locked."""
        for block in self.random.permutation(np.flatnonzero(self.state == FULL)).tolist():
            if self.hold(block):
                if self.state[block] == FULL:
                    return block
                self.drop(block)
        return None

    def refresh(self) -> int:
        """Drop all rows; returns how many. Those of the open blocks go before the generator writes the next."""
        dropped = int(self.filled[self.state == OPEN].sum())
        self.header["refreshes"] += 1
        with self._thread:
            while (block := self._claim()) is not None:
                self.state[block] = FREE
                self.drop(block)
                self.line["dropped"] += self.block_rows
                dropped += self.block_rows
        return dropped

    def join(self) -> None:
        """Take a line among the serving processes. Raises UserError when there is none."""
        for number in range(_WORKERS):
            if self.hold(_LINES + number):
                self.own, self.line = number, self.lines[number]  # the counts of a dead one go on
                self.line["clients"] = self.line["held"] = 0
                return
        raise UserError(f"the shared buffer serves {_WORKERS} processes already: lower server.workers")

    def leave(self) -> bool:
        """The opposite, where it has joined; whether nobody else is left."""
        if self.own is not None:
            self.line["clients"] = self.line["held"] = 0
            self.drop(_LINES + self.own)
            self.own = None
        return not self.members()

    def remove(self) -> None:
        """Give up the name, unless it stands for another by now; the memory goes when the last process ends."""
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.stat(self.path, follow_symlinks=False), os.fstat(self._fd)):
                self.path.unlink()

    def members(self) -> list[int]:
        """The lines of the other serving processes that live."""
        return [number for number in range(_WORKERS) if number != self.own and self.held(_LINES + number)]

    def clients(self) -> int:
        """How many clients are being served, by all processes that live."""
        counts = enumerate(self.lines["clients"].tolist())
        return sum(n for i, n in counts if n > 0 and (i == self.own or self.held(_LINES + i)))

    def stats(self) -> dict[str, Any]:
        """What is worth knowing. rows_generated = valid + open + in_flight + rows_drawn + rows_dropped + rows_lost."""
        h = self.header.copy()  # first: rows that move on meanwhile are counted twice at worst, and none as lost
        state, filled, lines = self.state.copy(), self.filled.copy(), self.lines.copy()
        living = lines[[*self.members(), *([] if self.own is None else [self.own])]]
        full, opened = int((state == FULL).sum()) * self.block_rows, int(filled[state == OPEN].sum())
        flight = int((state == TAKEN).sum()) * self.block_rows + int(living["held"].sum())
        drawn, dropped, generated = (
            int(lines["drawn"].sum()),
            int(lines["dropped"].sum() + h["dropped"]),
            int(h["generated"]),
        )
        return {
            "segment": self.segment, "rows": self.rows, "block_rows": self.block_rows, "valid": full, "open": opened,
            "fill": min(1.0, full / ((self.blocks - self.open_blocks + 1) * self.block_rows)), "in_flight": flight,
            "rows_generated": generated, "rows_drawn": drawn, "rows_dropped": dropped,
            "rows_lost": max(0, generated - full - opened - flight - drawn - dropped),
            "rows_served": int(lines["served_rows"].sum()), "bytes_served": int(lines["served_bytes"].sum()),
            "clients": int(living["clients"].sum()), "workers": len(living), "created": float(h["created"]),
            "epoch": int(h["mark"][0]), "generator": self.generator(),
        }  # fmt: skip

    def generator(self) -> dict[str, Any]:
        """The generator: {state: starting|running|failed, cause, pid, restarts}."""
        texts = {name: self.header[name].item().decode(errors="replace") for name in ("state", "cause")}
        return {**texts, "pid": int(self.header["pid"]), "restarts": int(self.header["restarts"])}


def _first_block(blocks: int) -> int:
    return -(-(_STATES + -(-blocks // 64) * 64 + 4 * blocks) // mmap.PAGESIZE) * mmap.PAGESIZE


def _stride(block_rows: int, row_bytes: int) -> int:
    return -(-block_rows * (COLUMN_BYTES + row_bytes) // mmap.PAGESIZE) * mmap.PAGESIZE


def _aligned(size: int) -> np.ndarray:
    """Memory that starts a cache line, as a block does: else copies may run at a fifth of the speed (measured)."""
    memory = np.empty(size + 64, np.uint8)
    start = -memory.__array_interface__["data"][0] % 64
    return memory[start : start + size]


def _open(path: Path, flags: int = 0) -> int:
    """A descriptor of a file that is this user's alone; FileNotFoundError when there is none, UserError for others."""
    wanted = "wanted a regular file of this user with mode 600; have it removed, or set another server.name"
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK | flags, 0o600)
    except FileNotFoundError:
        if FOLDER.is_dir():
            raise
        raise UserError(f"this machine has no {FOLDER}: the server needs Linux") from None
    except OSError as error:
        raise UserError(f"{path} cannot be opened as a shared buffer ({error.strerror}); {wanted}") from error
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o077:
        os.close(descriptor)
        raise UserError(f"{path} is {stat.filemode(found.st_mode)} of user {found.st_uid}; {wanted}")
    return descriptor
