"""Where the rows of a run come from: a store, or an activation server. The loop sees the same three members of both."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from clt.config import Config
from clt.data.loader import Loader
from clt.data.sampler import DistributedSampler
from clt.data.store import DiscBuffer
from clt.errors import UserError
from clt.train import distributed as dist
from clt.train.distributed import World
from clt.train.watch import TICK, Watch

if TYPE_CHECKING:
    from clt.server.source import ServerStore


class StoreSource:
    """This rank's rows of every global batch of a store, read ahead.

    Raises UserError when the batch cannot be made of the store's rows, or cannot be split as the config asks.
    """

    failure: BaseException | None = None
    """Why `batches` ended before the last step, other than by a signal: raise it when the run has been saved."""

    def __init__(self, store: DiscBuffer | ServerStore, config: Config, world: World) -> None:
        self.store, self.world, self.steps = store, world, config.train.steps
        self.index, self.statistics = store.index, store.statistics
        data, batch = world.data, config.train.batch_tokens
        self.order = (len(store), config.data.block_rows, batch, config.run.seed, data.rank, data.size)
        DistributedSampler(*self.order)
        if batch // data.size < config.train.accumulate:
            raise UserError(
                f"train.accumulate={config.train.accumulate} micro-batches cannot be made of a rank's share of "
                f"train.batch_tokens={batch}, {batch // data.size} rows: lower the one or raise the other"
            )
        self.prefetch = config.data.prefetch
        self.loader: Loader | None = None

    @property
    def stalled(self) -> float:
        """Seconds that the loop has waited for batches so far."""
        return 0.0 if self.loader is None else self.loader.stalled

    def batches(self, step: int, watch: Watch) -> Iterator[Tensor]:
        """(b, 2, L, D) in storage dtype, on the device, for the steps after `step` done ones; valid until the next."""
        with self._load(step) as loader:
            yield from loader

    def zeros(self, rows: int) -> Tensor:
        """A batch of that many rows of zeros, as `batches` gives them."""
        shape = (rows, 2, self.index.n_layers, self.index.d_acts)
        return torch.zeros(shape, dtype=getattr(torch, self.index.dtype), device=self.world.device)

    def position(self) -> dict[str, Any]:
        """What a checkpoint keeps of the source besides its step; all ranks must call it."""
        return {}

    def resume(self, state: dict[str, Any]) -> None:
        """Go on from the position in a checkpoint's state."""

    def _load(self, step: int) -> Loader:
        sampler = DistributedSampler(*self.order, step, self.steps)
        self.loader = Loader(self.store, sampler, self.world.device, self.prefetch)
        return self.loader


class ServerSource(StoreSource):
    """The rows that an activation server streams to this rank, whatever their numbers: each comes to one rank, once."""

    store: ServerStore

    def batches(self, step: int, watch: Watch) -> Iterator[Tensor]:
        """As a store's, but a server may be away for long: all ranks take the next batch, or none does.

        Ends early when a rank's server is lost, or when a rank is told to stop while one waits.
        """
        with self._load(step) as loader:
            for done in range(step, self.steps):
                waiting = True
                while waiting:
                    ready = loader.ready(TICK)
                    flags = (not ready, watch.stopping, loader.failure is not None)
                    waiting, told, failed = dist.count(self.world, *flags)
                    watch.progress(done)
                    if failed:
                        self.failure = loader.failure or SystemExit(2)  # the rank that lost its server says why
                    if failed or (waiting and told):
                        return
                yield next(loader)

    def position(self) -> dict[str, Any]:
        """Rows read so far, over all ranks, by the buffer of the server that they came from."""
        return {"server": self.store.path, "rows_by_segment": dist.sum_counts(self.world, self.store.consumed)}

    def resume(self, state: dict[str, Any]) -> None:
        """Count on from the rows that were read before."""
        if self.world.rank == 0:
            self.store.consumed |= state["rows_by_segment"]
