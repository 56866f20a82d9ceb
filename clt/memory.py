"""How malloc keeps freed memory; memory that processes share, if the machine has enough."""

from __future__ import annotations

import ctypes
import mmap
import os
import shutil
import stat
from pathlib import Path

import numpy as np

from clt.errors import UserError, size_text

CGROUP = Path("/sys/fs/cgroup")
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


def keep_freed_memory(at_most: int = -1) -> None:
    """Have glibc's malloc keep what is freed, for as long as this process lives, unless MALLOC_.. variables are set.

    A training step, a forward pass and a stream free and take the same large blocks again. To return them to the system
    and fault them back in took up to a sixth of an extraction's time, and three tenths of a stream's. `at_most` is in
    bytes (below 2 GB), -1 for all. glibc before 2.35 keeps blocks of 32 MB at most; other C libraries are left alone.
    """
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt") or any(name.startswith("MALLOC_") for name in os.environ):
        return
    # The one setting without the other would be worse than neither: it ends glibc's own adaptation.
    if libc.mallopt(_MMAP_THRESHOLD, 1 << 30) or libc.mallopt(_MMAP_THRESHOLD, 1 << 25):
        libc.mallopt(_TRIM_THRESHOLD, at_most)


def page_aligned(size: int) -> np.ndarray:
    """Bytes (size,) that start a page: a copy between places that lie otherwise may take five times as long."""
    memory = np.empty(size + mmap.PAGESIZE, "u1")
    start = -memory.__array_interface__["data"][0] % mmap.PAGESIZE
    return memory[start : start + size]


def allocate(path: Path, size: int, begin: bytes) -> None:
    """Make a file of `size` bytes, which begin with these, in a file system in memory; in the place of any other.

    Raises UserError when the memory is not there.
    """
    _check_memory(size, path.parent)
    partial = path.with_name(f"{path.name}.partial")
    descriptor = open_own(partial, os.O_CREAT)
    try:
        os.truncate(descriptor, 0)
        os.posix_fallocate(descriptor, 0, size)  # claimed now: later it would be a SIGBUS
    except OSError as error:
        partial.unlink()
        raise UserError(_too_large(size, f"it cannot be allocated ({error.strerror})")) from error
    os.pwrite(descriptor, begin, 0)
    os.close(descriptor)
    os.rename(partial, path)


def open_own(path: Path, flags: int = 0) -> int:
    """A descriptor of a file that is this user's alone; FileNotFoundError when there is none, UserError for others."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK | flags, 0o600)
        found = os.fstat(descriptor)
        if stat.S_ISREG(found.st_mode) and found.st_uid == os.geteuid() and not found.st_mode & 0o077:
            return descriptor
        os.close(descriptor)
        told = f"is {stat.filemode(found.st_mode)} of user {found.st_uid}"
    except OSError as error:
        if isinstance(error, FileNotFoundError):
            raise
        told = f"cannot be opened ({error.strerror})"  # a link, a directory
    raise UserError(f"{path} {told}; wanted a regular file of this user with mode 600: remove it, or set server.name")


def _check_memory(size: int, folder: Path) -> None:
    """Raise UserError when `size` bytes are more than the file system in memory at `folder`, the machine or the
    container's limit have left."""
    free = {str(folder): shutil.disk_usage(folder).free} | free_memory()
    place = min(free, key=lambda name: free[name])
    if free[place] < size:
        raise UserError(_too_large(size, f"{place} has {size_text(free[place])} free"))


def free_memory() -> dict[str, int]:
    """Bytes that the machine, and a container that has a limit, have left. The page cache is given up when memory is
    wanted."""
    meminfo = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    free = {"the machine's memory": int(meminfo["MemAvailable"].split()[0]) * 1024}
    limit, used = CGROUP / "memory.max", CGROUP / "memory.current"
    if limit.exists() and (text := limit.read_text().strip()) != "max":
        counts = dict(line.split() for line in limit.with_name("memory.stat").read_text().splitlines())
        cache = int(counts["inactive_file"]) + int(counts["active_file"])
        free["the container's memory"] = int(text) - int(used.read_text()) + cache
    return free


def _too_large(size: int, found: str) -> str:
    """What to say of a shared buffer that does not fit."""
    return (
        f"the shared buffer needs {size_text(size)} but {found}: lower server.rows, choose fewer lm.layers, or give "
        f"the machine more (a container: docker run --shm-size)"
    )
