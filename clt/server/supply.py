"""The shared buffer as a serving process sees it: rows waited for, held while they are sent, and counted."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any, NamedTuple, TypeVar

import numpy as np

from clt.config import Config
from clt.errors import UserError
from clt.server.buffer import SLOW_SHARE, Batch, SharedBuffer
from clt.server.responses import ClientGone
from clt.server.supervisor import ensure

T = TypeVar("T")
log = logging.getLogger("uvicorn.error")
_POLL = (0.002, 0.05)  # seconds between two looks at a buffer that is too empty: the first, and at most
_HOLD_SECONDS = 1.0
_SAMPLE_SECONDS = 2.0
_SAMPLES = 300


class Unavailable(Exception):
    """There are no rows, and why; `retry_after` seconds later there may be some."""

    def __init__(self, reason: str, retry_after: int) -> None:
        super().__init__(reason)
        self.retry_after = retry_after


class Drawn:
    """n rows that were drawn for a client, and are copied out of the shared buffer as they are sent.

    Where that takes longer than _HOLD_SECONDS, the rest is copied: who reads slowly, or not at all, must not keep the
    slots from the generator. `held` has all of a process that are not released, with the bytes that were copied, or
    `reserved` for it. Where none were and there is no room for more, the slots are kept, for `seconds` at most and not
    when that holds up others: then the client is given up.
    """

    slow = False
    """Whether it took longer."""

    def __init__(
        self, buffer: SharedBuffer, slots: np.ndarray, held: dict[object, int], reserved: int, seconds: float
    ) -> None:
        self.buffer, self.columns = buffer, buffer.columns(slots)
        self._n, self._next, self._held, self._end = len(slots), 0, held, time.monotonic() + seconds
        self._slots: np.ndarray | None = slots  # None when they have been given back
        self._own: memoryview | None = None  # the rows from `_next` on, when they have been copied
        self._timer = asyncio.get_running_loop().call_later(_HOLD_SECONDS, self.detach)
        held[self] = reserved

    def __len__(self) -> int:
        return self._n

    def copy(self, rows: slice, out: memoryview) -> None:
        """The bytes of the next rows, into `out`; ClientGone when the client was given up."""
        if self._slots is not None:
            self.buffer.copy(self._slots[rows], out)
            self._next = rows.stop
        elif self._own is not None:
            size = self.buffer.row_bytes
            out[:] = self._own[(rows.start - self._next) * size : (rows.stop - self._next) * size]
        else:
            raise ClientGone(f"it reads too slowly for its {self._n} rows, and others took the memory to wait for it")

    def detach(self, at_once: bool = False) -> None:
        """Go on without the buffer, as soon as there is room for the rest of the rows or `at_once`."""
        if self._slots is None:
            return
        self.slow = True
        rest = self._slots[self._next :]
        size = len(rest) * self.buffer.row_bytes
        if at_once or self._held[self] or _fits(self._held, size, self.buffer):
            self._own = np.empty(size, np.uint8).data
            self.buffer.copy(rest, self._own)
            self._held[self] = size
        elif time.monotonic() < self._end and not self.buffer.held_up(self._n):
            self._timer = asyncio.get_running_loop().call_later(_HOLD_SECONDS, self.detach)
            return
        self._give_back()

    def release(self) -> None:
        """The rows are not needed any more; may be called again."""
        self._give_back()
        self._own = None
        self._held.pop(self, None)

    def _give_back(self) -> None:
        if self._slots is not None:
            self._timer.cancel()
            self.buffer.release(self._slots)
            self._slots = None


class Own(NamedTuple):
    """A batch in memory of its own; call `release` when it is not needed any more."""

    batch: Batch
    buffer: SharedBuffer
    """Where it came from."""
    release: Callable[[], object]


def _fits(held: dict[object, int], size: int, buffer: SharedBuffer) -> bool:
    """Whether `size` bytes more may be copied: to SLOW_SHARE of the buffer in all, or one batch."""
    copied = sum(held.values())
    return not copied or copied + size <= SLOW_SHARE * buffer.rows * buffer.row_bytes


class Supply:
    """`open` it first, run `watch` beside, `close` it in the end. All methods are called in the event loop's thread."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.buffer: SharedBuffer
        self._pool = _pool()
        self._clients = 0
        self._held: dict[object, int] = {}  # what clients are sent, and the bytes that were copied for it
        self._samples: deque[tuple[float, int, float]] = deque(maxlen=_SAMPLES)  # time, rows served, fill

    async def open(self) -> None:
        """Find the buffer or start what makes it; UserError as `ensure` raises it."""
        self.buffer = await asyncio.to_thread(ensure, self.config)

    async def close(self) -> None:
        """Wait for the draws under way and leave the buffer."""
        await self._leave(self.buffer, self._pool)

    async def watch(self) -> None:
        """Sample the counters, and look for the next buffer when the owner of this one has died."""
        while True:
            stats = self.buffer.stats()
            self._samples.append((time.monotonic(), stats["rows_served"], stats["fill"]))
            await asyncio.sleep(_SAMPLE_SECONDS)
            if not self.buffer.alive:
                log.error("the supervisor of the shared buffer has died; starting another")
                await self._replace()

    async def _replace(self) -> None:
        try:
            buffer = await asyncio.to_thread(ensure, self.config)
        except (UserError, OSError) as error:  # tried again as long as there is no other
            log.error("%s", error)
            await asyncio.to_thread(self.buffer.give_up)  # it may be what takes the memory
            return
        old, pool, self.buffer, self._pool = self.buffer, self._pool, buffer, _pool()
        buffer.workers.add_clients(self._clients)
        self._samples.clear()
        await self._leave(old, pool)

    async def _leave(self, buffer: SharedBuffer, pool: ThreadPoolExecutor) -> None:
        await asyncio.to_thread(pool.shutdown)  # draws that are under way still use the buffer
        for drawn in [each for each in self._held if isinstance(each, Drawn) and each.buffer is buffer]:
            drawn.detach(at_once=True)  # its slots' memory goes
        buffer.close()

    @contextlib.contextmanager
    def client(self) -> Iterator[None]:
        """Count a client while its rows are drawn and sent; Unavailable when there are `max_streams` already."""
        limit = self.config.server.max_streams
        clients = self.buffer.workers.add_clients(1)
        self._clients += 1
        try:
            if clients > limit:
                raise Unavailable(f"{limit} clients are being served already (server.max_streams)", 1)
            yield
        finally:
            self._clients -= 1
            self.buffer.workers.add_clients(-1)

    async def draw(self, n: int, slow: bool = False) -> Drawn:
        """n drawn rows, to be released; waits for them. Raises Unavailable with the cause.

        For a `slow` client it waits for room to copy them, first: they will not have been sent before they must be.
        """
        size, key = n * self.buffer.row_bytes if slow else 0, object()
        await self._reserve(key, size)

        async def claim(buffer: SharedBuffer) -> Drawn | None:
            slots = buffer.claim(n)
            return None if slots is None else Drawn(buffer, slots, self._held, size, self.config.server.idle_seconds)

        try:
            return await self._wait_for(n, claim)
        finally:
            del self._held[key]

    async def batch(self, n: int, size: int) -> Own:
        """n drawn rows; waits for them, and for `size` bytes of memory to answer with. Raises Unavailable, and why."""
        key = object()
        await self._reserve(key, size)
        release = functools.partial(self._held.pop, key, None)

        async def draw(buffer: SharedBuffer) -> Own | None:
            batch = await self.run(buffer.draw, n)
            return None if batch is None else Own(batch, buffer, release)

        try:
            return await self._wait_for(n, draw)
        except BaseException:
            release()
            raise

    async def _reserve(self, key: object, size: int) -> None:
        """Wait until `size` bytes may be held, and hold them as `key`."""
        seconds = self.config.server.wait_seconds
        end = time.monotonic() + seconds
        while size and not _fits(self._held, size, self.buffer):
            if time.monotonic() > end:
                raise Unavailable(f"clients that read slowly had all the memory for batches for {seconds:g} seconds", 1)
            await asyncio.sleep(_POLL[1])
        self._held[key] = size

    def add_served(self, buffer: SharedBuffer, rows: int, size: int) -> None:
        """Count rows that were sent. The counters of a buffer that has been replaced since are gone."""
        if buffer is self.buffer:
            buffer.add_served(rows, size)

    async def run(self, work: Callable[..., T], *arguments: Any) -> T:
        """`work(*arguments)` in a thread."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, work, *arguments)

    async def _wait_for(self, n: int, draw: Callable[[SharedBuffer], Awaitable[T | None]]) -> T:
        end, pause = time.monotonic() + self.config.server.wait_seconds, _POLL[0]
        while (drawn := await draw(self.buffer)) is None:
            generator = self.buffer.generator()
            if generator["state"] == "failed":
                raise Unavailable(f"the generator of activations failed: {generator['cause']}", 2)
            if generator["state"] == "stopped":
                raise Unavailable("the server is shutting down", 5)
            if time.monotonic() > end:
                raise Unavailable(f"the buffer had no {n} rows for {self.config.server.wait_seconds:g} seconds", 1)
            await asyncio.sleep(pause)
            pause = min(2 * pause, _POLL[1])
        return drawn

    def stats(self) -> dict[str, Any]:
        """The buffer's counters, the rate of serving over the last ten seconds, and a history of rate and fill."""
        now, samples = time.monotonic(), list(self._samples)
        rates = [(round(b[0] - now, 1), (b[1] - a[1]) / (b[0] - a[0]), round(b[2], 4)) for a, b in pairwise(samples)]
        recent = [rate for at, rate, _ in rates if at > -10 - _SAMPLE_SECONDS]
        return {
            **self.buffer.stats(),
            "rows_per_second": sum(recent) / len(recent) if recent else 0.0,
            "history": {"seconds": _column(rates, 0), "rows_per_second": _column(rates, 1), "fill": _column(rates, 2)},
        }


def _column(rows: list[tuple[float, float, float]], i: int) -> list[float]:
    return [row[i] for row in rows]


def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(4, "clt-draw")
