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
    while True:
        with open(path / LOCK, "a+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError as error:
                file.seek(0)
                raise UserError(
                    f"{path} is being extracted by {file.read() or 'another process'}: wait until it is done and run "
                    "this again, end it, or set data.store to another directory"
                ) from error
            if os.fstat(file.fileno()).st_nlink == 0:
                continue  # its last holder deleted it before it was locked here
            try:
                file.truncate(0)
                print(f"process {os.getpid()} on {socket.gethostname()}", end="", file=file, flush=True)
                yield
            finally:
                (path / LOCK).unlink(missing_ok=True)
            return
