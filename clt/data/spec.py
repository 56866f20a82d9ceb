"""Activations at rest: the config section `data`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from clt.errors import UserError
from clt.lm.spec import Dtype
from clt.ranges import FREE, POSITIVE, SEED


@dataclass
class DataConfig:
    """Activations at rest and how they are read."""

    source: Literal["store", "server"] = "store"
    """Read the run's own store, or rows that an activation server streams."""
    url: Annotated[str | None, FREE] = None
    """The server of `source: server`, e.g. http://127.0.0.1:8000."""
    token_file: Annotated[str | None, FREE] = None
    """File with the bearer token that the server asks for; null takes CLT_SERVER_TOKEN, or sends none."""

    store: Annotated[str, FREE] = "stores/default"
    """Directory of the activation stores: `train/` and `heldout/` below it."""
    train_tokens: Annotated[int, POSITIVE] = 10_000_000
    """Rows (tokens) to extract for training."""
    heldout_tokens: Annotated[int, POSITIVE] = 100_000
    """Rows (tokens) to extract from held-out text."""
    dtype: Dtype = "float16"
    """Dtype of the stored activations."""
    shard_rows: Annotated[int, POSITIVE] = 32_768
    """Rows in a shard file."""
    open_shards: Annotated[int, POSITIVE] = 8
    """Shards filled at once: rows are shuffled over these alone; an interrupted extraction repeats these at most."""
    block_rows: Annotated[int, POSITIVE] = 64
    """Contiguous rows read at once; a batch is made of blocks from random places, so its rows are not independent."""
    seed: Annotated[int, SEED] = 0
    """Seed of the shuffle that the store is written in."""
    prefetch: Annotated[int, POSITIVE, FREE] = 4
    """Batches that the background reader keeps ready."""


def check_data(data: DataConfig) -> None:
    """Raise UserError for a server without an address, and for an address that holds a password."""
    if data.source == "server" and data.url is None:
        raise UserError("data.source=server but data.url is null: set it to the server's, e.g. http://127.0.0.1:8000")
    if "@" in (data.url or "").partition("://")[2].partition("/")[0]:
        # It would be printed, and written into run directories and to W&B.
        raise UserError("data.url has a user's name or password in it; wanted http://HOST:PORT, and data.token_file")
