"""Where the rows of a run come from: a store, or an activation server."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from clt.config import Config
from clt.data.loader import Loader
from clt.data.sampler import DistributedSampler, micro_batches
from clt.data.store import DiscBuffer
from clt.errors import UserError
from clt.train import distributed as dist
from clt.train.distributed import World
from clt.train.watch import TICK, Watch

if TYPE_CHECKING:
    from clt.server.remote import ServerStore


class StoreSource:
    """This rank's rows of every global batch of a store, read ahead.

    Ranks that hold the shards of one transcoder need the same rows: the first of them reads, and sends them to the
    others.

    Raises UserError when the batch cannot be made of the store's rows, or cannot be split as the config asks.
    """

    failure: BaseException | None = None
    """Why `batches` ended before the last step, other than by a signal: raise it when the run has been saved."""
    loader: Loader | None = None

    def __init__(self, store: DiscBuffer | ServerStore, config: Config, world: World) -> None:
        self.store, self.world, self.steps, self.prefetch = store, world, config.train.steps, config.data.prefetch
        self.index, self.statistics = store.index, store.statistics
        data, batch = world.data, config.train.batch_tokens
        of_rank = (data.rank, data.size)
        shares = micro_batches(batch, config.train.accumulate, *of_rank)
        self.micro_batches = [end - first for first, end in shares]
        """Rows of this rank in each micro-batch, in the order in which a batch holds them."""
        self.order = (len(store), config.data.block_rows, batch, config.run.seed, *of_rank, config.train.accumulate)
        DistributedSampler(*self.order)
        if batch // config.train.accumulate < data.size:
            raise UserError(
                f"train.accumulate={config.train.accumulate} micro-batches of train.batch_tokens={batch} leave some of "
                f"{data.size} ranks without a row: lower the one or raise the other"
            )

    @property
    def stalled(self) -> float:
        """Seconds that the loop has waited for batches so far."""
        return 0.0 if self.loader is None else self.loader.stalled

    def batches(self, step: int, watch: Watch) -> Iterator[Tensor]:
        """Batches (b, 2, L, D) in storage dtype, on the device, from `step` on; each is valid until the next.

        Ends early when `wait` does so.
        """
        reads = self.world.feature.rank == 0
        sampler = DistributedSampler(*self.order, step, self.steps) if reads else ()
        self.loader = Loader(self.store, sampler, self.world.device, self.prefetch)
        for done in range(step, self.steps):
            if not self.wait(self.loader, done, watch):
                return
            batch = next(self.loader) if reads else self.zeros(sum(self.micro_batches))
            yield self.world.feature.broadcast(batch)

    def wait(self, loader: Loader, done: int, watch: Watch) -> bool:
        """Wait for the batch after `done` steps; whether there is one, on which all ranks agree."""
        return True

    def zeros(self, rows: int) -> Tensor:
        """A batch of that many rows of zeros, as `batches` gives them."""
        shape = (rows, 2, self.index.n_layers, self.index.d_acts)
        return torch.zeros(shape, dtype=getattr(torch, self.index.dtype), device=self.world.device)

    def position(self) -> dict[str, Any]:
        """What a checkpoint keeps of the source besides its step; all ranks must call it."""
        return {}

    def resume(self, state: dict[str, Any]) -> None:
        """Go on from the position in a checkpoint's state."""

    def __enter__(self) -> StoreSource:
        return self

    def __exit__(self, *_: object) -> None:
        """End the reading threads."""
        if self.loader is not None:
            self.loader.close()


class ServerSource(StoreSource):
    """The rows that an activation server streams to this rank. The server chooses them, and gives each row out once."""

    store: ServerStore

    def wait(self, loader: Loader, done: int, watch: Watch) -> bool:
        """A server may be away for minutes. No batch comes when a rank's is lost, or one is told to stop meanwhile."""
        while True:
            waiting, told, failed = dist.count(
                self.world, not loader.ready(TICK), watch.stopping, loader.failure is not None
            )
            watch.progress(done)
            if failed:
                self.failure = loader.failure or SystemExit(2)  # the rank that lost its server says why
            if failed or not waiting or told:
                return not failed and not waiting

    def position(self) -> dict[str, Any]:
        """Rows read so far, over all ranks, by the buffer of the server that they came from."""
        return {"server": self.store.path, "rows_by_segment": dist.sum_counts(self.world, self.store.consumed)}

    def resume(self, state: dict[str, Any]) -> None:
        """Count on from the rows that were read before."""
        if self.world.rank == 0:
            self.store.consumed |= state["rows_by_segment"] or {}
