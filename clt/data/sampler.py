"""Which rows are read at which step: pure functions of (seed, step, rank, world).

Training reads an endless stream of rows. An epoch of it is all rows of the store, block by block, in an order of the
blocks that the seed and the epoch determine. Each step takes the next `batch` rows, and the ranks split them. So each
row comes once per epoch, all batches are of one size and do not depend on the number of ranks, and a run resumes from
its step alone.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler

from clt.errors import UserError

READING = 0  # the stream number of the reading order; extraction's shuffles have others


def permutation(n: int, seed: int, number: int, stream: int) -> np.ndarray:
    """A random permutation of range(n) (int64), determined by the arguments.

    Sorts raw Philox words: their values are promised by numpy for good, those of `Generator.permutation` are not.
    """
    bits = np.random.Philox(key=np.array([seed, number], np.uint64), counter=[0, 0, 0, stream])
    return np.argsort(bits.random_raw(n), kind="stable")


@functools.lru_cache(maxsize=4)
def _block_order(n_blocks: int, seed: int, epoch: int) -> tuple[np.ndarray, int]:
    """The blocks in the order in which an epoch reads them, and the place of the last (perhaps ragged) block in it."""
    order = permutation(n_blocks, seed, epoch, READING)
    return order, int(np.flatnonzero(order == n_blocks - 1)[0])


def micro_batches(batch: int, accumulate: int, rank: int = 0, world: int = 1) -> list[tuple[int, int]]:
    """Which rows (first, end) of a global batch are this rank's, for each of its micro-batches.

    The global batch is cut into micro-batches, and each of these is split over the ranks: it consists of the same rows
    in every layout. Shares differ by at most one row.
    """
    ends = [batch * j // accumulate for j in range(accumulate + 1)]
    return [
        (first + (end - first) * rank // world, first + (end - first) * (rank + 1) // world)
        for first, end in itertools.pairwise(ends)
    ]


def batch_rows(
    n_rows: int, block_rows: int, batch: int, seed: int, step: int, rank: int = 0, world: int = 1, accumulate: int = 1
) -> np.ndarray:
    """The rows (int64) that `rank` of `world` reads at `step`, one micro-batch after the other.

    Raises UserError when the batch is larger than the store.
    """
    if batch > n_rows:
        raise UserError(
            f"train.batch_tokens={batch} but the store has {n_rows} rows: lower the batch, or extract more "
            "(data.train_tokens)"
        )
    assert 0 <= rank < world, (rank, world)
    shares = micro_batches(batch, accumulate, rank, world)
    return np.concatenate(
        [_stream(n_rows, block_rows, seed, step * batch + first, step * batch + end) for first, end in shares]
    )


def _stream(n_rows: int, block_rows: int, seed: int, first: int, end: int) -> np.ndarray:
    """The rows at the places first to end of the endless stream."""
    n_blocks = -(-n_rows // block_rows)
    missing = n_blocks * block_rows - n_rows  # rows that the ragged block lacks
    parts = []
    for epoch in range(first // n_rows, max(end - 1, first) // n_rows + 1):
        order, ragged = _block_order(n_blocks, seed, epoch)
        places = np.arange(max(first - epoch * n_rows, 0), min(end - epoch * n_rows, n_rows))
        # After the ragged block every row comes `missing` places early: count as if that block were complete.
        places[places >= (ragged + 1) * block_rows - missing] += missing
        block, within = np.divmod(places, block_rows)
        parts.append(order[block] * block_rows + within)
    return np.concatenate(parts)


class DistributedSampler(Sampler[np.ndarray]):
    """The rows (n,) of one rank's batches, one array a step, from `start_step` up to `stop_step` (None: for ever).

    Raises UserError when the batch is larger than the store or has fewer rows than there are ranks.
    """

    def __init__(
        self,
        n_rows: int,
        block_rows: int,
        batch: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
        accumulate: int = 1,
        start_step: int = 0,
        stop_step: int | None = None,
    ) -> None:
        if batch < world:
            raise UserError(
                f"train.batch_tokens={batch} leaves some of {world} ranks without a row: set at least {world}"
            )
        self.start_step, self.stop_step = start_step, stop_step
        of_rank = {"rank": rank, "world": world, "accumulate": accumulate}
        self.rows_at = functools.partial(batch_rows, n_rows, block_rows, batch, seed, **of_rank)
        self.rows_at(start_step)  # a batch that cannot be made is an error here, not in a reader thread

    def __iter__(self) -> Iterator[np.ndarray]:
        steps = itertools.count(self.start_step) if self.stop_step is None else range(self.start_step, self.stop_step)
        return map(self.rows_at, steps)
