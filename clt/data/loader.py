"""Batches of activations on the training device, read ahead by background threads."""

from __future__ import annotations

import concurrent.futures
import contextlib
import queue
import threading
import time
import weakref
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from clt.data.index import StoreIndex
from clt.data.spec import DataConfig

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
    """A host buffer of the ring, and the batch that is read into it."""

    buffer: Tensor = field(default_factory=lambda: torch.empty(0))
    rows: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    read: Future[None] = field(default_factory=Future)
    copied: torch.Event | None = None  # after the last copy to the device


class Loader(Iterator[Tensor]):
    """Iterates over the batches (b, 2, L, D) that `sampler` names, in storage dtype, on `device`.

    Threads read up to `prefetch` batches ahead into a ring of host buffers. On the CPU a batch *is* such a buffer
    and valid until the next one is asked for: clone it to keep it. On CUDA it is a fresh tensor, copied from pinned
    memory on a separate stream. An error of the sampler or of a thread is raised instead of its batch.
    Close it (or use `with`) to end the threads.
    """

    stalled = 0.0
    """Seconds that the consumer has waited for batches so far."""
    failure: BaseException | None = None
    """What the next batch will raise, once it is `ready`; the end of the sampler is none."""

    def __init__(
        self,
        buffer: Readable,
        sampler: Iterable[np.ndarray],
        device: torch.device | str = "cpu",
        prefetch: int = DataConfig.prefetch,
    ) -> None:
        self.device = torch.device(device)
        self._stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self._sampler = iter(sampler)
        self._held: _Slot | None = None  # the consumer's
        self._ahead: deque[_Slot] = deque()  # in the order of the batches
        self._work: queue.SimpleQueue[_Slot | None] = queue.SimpleQueue()
        arguments = (buffer, self._stream and self._stream.device, self._work)
        self._threads = [
            threading.Thread(target=_read, args=arguments, daemon=True, name="clt-reader")
            for _ in range(min(buffer.threads, prefetch))
        ]
        self._stop = weakref.finalize(self, _stop, self._work, len(self._threads))  # also when a loader is forgotten
        for thread in self._threads:
            thread.start()
        for _ in range(prefetch + 1):  # one more than are read ahead: the one that the consumer holds
            self._fill(_Slot())

    def __next__(self) -> Tensor:
        start = time.perf_counter()
        if self._held is not None:
            self._fill(self._held)
            self._held = None
        if not self._ahead:
            raise StopIteration  # closed
        self._ahead[0].read.result()  # a slot that failed stays first: the next call raises the same error
        slot = self._held = self._ahead.popleft()
        batch = slot.buffer[: len(slot.rows)]
        if self._stream is not None:  # copies while the device still computes the last step
            with torch.cuda.stream(self._stream):
                batch = batch.to(self.device, non_blocking=True)
            slot.copied = self._stream.record_event()
            consumer = torch.cuda.current_stream(self.device)
            consumer.wait_event(slot.copied)
            batch.record_stream(consumer)  # its memory belongs to the copying stream
        self.stalled += time.perf_counter() - start
        return batch

    def ready(self, seconds: float) -> bool:
        """Whether the next batch is there, or `failure` instead; waits that long for it at most."""
        start = time.perf_counter()
        try:
            error = self._ahead[0].read.exception(seconds)
            self.failure = None if isinstance(error, StopIteration) else error
        except concurrent.futures.TimeoutError:
            return False
        finally:
            self.stalled += time.perf_counter() - start
        return True

    def _fill(self, slot: _Slot) -> None:
        """Have the slot filled with the sampler's next batch, or with what the sampler raises instead."""
        slot.read = Future()
        self._ahead.append(slot)
        try:
            slot.rows = next(self._sampler)
        except Exception as error:  # noqa: BLE001 - raised after the batches before it
            slot.read.set_exception(error)
        else:
            self._work.put(slot)

    def close(self) -> None:
        """End the threads and drop the batches that were not consumed.

        A thread that waits for a server that is away is left behind: it ends with the process, or when it gives up.
        """
        self._stop()
        for thread in self._threads:
            thread.join(_CLOSE_SECONDS)
        self._held = None
        self._ahead.clear()

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
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
            slot.read.set_result(None)
        except BaseException as error:  # noqa: BLE001 - whatever it is, or the consumer would wait for ever
            slot.read.set_exception(error)
