"""Memory that processes share: a file in /dev/shm with an owner, a lock that dies with its holder, and no leftovers.

Not `multiprocessing.shared_memory`: its resource tracker removes a segment when any process that attached to it ends.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from clt.errors import UserError

FOLDER = Path("/dev/shm")
CGROUP = Path("/sys/fs/cgroup")
_MAGIC = b"cltseg01"
_PREFIX = np.dtype([("magic", "S8"), ("owner_pid", "i8"), ("owner_start", "i8")])
PREFIX_BYTES = 64
"""Bytes at the start of a segment that are not the user's."""


def start_time(pid: int) -> int | None:
    """When a process started, in clock ticks since boot; None when it is dead (also when nobody has waited for it).

    (pid, start time) names a process for good: pids are used again.
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = stat[stat.rindex(b")") + 2 :].split()  # behind the command's name, which may hold anything
    return None if fields[0] in b"ZX" else int(fields[19])


class Segment:
    """A mapped file `/dev/shm/clt-<name>`: `memory`, `locked()`, and an owner whose death makes it stale.

    May be used from several threads, but not after a fork: attach anew in each process.
    """

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path, self._descriptor = path, descriptor
        self.memory = mmap.mmap(descriptor, 0)
        self._prefix = np.ndarray((), _PREFIX, self.memory)
        self._thread_lock = threading.Lock()

    @classmethod
    def create(cls, name: str, size: int) -> Segment:
        """A zeroed segment of `size` bytes that this process owns, locked until `publish`.

        Replaces one whose owner is dead. Raises UserError when the owner lives, the memory is not there, or something
        else has the name.
        """
        path = _path(name)
        while True:
            descriptor = _open(path, os.O_CREAT)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            with contextlib.ExitStack() as undo:
                undo.callback(os.close, descriptor)
                if not _named(path, descriptor):  # its owner removed it while we waited
                    continue
                prefix = np.frombuffer(os.pread(descriptor, _PREFIX.itemsize, 0).ljust(_PREFIX.itemsize), _PREFIX)[0]
                pid = int(prefix["owner_pid"])
                if prefix["magic"] == _MAGIC and start_time(pid) == prefix["owner_start"]:
                    raise UserError(
                        f"the shared buffer {path} belongs to the running process {pid}: stop that server, or give "
                        "this one another server.name"
                    )
                undo.callback(path.unlink)
                if os.fstat(descriptor).st_size:  # stale; those who are still attached keep the old memory
                    continue
                check_memory(size)
                try:
                    os.posix_fallocate(descriptor, 0, size)  # claimed now: later it would be a SIGBUS
                except OSError as error:
                    raise UserError(_too_large(size, f"it cannot be allocated ({error.strerror})")) from error
                segment = cls(path, descriptor)
                undo.pop_all()
                return segment

    def publish(self) -> None:
        """Let others attach to the segment that this process has just created and filled in."""
        self._prefix["owner_pid"], self._prefix["owner_start"] = os.getpid(), start_time(os.getpid())
        self._prefix["magic"] = _MAGIC
        fcntl.flock(self._descriptor, fcntl.LOCK_UN)

    @classmethod
    def attach(cls, name: str) -> Segment:
        """The complete segment of that name. FileNotFoundError when there is none, UserError for something else."""
        path = _path(name)
        descriptor = _open(path)
        fcntl.flock(descriptor, fcntl.LOCK_EX)  # waits while it is being created
        if os.pread(descriptor, len(_MAGIC), 0) != _MAGIC:
            os.close(descriptor)
            raise FileNotFoundError(f"{path} was never completed: the process that made it died")
        fcntl.flock(descriptor, fcntl.LOCK_UN)
        return cls(path, descriptor)

    @property
    def owner(self) -> int:
        """The pid of the process that created the segment."""
        return int(self._prefix["owner_pid"])

    def owner_lives(self) -> bool:
        """Whether the process that created the segment still runs."""
        return start_time(self.owner) == int(self._prefix["owner_start"])

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Exclude all other threads and processes. The kernel lets go of the lock when its holder dies."""
        with self._thread_lock:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX)
            try:
                yield
            finally:
                fcntl.flock(self._descriptor, fcntl.LOCK_UN)

    def unlink(self) -> None:
        """Remove the name, if it still stands for this segment; the memory lives until the last process lets go."""
        with self.locked():
            if _named(self.path, self._descriptor):
                self.path.unlink()

    def close(self) -> None:
        """Let go; a segment without an owner is removed. The memory is unmapped with the last array that views it."""
        if not self.owner_lives():
            self.unlink()
        del self._prefix, self.memory
        os.close(self._descriptor)


def _path(name: str) -> Path:
    if not FOLDER.is_dir():
        raise UserError(f"this machine has no {FOLDER}: the server needs Linux")
    return FOLDER / f"clt-{name}"


def _open(path: Path, flags: int = 0) -> int:
    """A descriptor of the file itself; FileNotFoundError when there is none, UserError when it cannot be a buffer."""
    try:
        return os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | flags, 0o600)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise UserError(
            f"{path} cannot be opened as a shared buffer ({error.strerror}): it is another user's, or a link or a "
            "directory; give this server another server.name, or have it removed"
        ) from error


def _named(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def check_memory(size: int) -> None:
    """Raise UserError when `size` bytes are more than /dev/shm, the machine or the container's limit have left."""
    meminfo = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    free = {
        str(FOLDER): shutil.disk_usage(FOLDER).free,
        "the machine's memory": int(meminfo["MemAvailable"].split()[0]) * 1024,
    }
    limit, used = CGROUP / "memory.max", CGROUP / "memory.current"
    if limit.exists() and (text := limit.read_text().strip()) != "max":
        # What the page cache holds there is given up when memory is wanted.
        stat = dict(line.split() for line in limit.with_name("memory.stat").read_text().splitlines())
        free["the container's memory"] = int(text) - int(used.read_text()) + int(stat["inactive_file"])
    place = min(free, key=lambda name: free[name])
    if free[place] < size:
        raise UserError(_too_large(size, f"{place} has {free[place] / 1e9:.2f} GB free"))


def _too_large(size: int, found: str) -> str:
    return (
        f"the shared buffer needs {size / 1e9:.2f} GB but {found}: lower server.rows, choose fewer lm.layers, or give "
        f"the machine more (a container: docker run --shm-size)"
    )
