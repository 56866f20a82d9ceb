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
    """Rows (tokens) that the shared buffer holds, about: it consists of blocks of 2 MB."""
    open_share: Annotated[float, SHARE] = 0.5
    """Share of the buffer over which new rows are scattered: the larger, the better they are mixed."""
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
    """File, its owner's alone, with the bearer token that clients must send; null: CLT_SERVER_TOKEN, or none."""
    max_batch: Annotated[int, POSITIVE] = 8192
    """Rows in a batch at most; in JSON 64, as a tensor 16 MB or a block."""
    max_streams: Annotated[int, POSITIVE] = 64
    """Clients that are sent rows at once, over all workers."""
    wait_seconds: Annotated[float, POSITIVE] = 30.0
    """How long a request waits for rows before it is told to come again."""
    idle_seconds: Annotated[float, POSITIVE] = 60.0
    """How long a client may take to read what it was sent, 2 MB at most, before it is dropped."""
