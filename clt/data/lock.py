"""One extraction of a store at a time: a lock that ends with its process, however that ends."""

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

    When another one does so already, `wait` for its end, or raise a UserError that names it. The file that is locked
    says who holds it and is gone afterwards; one that a killed process left behind is locked by nobody.
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
    """Open the file and lock it. Who had it locked may have deleted it in between: then it is made anew."""
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
