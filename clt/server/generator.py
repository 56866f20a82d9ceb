"""The process that fills the shared buffer: rows from the language model, or from a store, endlessly."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from multiprocessing.connection import wait
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from clt.config import Config, ServerConfig
from clt.data.sampler import batch_rows
from clt.data.store import DiscBuffer
from clt.errors import UserError
from clt.lm.forward import Rows, check_finite, forward_text
from clt.memory import keep_freed_memory
from clt.server.buffer import LOCKED_ROWS, SharedBuffer

if TYPE_CHECKING:
    from clt.lm.load import LanguageModel

_FULL_SECONDS = (0.003, 0.12)  # between two looks at a full buffer, at least and at most
_WORTH = 1 / 8  # the share of the buffer that is worth a look: each costs those who read or train beside this process
_STORE_BATCH = 4096  # rows of a store in one entry of the record of what has been put


def run_generator(config: Config, name: str) -> None:
    """Fill the buffer `name` until this process is ended; an error is recorded in the buffer and ends it.

    Goes on where the last generator of this buffer stopped: no row of the text is left out or comes twice.
    """
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(0))  # leave as at the end of a program
    buffer = SharedBuffer.attach(name)
    buffer.set_generator("starting", pid=os.getpid())
    _end_with_parent(buffer)
    torch.set_num_threads(max(torch.get_num_threads() - 1, 1))  # one core is the servers'
    keep_freed_memory()
    try:
        if config.server.source == "store":
            fill(buffer, from_store(config, *buffer.mark[:2]))
        else:
            from transformers.utils.logging import disable_progress_bar

            from clt.lm.load import load_language_model

            disable_progress_bar()  # a log is no place for it, and its semaphore outlives a process that is killed
            lm = load_language_model(
                config.lm, device_for(config.server, buffer.filled, "cpu", torch.cuda.is_available())
            )
            fill(buffer, from_model(config, lm, *buffer.mark[:2]), lm, config.server)
    except UserError as error:
        buffer.set_generator("failed", str(error), os.getpid())
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
    except Exception as error:
        buffer.set_generator("failed", f"{type(error).__name__}: {error}", os.getpid())
        raise


def from_model(
    config: Config, lm: LanguageModel, epoch: int = 0, windows: int = 0
) -> Iterator[tuple[tuple[int, int], Rows]]:
    """((epoch, windows before it), rows) of every batch of the training text, over and over."""
    while True:
        for batch, rows in forward_text(config, "train", lm, windows):
            check_finite(lm, batch, rows)
            yield (epoch, windows), replace(rows, activations=rows.activations.cpu())
            windows += len(batch)
        epoch, windows = epoch + 1, 0


@dataclass
class StoredRows:
    """Rows of a store whose activations have not been read yet: they go from its files straight into the buffer."""

    store: DiscBuffer
    number: np.ndarray
    """(n,) int64"""
    token: np.ndarray
    """(n,) int32"""
    position: np.ndarray
    """(n,) int32"""
    document: np.ndarray
    """(n,) int64"""

    def __len__(self) -> int:
        return len(self.number)

    def __getitem__(self, part: slice) -> StoredRows:
        columns = (self.token[part], self.position[part], self.document[part])
        return StoredRows(self.store, self.number[part], *columns)

    def copy_into(self, views: list[memoryview]) -> None:
        """The bytes of each row."""
        self.store.read_into(self.number, views)


def from_store(config: Config, epoch: int = 0, step: int = 0) -> Iterator[tuple[tuple[int, int], StoredRows]]:
    """((epoch, step), rows) of every batch of the training store, its blocks in an order that `run.seed` determines."""
    store = DiscBuffer(Path(config.data.store) / "train")
    batch = min(_STORE_BATCH, len(store))
    while True:
        at = batch_rows(len(store), config.data.block_rows, batch, config.run.seed, step)
        columns = (store.tokens(at), store.positions(at), store.documents(at))
        yield (step * batch // len(store), step), StoredRows(store, at, *columns)
        step += 1


def fill(
    buffer: SharedBuffer,
    batches: Iterator[tuple[tuple[int, int], Rows | StoredRows]],
    lm: LanguageModel | None = None,
    config: ServerConfig | None = None,
) -> None:
    """Put batches into the buffer as there is room, from its mark on; `lm` changes devices as the buffer fills."""
    skip = buffer.mark[2]  # rows of the first batch that are in the buffer already
    pause, since = _FULL_SECONDS[0], 0  # since: rows put since the last pause
    buffer.set_generator("running", pid=os.getpid())
    for (epoch, position), rows in batches:
        done, skip = skip, 0
        while done < len(rows):
            wanted = min(len(rows) - done, LOCKED_ROWS)
            written = buffer.put(rows[done : done + wanted], (epoch, position, done))
            done, since = done + written, since + written
            if written < wanted:  # full
                _move(buffer, lm, config)
                shortest, longest = _FULL_SECONDS
                pause = min(2 * pause, longest) if since < _WORTH * buffer.rows else max(pause / 4, shortest)
                since = 0
                time.sleep(pause)
        _move(buffer, lm, config)


def _move(buffer: SharedBuffer, lm: LanguageModel | None, config: ServerConfig | None) -> None:
    if lm is None or config is None:
        return
    device = device_for(config, buffer.filled, lm.device.type, torch.cuda.is_available())
    if device != lm.device.type:
        lm.model.to(device)  # type: ignore[arg-type]
        torch.cuda.empty_cache()


def device_for(config: ServerConfig, filled: float, current: str, has_gpu: bool) -> str:
    """Where the language model should run: `cpu` or `cuda`. `filled` is the share of the buffer that is not free.

    `auto-low` takes the GPU below `config.low` and gives it back when the buffer is full. Without one it is the CPU.
    """
    if config.device == "cpu" or not has_gpu:
        return "cpu"
    if config.device == "gpu" or filled < config.low:
        return "cuda"
    return "cpu" if filled >= 1 else current


def _end_with_parent(buffer: SharedBuffer) -> None:
    """When the supervisor dies, nobody is left to watch over this process and to remove the segment."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        wait([parent.sentinel])
        buffer.unlink()
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name="clt-watch").start()
