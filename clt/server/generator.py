"""The process that fills the buffer, and the serving process that keeps it running: whoever holds the leader's lock."""

from __future__ import annotations

import asyncio
import ctypes
import logging
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess

import torch

from clt.config import Config
from clt.data.feed import StoredRows, from_model, from_store
from clt.errors import UserError
from clt.lm.forward import Rows
from clt.memory import keep_freed_memory
from clt.server.buffer import GENERATOR, LEADER, Buffer

log = logging.getLogger("uvicorn.error")
SPAWN = multiprocessing.get_context("spawn")
_TICK = 0.1  # seconds between two looks at the leader's lock, and at the generator
_FULL = (0.003, 0.1)  # seconds between two looks at a full buffer, at least and at most
_DELAYS = (0.5, 60.0)  # seconds before the first and before the slowest restart of the generator
_STEADY = 60.0  # seconds after which a generator counts as having worked
_RECORD = 10.0  # seconds between two records of the place in the text


def fill(buffer: Buffer, batches: Iterator[tuple[tuple[int, int], Rows | StoredRows]]) -> None:
    """Put batches into the buffer as there is room, from its mark on."""
    skip = int(buffer.header["mark"][2])  # rows of the first batch that are in the buffer already
    pause = _FULL[0]
    buffer.say("running", pid=os.getpid())
    for (epoch, position), rows in batches:
        done, skip = skip, 0
        while done < len(rows):
            n = buffer.put(rows[done : done + buffer.block_rows], (epoch, position, done))
            done, pause = done + n, _FULL[0] if n else min(2 * pause, _FULL[1])
            if not n:
                time.sleep(pause)


def device_for(config: Config) -> str:
    """Where the language model runs. Raises UserError for a GPU that is not there."""
    if config.server.device == "gpu" and not torch.cuda.is_available():
        raise UserError("server.device=gpu but no CUDA device is available; set server.device=cpu")
    return "cpu" if config.server.device == "cpu" or not torch.cuda.is_available() else "cuda"


def run(config: Config, name: str) -> None:
    """Fill the buffer `name` until this process is ended, from where its last generator stopped.

    No row of the text is left out or comes twice, but for what a killed generator was just writing. An error is
    recorded in the buffer and ends the process.
    """
    begin_child(os.getppid() if (parent := multiprocessing.parent_process()) is None else parent.pid)
    buffer = Buffer.attach(name)
    buffer.say("starting", pid=os.getpid())
    while not buffer.hold(GENERATOR):  # the last leader's, which the kernel is ending
        time.sleep(_TICK)
    torch.set_num_threads(max(torch.get_num_threads() - 1, 1))  # one core is the servers'
    keep_freed_memory()
    buffer.reclaim()
    epoch, position, _ = buffer.header["mark"].tolist()
    try:
        if config.server.source == "store":
            fill(buffer, from_store(config, epoch, position))
        else:
            from transformers.utils.logging import disable_progress_bar

            from clt.lm.load import load_language_model

            disable_progress_bar()  # a log is no place for it, and its semaphore outlives a process that is killed
            fill(buffer, from_model(config, load_language_model(config.lm, device_for(config)), epoch, position))
    except UserError as error:
        buffer.say("failed", str(error), os.getpid())
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
    except Exception as error:
        buffer.say("failed", f"{type(error).__name__}: {error}", os.getpid())
        raise


async def lead(config: Config, name: str, buffer: Buffer, record: Callable[[], None]) -> None:
    """Once no other serving process does: keep a generator running, restarted with back-off. Ends with its task.

    `record` saves the place in the text; it is called in a thread, as it writes to a disk.
    """
    while not buffer.hold(LEADER):
        await asyncio.sleep(_TICK)
    delay = _DELAYS[0]
    try:
        while True:
            child = SPAWN.Process(target=run, args=(config, name), name="clt-generator", daemon=True)
            child.start()
            born = recorded = time.monotonic()
            try:
                while child.is_alive():
                    await asyncio.sleep(_TICK)
                    if time.monotonic() > recorded + _RECORD:
                        await asyncio.to_thread(record)
                        recorded = time.monotonic()
            finally:
                child.kill()
                child.join()
            buffer.say("failed", cause := _cause(buffer, child), child.pid or 0)
            log.error("the generator ended: %s", cause)
            delay = _DELAYS[0] if time.monotonic() - born > _STEADY else delay
            await asyncio.sleep(delay)
            buffer.header["restarts"] += 1
            delay = min(2 * delay, _DELAYS[1])
    finally:
        buffer.drop(LEADER)


def _cause(buffer: Buffer, child: BaseProcess) -> str:
    """Why the generator ended: what it said itself, else how it was ended."""
    status = child.exitcode or 0
    if buffer.header["state"] == b"failed" and buffer.header["pid"] == child.pid:
        return buffer.header["cause"].item().decode(errors="replace")
    if status < 0:
        hint = "; was there too little memory?" if -status == signal.SIGKILL else ""
        return f"the generator was killed by {signal.Signals(-status).name}{hint}"
    return f"the generator ended with status {status}"


def begin_child(parent: int | None) -> None:
    """In a process that works for `parent`: it ends when that one does, and on SIGINT or SIGTERM, without a word."""
    for number in (signal.SIGINT, signal.SIGTERM):  # may have been inherited as ignored
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGINT, signal.SIGTERM))
    end_with(parent, signal.SIGKILL)


def end_with(parent: int | None, number: int) -> None:
    """Have the kernel send this process a signal when its parent dies; at once when it has died before."""
    ctypes.CDLL(None).prctl(1, number)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:
        os.kill(os.getpid(), number)
