"""What the process asks of the C library's malloc."""

from __future__ import annotations

import ctypes

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


def keep_freed_memory() -> None:
    """Have glibc's malloc keep what is freed, for as long as this process lives.

    A training step and a forward pass free and take the same large blocks again, which would be returned to the system
    and faulted back in, page by page: up to a sixth of an extraction's time (measured). Other C libraries are
    left as they are.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(_MMAP_THRESHOLD, 1 << 30)
        libc.mallopt(_TRIM_THRESHOLD, -1)  # never
