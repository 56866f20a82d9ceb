"""Clients of an activation server, each a process, that verify checksums. Used by serving.py.

    python benchmarks/serving_clients.py URL BATCH_SIZE CLIENTS SECONDS

Prints `ready` when all of them have read a batch, and then the GB/s that they read together. The client is that of the
checkout in PYTHONPATH.
"""

import multiprocessing
import sys
import time

from clt.server.client import ActivationClient

FORK = multiprocessing.get_context("fork")  # one process imports torch for all of them


def read(url: str, size: int, seconds: float) -> int:
    """Bytes of activations that come in `seconds`, from half a second after all clients are ready."""
    batches = ActivationClient(url, patience=300).stream_activations(size)
    next(batches)
    ready.wait()
    begin, total = time.monotonic() + 0.5, 0
    for batch in batches:
        now = time.monotonic()
        if now > begin + seconds:
            break
        total += batch.activations.nbytes if now > begin else 0
    return total


if __name__ == "__main__":
    url, size, count, seconds = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])
    ready = FORK.Barrier(count + 1, timeout=300)
    with FORK.Pool(count) as pool:
        totals = pool.starmap_async(read, [(url, size, seconds)] * count, chunksize=1)
        ready.wait()
        print("ready", flush=True)
        print(sum(totals.get()) / seconds / 1e9)
