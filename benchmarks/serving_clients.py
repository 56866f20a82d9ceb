"""serving_clients.py URL BATCH_SIZE CLIENTS SECONDS: clients of a server, each a process, of the clt in PYTHONPATH.

Prints `ready` when all of them have read a batch, and then the GB/s that they read together.
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
    url, (size, count), seconds = sys.argv[1], map(int, sys.argv[2:4]), float(sys.argv[4])
    ready = FORK.Barrier(count + 1, timeout=300)
    with FORK.Pool(count) as pool:
        totals = pool.starmap_async(read, [(url, size, seconds)] * count, chunksize=1)
        ready.wait()
        print("ready", flush=True)
        print(sum(totals.get()) / seconds / 1e9)
