"""What the process asks of the C library's malloc."""

from __future__ import annotations

import ctypes
import os

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


def keep_freed_memory(at_most: int = -1) -> None:
    """Have glibc's malloc keep what is freed, for as long as this process lives, unless MALLOC_.. variables are set.

    A training step, a forward pass and a stream free and take the same large blocks again, which would be returned to
    the system and faulted back in, page by page: up to a sixth of an extraction's time, and three tenths of a stream's
    (measured). `at_most` is in bytes (below 2 GB), -1 for all of it. glibc before 2.35 keeps blocks of 32 MB at most.
    Other C libraries are left as they are.
    """
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt") or any(name.startswith("MALLOC_") for name in os.environ):
        return
    # The one setting without the other would be worse than neither: it ends glibc's own adaptation.
    if libc.mallopt(_MMAP_THRESHOLD, 1 << 30) or libc.mallopt(_MMAP_THRESHOLD, 1 << 25):
        libc.mallopt(_TRIM_THRESHOLD, at_most)
