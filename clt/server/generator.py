"""The process that fills the buffer, and the serving process that keeps it running: whoever holds the leader's lock."""

from __future__ import annotations

import asyncio
import ctypes
import logging
import multiprocessing
import os
import signal
import sys
import threading
import time

import torch

from clt.config import Config
from clt.data.feed import feed
from clt.errors import UserError, printable
from clt.memory import keep_freed_memory
from clt.server.buffer import GENERATOR, LEADER, Buffer
from clt.server.run import buffer_name, record

log = logging.getLogger("uvicorn.error")
_TICK, _FULL = 0.1, 0.005  # seconds between two looks at a lock or the generator, and at a full buffer
_WORTH = 8  # an eighth of the buffer is filled again in one go: each look costs those who read beside it
_STEADY = 60.0  # seconds before a restart at most; one that ran for longer is restarted at once
_NOTE = 2.0  # seconds between two notes of the place in the text and of the counters


def run(config: Config) -> None:
    """Fill the config's buffer until this process is ended, from where its last generator stopped.

    No row of the text is left out or comes twice, but for what a killed generator was just writing. An error is
    recorded in the buffer and ends the process.
    """
    end_with_parent(signal.SIGKILL)
    buffer = Buffer(buffer_name(config))
    buffer.say("starting", pid=os.getpid())
    while not buffer.locks.hold(GENERATOR):  # the last leader's, which the kernel is ending
        time.sleep(_TICK)
    threading.Thread(target=note, args=(config, buffer), daemon=True).start()
    torch.set_num_threads(max(torch.get_num_threads() - 1, 1))  # one core is the servers'
    keep_freed_memory()
    epoch, position, skip = buffer.progress["mark"].tolist()  # skip: rows that are in the buffer already
    try:
        batches = feed(config, epoch, position)
        buffer.say("running", pid=os.getpid())
        for (epoch, position), rows in batches:
            done, skip = skip, 0
            while done < len(rows):
                n = buffer.put(rows[done:], (epoch, position, done))
                done += n
                while n == 0 and buffer.room() < max(1, (buffer.blocks - buffer.open_blocks) // _WORTH):
                    time.sleep(_FULL)
    except UserError as error:
        buffer.say("failed", printable(str(error)), os.getpid())
        sys.exit(2)
    except Exception as error:
        buffer.say("failed", printable(f"{type(error).__name__}: {error}"), os.getpid())
        raise


def note(config: Config, buffer: Buffer) -> None:
    """Record the place in the text and the counters, in a thread: a busy disk may take longer than the buffer lasts."""
    history = buffer.header["history"]
    while True:
        try:
            record(config, buffer)
            found = buffer.stats()
            history[:-1] = history[1:]
            history[-1] = (time.time(), found["rows_drawn"], found["fill"])
        except Exception:  # without its thread, a later server would begin the text again
            log.exception("the place in the text was not recorded")
        time.sleep(_NOTE)


async def lead(config: Config, buffer: Buffer) -> None:
    """Wait until no other serving process leads, then keep a generator running. Only cancelling the task ends it."""
    while True:
        try:
            await _lead(config, buffer)
        except Exception:
            log.exception("the task that keeps the generator running failed, and begins again")
        await asyncio.sleep(1.0)


async def _lead(config: Config, buffer: Buffer) -> None:
    """Wait for the leader's lock, then run one generator after the other, with back-off."""
    spawn, delay = multiprocessing.get_context("spawn"), 0.25
    while not buffer.locks.hold(LEADER):
        await asyncio.sleep(_TICK)
    while True:
        child, began = spawn.Process(target=run, args=(config,), name="clt-generator", daemon=True), time.monotonic()
        buffer.say("starting")
        try:
            child.start()
            while child.is_alive():
                await asyncio.sleep(_TICK)
        except Exception as error:  # e.g. too many open files
            log.exception("the generator was not started")
            buffer.say("failed", f"it was not started: {error}")
        finally:
            if child.pid is not None:
                child.kill()
                while child.is_alive():  # join() would hold up all requests
                    await asyncio.sleep(_TICK)
        if (status := child.exitcode or 0) < 0:
            hint = "SIGKILL; was there too little memory?" if -status == signal.SIGKILL else signal.strsignal(-status)
            buffer.say("failed", f"it was killed by signal {-status}: {hint}")
        elif buffer.generator()["state"] != "failed":  # else it has said why itself
            buffer.say("failed", f"it ended with status {status}")
        log.error("the generator ended: %s", buffer.generator()["cause"])
        delay = 0.5 if time.monotonic() - began > _STEADY else min(2 * delay, _STEADY)
        await asyncio.sleep(delay)
        buffer.header["restarts"] += 1


def end_with_parent(number: int) -> None:
    """Let SIGINT, SIGTERM and (by signal `number`) its parent's death end this process, which may ignore them now."""
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, signal.SIG_DFL)
    if (parent := multiprocessing.parent_process()) is not None:
        ctypes.CDLL(None).prctl(1, number)  # PR_SET_PDEATHSIG
        if os.getppid() != parent.pid:  # it has died before
            os.kill(os.getpid(), number)
