"""Activations over the network: the config section `server`, and the environment's variables for it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Annotated, Literal

from clt.errors import UserError
from clt.parsing import names
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
    """Most rows in a batch. A JSON batch has at most 64 rows and 128 KB, a tensor 2 MB."""
    max_streams: Annotated[int, POSITIVE] = 64
    """Clients that receive rows at the same time, over all workers."""
    wait_seconds: Annotated[float, POSITIVE] = 30.0
    """Seconds that a request waits for its first rows before it is answered 503."""
    idle_seconds: Annotated[float, POSITIVE] = 60.0
    """Seconds that a client may take to read what it was sent (2 MB at most) before it is dropped."""


SERVER_VARIABLES = {f"CLT_SERVER_{name.upper()}": f"server.{name}" for name in names(ServerConfig)}
"""Variables of the environment that set a field, and which."""


def environment_overrides() -> list[str]:
    """What SERVER_VARIABLES set, as overrides of a config. Raises UserError for a CLT_SERVER_ that sets nothing."""
    for name in os.environ:
        if name.startswith("CLT_SERVER_") and name not in {*SERVER_VARIABLES, "CLT_SERVER_TOKEN"}:
            known = ", ".join(["CLT_SERVER_TOKEN", *SERVER_VARIABLES])
            raise UserError(f"{name} in the environment sets nothing; known: {known}")
    return [f"{key}={os.environ[name]}" for name, key in SERVER_VARIABLES.items() if name in os.environ]
