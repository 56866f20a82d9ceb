"""Batches of activations on the training device, read ahead by one thread."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from clt.data.index import StoreIndex


class Readable(Protocol):
    """Where rows come from: a DiscBuffer, or a server."""

    index: StoreIndex

    def read(self, rows: np.ndarray, out: Tensor) -> Tensor:
        """Rows (n,) -> (n, 2, L, D), into `out`; called by one thread."""
        ...


@dataclass
class _Slot:
    """A host buffer of the ring; `copied` is the CUDA event after which its last copy to the device is over."""

    buffer: Tensor
    rows: int = 0
    copied: torch.cuda.Event | None = None


class Loader:
    """Iterates over the batches (b, 2, L, D) that `sampler` names, in storage dtype, on `device`.

    A thread reads up to `prefetch` batches ahead into a ring of host buffers. On the CPU a batch *is* such a buffer
    and valid until the next one is asked for: clone it to keep it. On CUDA it is a fresh tensor, copied from pinned
    memory on a stream of its own. An error of the thread is raised by the iteration. Close it (or use `with`) to end
    the thread.
    """

    stalled: float
    """Seconds that the consumer has waited for batches so far."""

    def __init__(
        self, buffer: Readable, sampler: Iterable[np.ndarray], device: torch.device | str = "cpu", prefetch: int = 4
    ) -> None:
        self.device = torch.device(device)
        self.stalled = 0.0
        self._stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self._held: _Slot | None = None
        self._free: queue.SimpleQueue[_Slot | None] = queue.SimpleQueue()
        self._ready: queue.SimpleQueue[_Slot | BaseException | None] = queue.SimpleQueue()
        for _ in range(prefetch + 1):  # one more than are ready: the one that the consumer holds
            self._free.put(_Slot(torch.empty(0)))
        pinned = self._stream is not None
        arguments = (buffer, sampler, pinned, self._free, self._ready)
        self._thread = threading.Thread(target=_read_ahead, args=arguments, daemon=True, name="clt-reader")
        self._stop = weakref.finalize(self, _stop, self._free)  # a forgotten loader ends its thread as well
        self._thread.start()

    def __iter__(self) -> Iterator[Tensor]:
        return self

    def __next__(self) -> Tensor:
        if self._held is not None:
            self._free.put(self._held)
            self._held = None
        start = time.perf_counter()
        slot = self._ready.get()
        self.stalled += time.perf_counter() - start
        if not isinstance(slot, _Slot):
            self._ready.put(slot)  # whoever asks again hears the same
            if slot is None:
                raise StopIteration
            raise slot
        batch = slot.buffer[: slot.rows]
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
        self._free.put(slot)
        return copy

    def close(self) -> None:
        """End and join the reader thread. Batches that were not consumed are dropped."""
        self._stop()
        self._thread.join()
        self._ready = queue.SimpleQueue()
        self._ready.put(None)

    def __enter__(self) -> Loader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _stop(free: queue.SimpleQueue[_Slot | None]) -> None:
    """Leave None as the only thing that the reader finds."""
    with contextlib.suppress(queue.Empty):
        while True:
            free.get_nowait()
    free.put(None)


def _read_ahead(
    buffer: Readable,
    sampler: Iterable[np.ndarray],
    pinned: bool,
    free: queue.SimpleQueue[_Slot | None],
    ready: queue.SimpleQueue[_Slot | BaseException | None],
) -> None:
    """The reader thread: fills free slots in the sampler's order until the sampler ends or None is among the slots."""
    shape, dtype = (2, buffer.index.n_layers, buffer.index.d_acts), getattr(torch, buffer.index.dtype)
    try:
        for rows in sampler:
            slot = free.get()
            if slot is None:
                return
            if slot.copied is not None:
                slot.copied.synchronize()
            if len(slot.buffer) < len(rows):
                slot.buffer = torch.empty(len(rows), *shape, dtype=dtype, pin_memory=pinned)
            buffer.read(rows, out=slot.buffer[: len(rows)])
            slot.rows = len(rows)
            ready.put(slot)
        ready.put(None)
    except BaseException as error:  # noqa: BLE001 - raised again by the consumer, in its own thread
        ready.put(error)
