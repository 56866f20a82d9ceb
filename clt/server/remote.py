"""Training from a server: rows and all else that a run takes from a store, read from the network instead."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from clt.config import Config
from clt.data.check import check_files, check_store, differences
from clt.data.index import INDEX, STATISTICS, read_index
from clt.data.lock import locked
from clt.data.raw_rows import empty_rows, tensor_of
from clt.data.shards import COLUMN_DTYPES
from clt.data.writer import write_store
from clt.errors import UserError
from clt.files import read_token
from clt.server.client import ActivationClient

_PATIENCE = 600.0  # seconds that a run waits for a server that is away
_NOT_COPIED = ("format_version", "n_layers", "d_acts", "dtype", "rows", "shards")  # what write_store says itself
_BATCH_BYTES = 8 << 20  # small enough to be received while the last one is copied


class ServerStore:
    """What a run needs of a store: index, statistics, and rows, in the server's order.

    `read` gives the next rows of this process's own stream, whatever their numbers; it waits out a server that is away
    for less than ten minutes.
    """

    threads = 1  # the rows come in the stream's order

    def __init__(self, client: ActivationClient, rows: int) -> None:
        self.client, self.path = client, client.url
        self.index, self.statistics = dataclasses.replace(client.index(), rows=rows), client.statistics()
        self.consumed: dict[str, int] = {}  # rows read, by the buffer of the server (its `segment`)
        most = 1 << max(1, _BATCH_BYTES // self.index.shape.row_bytes).bit_length() - 1  # whole blocks of the server
        self.batch_rows = min(client.stats()["max_batch"], most)
        self._batches = client.stream_activations(self.batch_rows, index=self.index)
        self._rest = empty_rows(0, self.index.shape)["rows"]

    def __len__(self) -> int:
        return self.index.rows

    def read(self, rows: np.ndarray, out: Tensor) -> Tensor:
        """The next len(rows) rows (n, 2, L, D), into `out`. One thread at a time. Raises ServerError."""
        # Not by torch: its copy would start OpenMP's threads for this thread, too, and with more of them than
        # processors they wait asleep; a training step on two cores took twice as long.
        views, done = out.flatten(1).view(torch.uint8).numpy(), 0
        while done < len(rows):
            if len(self._rest) == 0:
                batch = next(self._batches)
                self.consumed[batch.segment] = self.consumed.get(batch.segment, 0) + len(batch.row)
                self._rest = batch.activations.flatten(1).view(torch.uint8).numpy()
            take = min(len(self._rest), len(rows) - done)
            views[done : done + take] = self._rest[:take]
            self._rest, done = self._rest[take:], done + take
        return out


def open_server(config: Config) -> ServerStore:
    """The server of `data.url` in the place of a training store of `data.train_tokens` rows.

    Raises UserError when it does not answer, refuses, or serves other rows than the config asks for.
    """
    assert config.data.url is not None, "load_config has seen to it"
    client = ActivationClient(config.data.url, read_token(config.data.token_file), patience=_PATIENCE)
    store = ServerStore(client, config.data.train_tokens)
    if odd := differences(store.index, config):
        remedy = "change the config, or start the server with this one"
        raise UserError(f"the server {client.url} has other rows than the config asks for: {odd}; {remedy}")
    return store


def fetch_heldout(config: Config) -> None:
    """Copy the server's held-out rows to `<data.store>/heldout`, a store like any other; keeps one that is there.

    The training rows' statistics go to `<data.store>/train`. Raises UserError for a copy of other rows.
    """
    store, path = open_server(config), Path(config.data.store) / "heldout"
    fields = {key: value for key, value in dataclasses.asdict(store.index).items() if key not in _NOT_COPIED}
    fields["text"]["part"] = "heldout"
    path.mkdir(parents=True, exist_ok=True)
    with locked(path, wait=math.inf):  # many runs may start at once on one file system
        if not (path / INDEX).exists():
            n, done = config.data.heldout_tokens, 0
            rows = empty_rows(n, store.index.shape)  # in memory once: they may be most of what there is
            activations = tensor_of(rows, store.index.shape)
            for batch in store.client.heldout(min(64, store.batch_rows)):
                if (end := done + len(batch.row)) > n:
                    raise UserError(f"the server {store.path} has more than data.heldout_tokens={n} held-out rows: "
                                    "set it to their number")  # fmt: skip
                activations[done:end] = batch.activations
                for name in COLUMN_DTYPES:
                    rows[name][done:end] = getattr(batch, name)
                done = end
            columns = {name: rows[name][:done] for name in COLUMN_DTYPES}
            write_store(path, activations[:done], config.data.shard_rows, columns, **fields)
        if not (train := path.with_name("train") / STATISTICS).exists():  # `clt eval` wants them later
            train.parent.mkdir(exist_ok=True)
            store.statistics.save(train)
    index = read_index(path)
    check_store(index, config)
    if config.eval.replacement_tokens:  # which are read from this machine's files
        check_files(index, config)
