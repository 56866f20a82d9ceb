"""One process at a time in a directory: the kernel releases the lock when its process ends."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

from clt.errors import UserError

LOCK = "lock"
_NO_FLOCK = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)  # as NFS without lockd and Lustre without -o flock answer
_BEAT, _STALE = 5.0, 20.0  # seconds: between signs of life, and without one until a holder counts as dead
_SETTLE = 1.0  # seconds until a claim is read again: of two processes that write one at once, the later stands


@contextlib.contextmanager
def locked(path: Path, doing: str = "being extracted", key: str = "data.store", wait: bool = False) -> Iterator[None]:
    """Keep other processes from `doing` the same in directory `path`.

    If another process holds the lock, wait for it, or without `wait` raise a UserError that names it and, as the way
    out, config field `key`. The lock file says who holds the lock and is deleted afterwards. The file that a killed
    process leaves is not locked. Where the file system has no flock, a holder touches the file every few seconds: one
    that stopped is dead after 20 s.
    """
    while True:
        with open(path / LOCK, "a+") as file, contextlib.ExitStack() as held:
            own = None
            try:
                if _flock(file.fileno(), wait):
                    if os.fstat(file.fileno()).st_nlink == 0:
                        continue  # its last holder deleted it before it was locked here
                    file.truncate(0)
                    print(_own_name(), end="", file=file, flush=True)
                else:
                    _warn_without_flock(path)
                    own = held.enter_context(_heartbeat(path / LOCK, wait))
            except BlockingIOError as error:
                file.seek(0)
                raise UserError(
                    f"{path} is {doing} by {file.read() or 'another process'}: wait until it is done and run this "
                    f"again, end it, or set {key} to another directory"
                ) from error
            try:
                yield
            finally:
                if own is None or _text(path / LOCK) == own:  # else this one was taken for dead, and another holds it
                    (path / LOCK).unlink(missing_ok=True)
            return


def _own_name() -> str:
    return f"process {os.getpid()} on {socket.gethostname()}"


def _flock(descriptor: int, wait: bool) -> bool:
    """Lock the file; False where the file system cannot. Raises BlockingIOError when another holds it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        if error.errno not in _NO_FLOCK:
            raise
        return False
    return True


@functools.cache
def _warn_without_flock(path: Path) -> None:
    print(
        f"warning: the file system of {path} has no file locks (flock): processes that use the directory at the same "
        f"time know of each other by the age of {path / LOCK} alone",
        file=sys.stderr,
        flush=True,
    )


@contextlib.contextmanager
def _heartbeat(file: Path, wait: bool) -> Iterator[str]:
    """Hold the lock by touching its file; gives what stands in it. Raises BlockingIOError when another holds it."""
    claim = f"{_own_name()} since {datetime.now().isoformat()}"
    while _text(file) != claim:
        if _text(file) and _alive(file):
            if not wait:
                raise BlockingIOError
            continue
        file.write_text(claim)
        time.sleep(_SETTLE)
    ended = threading.Event()
    beat = threading.Thread(target=_beat, args=(file, ended), name="clt-lock", daemon=True)
    beat.start()
    try:
        yield claim
    finally:
        ended.set()
        beat.join()


def _alive(file: Path) -> bool:
    """Whether somebody touches, or deletes, the file in the next 20 s."""
    end, before = time.monotonic() + _STALE, _touched(file)
    while time.monotonic() < end:
        time.sleep(_STALE / 20)
        if _touched(file) != before:
            return True
    return False


def _text(file: Path) -> str:
    with contextlib.suppress(FileNotFoundError):
        return file.read_text()
    return ""


def _touched(file: Path) -> int | None:
    with contextlib.suppress(FileNotFoundError), file.open("rb") as opened:  # opened: NFS then asks its server
        return os.fstat(opened.fileno()).st_mtime_ns
    return None


def _beat(file: Path, ended: threading.Event) -> None:
    while not ended.wait(_BEAT):
        with contextlib.suppress(OSError):  # a server is away, or the directory is gone: who works in it will find out
            os.utime(file)
