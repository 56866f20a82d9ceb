"""One extraction of a store at a time: the kernel releases the lock when its process ends."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from clt.errors import UserError

LOCK = "lock"


@contextlib.contextmanager
def locked(path: Path, wait: bool = False) -> Iterator[None]:
    """Keep other processes from extracting into directory `path`.

    If another process holds the lock, wait for it, or without `wait` raise a UserError that names it. The lock file
    says who holds the lock and is deleted afterwards. The file that a killed process leaves is not locked.
    """
    file = path / LOCK
    fd = _acquire(file, wait)
    try:
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
        yield
    finally:
        file.unlink(missing_ok=True)
        os.close(fd)


def _acquire(file: Path, wait: bool) -> int:
    """Create or open the file and lock it; again if its last holder deleted it before it was locked here."""
    while True:
        fd = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            if os.fstat(fd).st_nlink:
                return fd
        except BlockingIOError as error:
            holder = os.read(fd, 1000).decode() or "another process"
            os.close(fd)
            raise UserError(
                f"{file.parent} is being extracted by {holder}: wait until it is done and run this again, "
                "end it, or set data.store to another directory"
            ) from error
        os.close(fd)
