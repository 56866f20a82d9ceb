"""One process at a time, in a directory or at a byte of a file: the kernel frees the lock when its process ends."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import os
import socket
import struct
import sys
import threading
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

from clt.errors import UserError, tell

LOCK = "lock"
_NO_FLOCK = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)  # as NFS without lockd and Lustre without -o flock answer
_TICK = 0.1  # seconds between two tries to get a lock
_BEAT, _STALE = 5.0, 20.0  # seconds: between signs of life, and without one until a holder counts as dead
_SETTLE = 1.0  # seconds until a claim is read again: of two processes that write one at once, the later stands
_FLOCK = struct.Struct("hhqqi4x")  # struct flock of 64-bit Linux


class ByteLocks:
    """Locks of single bytes of an open file, on Linux; nobody waits for one.

    They belong to the open file description, so that they hold among threads and in whatever PID namespace.
    """

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    def hold(self, at: int) -> bool:
        """Lock a byte; False when it is locked by another description."""
        with contextlib.suppress(BlockingIOError, PermissionError):  # both mean that
            self._call(fcntl.F_OFD_SETLK, fcntl.F_WRLCK, at)
            return True
        return False

    def drop(self, at: int) -> None:
        """Unlock a byte."""
        self._call(fcntl.F_OFD_SETLK, fcntl.F_UNLCK, at)

    def taken(self, at: int) -> bool:
        """Whether a byte is locked by another description."""
        return self._call(fcntl.F_OFD_GETLK, fcntl.F_WRLCK, at) != fcntl.F_UNLCK

    def _call(self, command: int, kind: int, at: int) -> int:
        return _FLOCK.unpack(fcntl.fcntl(self.descriptor, command, _FLOCK.pack(kind, os.SEEK_SET, at, 1, 0)))[0]


@contextlib.contextmanager
def locked(path: Path, doing: str = "being extracted", key: str = "data.store", wait: float = 0.0) -> Iterator[None]:
    """Keep other processes from `doing` the same in directory `path`.

    If another process holds the lock, say so and wait for it, for `wait` seconds at most; then raise a UserError that
    names it and, as the way out, config field `key`. The lock file says who holds the lock and is deleted afterwards.
    The file that a killed process leaves is not locked. Where the file system has no flock, a holder touches the file
    every few seconds: one that stopped is dead after 20 s.
    """
    end, told = time.monotonic() + wait, False
    while True:
        with open(path / LOCK, "a+") as file, contextlib.ExitStack() as held:
            own = None
            try:
                if _flock(file.fileno()):
                    if os.fstat(file.fileno()).st_nlink == 0:
                        continue  # its last holder deleted it before it was locked here
                    file.truncate(0)
                    print(_own_name(), end="", file=file, flush=True)
                else:
                    _warn_without_flock(path)
                    own = held.enter_context(_heartbeat(path / LOCK))
            except BlockingIOError as error:
                file.seek(0)
                found = f"{path} is {doing} by {file.read() or 'another process'}"
                if time.monotonic() > end:
                    remedy = f"wait until it is done and run this again, end it, or set {key} to another directory"
                    raise UserError(f"{found}: {remedy}") from error
                if not told:
                    tell(f"waiting: {found}")
                told = True
                time.sleep(_TICK)
                continue
            try:
                yield
            finally:
                if own is None or _text(path / LOCK) == own:  # else this one was taken for dead, and another holds it
                    (path / LOCK).unlink(missing_ok=True)
            return


def _own_name() -> str:
    return f"process {os.getpid()} on {socket.gethostname()}"


def _flock(descriptor: int) -> bool:
    """Lock the file; False where the file system cannot. Raises BlockingIOError when another holds it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
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
def _heartbeat(file: Path) -> Iterator[str]:
    """Hold the lock by touching its file; gives what stands in it. Raises BlockingIOError when another holds it."""
    claim = f"{_own_name()} since {datetime.now().isoformat()}"
    while _text(file) != claim:
        if _text(file) and _alive(file):
            raise BlockingIOError
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
