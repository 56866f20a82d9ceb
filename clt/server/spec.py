"""The config section `server`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from clt.ranges import NAME, PORT, POSITIVE, SHARE


@dataclass
class ServerConfig:
    """Activations over the network: the shared buffer, the generator that fills it, and the limits of its clients."""

    name: Annotated[str | None, NAME] = None
    """Name of the buffer in shared memory; null derives it from `data.store`."""
    source: Literal["model", "store"] = "model"
    """Fill the buffer by running the language model over the training text, or from the training store, endlessly."""
    rows: Annotated[int, POSITIVE] = 32_768
    """About how many rows (tokens) the shared buffer holds; it consists of blocks of 2 MB."""
    open_share: Annotated[float, SHARE] = 0.5
    """Share of the buffer over which new rows are scattered; a larger share mixes them better."""
    device: Literal["auto", "cpu", "gpu"] = "auto"
    """Where the language model runs; `auto` takes a GPU if there is one."""
    statistics_tokens: Annotated[int, POSITIVE] = 100_000
    """Rows (tokens) that the statistics of `source: model` are computed from, once."""
    host: str = "127.0.0.1"
    """Address to listen on; anything but the loopback should have a `token_file`."""
    port: Annotated[int, PORT] = 8000
    """Port to listen on."""
    workers: Annotated[int, POSITIVE] = 1
    """Serving processes, 1 to 128 on one buffer."""
    token_file: str | None = None
    """File, readable by its owner alone, with the token that clients must send; null takes CLT_SERVER_TOKEN, if set."""
    max_batch: Annotated[int, POSITIVE] = 8192
    """Most rows in a batch. A JSON batch has at most 64 rows, a tensor 16 MB or one block."""
    max_streams: Annotated[int, POSITIVE] = 64
    """Clients that receive rows at the same time, over all workers."""
    wait_seconds: Annotated[float, POSITIVE] = 30.0
    """Seconds that a request waits for rows before it is answered 503."""
    idle_seconds: Annotated[float, POSITIVE] = 60.0
    """Seconds that a client may take to read what it was sent (2 MB at most) before it is dropped."""
