"""Batches of activations on the training device, read ahead by background threads."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
import weakref
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from types import TracebackType
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from clt.data.index import StoreIndex

_CLOSE_SECONDS = 10.0


class Readable(Protocol):
    """Where rows come from: a DiscBuffer, or a server."""

    index: StoreIndex
    threads: int
    """How many threads may call `read` at once; one alone calls it in the order of the batches."""

    def read(self, rows: np.ndarray, out: Tensor) -> Tensor:
        """Rows (n,) -> (n, 2, L, D), into `out`."""
        ...


@dataclass
class _Slot:
    """A host buffer of the ring, for the `rows` that are read into it."""

    buffer: Tensor
    rows: np.ndarray
    done: queue.SimpleQueue[BaseException | None] = field(default_factory=queue.SimpleQueue)
    """Filled once for each batch: what went wrong, or None when the rows are there"""
    copied: torch.cuda.Event | None = None
    """After which the last copy to the device is over"""


class Loader:
    """Iterates over the batches (b, 2, L, D) that `sampler` names, in storage dtype, on `device`.

    Threads read up to `prefetch` batches ahead into a ring of host buffers. On the CPU a batch *is* such a buffer
    and valid until the next one is asked for: clone it to keep it. On CUDA it is a fresh tensor, copied from pinned
    memory on a stream of its own. Errors of the sampler and of the threads are raised by the iteration, when it comes
    to their batch. Close it (or use `with`) to end the threads.
    """

    stalled: float
    """Seconds that the consumer has waited for batches so far."""
    failure: BaseException | None = None
    """What the next batch will raise, once it is `ready`."""

    def __init__(
        self, buffer: Readable, sampler: Iterable[np.ndarray], device: torch.device | str = "cpu", prefetch: int = 4
    ) -> None:
        self.device = torch.device(device)
        self.stalled = 0.0
        self._stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self._sampler = iter(sampler)
        self._end: BaseException | None = None  # what is raised when no batch is left
        self._held: _Slot | None = None
        self._reading: deque[_Slot] = deque()  # in the order of the batches
        self._work: queue.SimpleQueue[_Slot | None] = queue.SimpleQueue()
        self._threads = [
            threading.Thread(
                target=_read,
                args=(buffer, self._stream and self._stream.device, self._work),
                daemon=True,
                name="clt-reader",
            )
            for _ in range(min(buffer.threads, prefetch))
        ]
        self._stop = weakref.finalize(self, _stop, self._work, len(self._threads))  # also when a loader is forgotten
        for thread in self._threads:
            thread.start()
        for _ in range(prefetch + 1):  # one more than are read ahead: the one that the consumer holds
            self._ask(_Slot(torch.empty(0), np.empty(0, np.int64)))

    def __iter__(self) -> Iterator[Tensor]:
        return self

    def __next__(self) -> Tensor:
        start = time.perf_counter()
        try:
            return self._next()
        finally:
            self.stalled += time.perf_counter() - start

    def ready(self, seconds: float) -> bool:
        """Whether the next batch is there, or `failure` instead; waits that long for it at most."""
        if not self._reading or self.failure is not None:
            return True
        start, slot = time.perf_counter(), self._reading[0]
        try:
            self.failure = slot.done.get(timeout=seconds)
        except queue.Empty:
            return False
        finally:
            self.stalled += time.perf_counter() - start
        slot.done.put(self.failure)
        return True

    def _next(self) -> Tensor:
        if self._held is not None:
            self._ask(self._held)
            self._held = None
        if self._reading:
            slot = self._reading.popleft()
            error = slot.done.get()
            if error is None:
                return self._batch(slot)
            self._end = error
            self._reading.clear()
        assert self._end is not None
        raise self._end

    def _ask(self, slot: _Slot) -> None:
        """Have the slot filled with the sampler's next batch, if there is one."""
        if self._end is not None:
            return
        try:
            slot.rows = next(self._sampler)
        except BaseException as error:  # noqa: BLE001 - raised after the batches before it
            self._end = error
            return
        self._reading.append(slot)
        self._work.put(slot)

    def _batch(self, slot: _Slot) -> Tensor:
        batch = slot.buffer[: len(slot.rows)]
        if self._stream is None:
            self._held = slot
            return batch
        return self._to_device(slot, batch, self._stream)

    def _to_device(self, slot: _Slot, batch: Tensor, stream: torch.cuda.Stream) -> Tensor:
        """Copy while the device still computes the last step; the copy's memory and the slot are guarded by events."""
        with torch.cuda.stream(stream):
            copy = batch.to(self.device, non_blocking=True)
            slot.copied = torch.cuda.Event()
            slot.copied.record(stream)
        consumer = torch.cuda.current_stream(self.device)
        consumer.wait_event(slot.copied)
        copy.record_stream(consumer)
        self._ask(slot)
        return copy

    def close(self) -> None:
        """End the threads and drop the batches that were not consumed.

        A thread that waits for a server that is away is left behind: it ends with the process, or when it gives up.
        """
        self._stop()
        for thread in self._threads:
            thread.join(_CLOSE_SECONDS)
        self._held, self._end = None, StopIteration()
        self._reading.clear()

    def __enter__(self) -> Loader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _stop(work: queue.SimpleQueue[_Slot | None], threads: int) -> None:
    """Leave a None for each thread as all that it finds."""
    with contextlib.suppress(queue.Empty):
        while True:
            work.get_nowait()
    for _ in range(threads):
        work.put(None)


def _read(buffer: Readable, gpu: torch.device | None, work: queue.SimpleQueue[_Slot | None]) -> None:
    """A thread: reads the rows of slot after slot, into memory that is pinned for `gpu`, until it finds None."""
    if gpu is not None:
        torch.cuda.set_device(gpu)  # a thread starts on GPU 0, and to pin memory there would open a context on it
    shape, dtype = (2, buffer.index.n_layers, buffer.index.d_acts), getattr(torch, buffer.index.dtype)
    while (slot := work.get()) is not None:
        try:
            if slot.copied is not None:
                slot.copied.synchronize()
            if len(slot.buffer) < len(slot.rows):
                slot.buffer = torch.empty(len(slot.rows), *shape, dtype=dtype, pin_memory=gpu is not None)
            buffer.read(slot.rows, out=slot.buffer[: len(slot.rows)])
            slot.done.put(None)
        except BaseException as error:  # noqa: BLE001 - raised again by the consumer, in its own thread
            slot.done.put(error)
