"""`clt serve`: the buffer, then uvicorn with as many workers as the config says."""

from __future__ import annotations

import hashlib
import os
import signal
import socket
import sys
from typing import Any

import uvicorn

from clt.config import DEFAULT_CONFIG, PRESETS, Config, ServerConfig, load_config
from clt.data.index import write_whole
from clt.errors import UserError
from clt.parsing import names, to_yaml
from clt.server.limits import is_loopback
from clt.server.prepare import own_folder
from clt.server.supervisor import ensure
from clt.server.token import read_token

_GRACE_SECONDS = 5  # for streams to end after Ctrl-C or SIGTERM


def environment_overrides() -> list[str]:
    """What CLT_SERVER_<FIELD> set, as overrides of a config."""
    known = {_variable(name): f"server.{name}" for name in names(ServerConfig)}
    for name in os.environ:
        if name.startswith("CLT_SERVER_") and name not in {*known, "CLT_SERVER_TOKEN", "CLT_SERVER_OPEN"}:
            raise UserError(f"{name} in the environment sets nothing; known: CLT_SERVER_TOKEN, {', '.join(known)}")
    return [f"{key}={os.environ[name]}" for name, key in known.items() if name in os.environ]


def environment_config() -> Config:
    """The config that the environment asks for; raises UserError as `load_config` does."""
    path = os.environ.get("CLT_CONFIG")
    if path is None or path in PRESETS:
        return load_config(DEFAULT_CONFIG, preset=path or "test", environment=environment_overrides())
    return load_config(path, environment=environment_overrides())


def _variable(field: str) -> str:
    return f"CLT_SERVER_{field.upper()}"


def serve(config: Config, without_token: bool = False, **options: Any) -> None:
    """Serve until Ctrl-C or SIGTERM; `options` are uvicorn's.

    Raises UserError for an address that other machines reach when there is no token, and as `ensure` does.
    """
    server = config.server
    token = read_token(server.token_file)
    if token is None and not is_loopback(server.host) and not without_token:
        raise UserError(
            f"server.host={server.host} lets other machines in but there is no token: set server.token_file (or "
            "CLT_SERVER_TOKEN), or say --without-token if the network itself keeps strangers out"
        )
    with socket.socket(socket.AF_INET6 if ":" in server.host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((server.host, server.port))
        except OSError as error:
            raise UserError(
                f"server.host={server.host} server.port={server.port}: {error.strerror}; choose others"
            ) from error
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(0))  # uvicorn raises it again when all is shut down
    ensure(config).close(stay=True)  # for the workers: they may die and come back without its being made anew
    text = to_yaml(config).encode()
    file = own_folder(config) / f"serve-{hashlib.sha256(text).hexdigest()[:8]}.yaml"  # stays: a worker may start anew
    write_whole(file, text)
    os.environ["CLT_CONFIG"], os.environ["CLT_SERVER_OPEN"] = str(file), str(int(without_token))
    for name in names(ServerConfig):  # they are in the config already, below the command line's
        os.environ.pop(_variable(name), None)
    print(f"serving on {server.host}:{server.port}, {'with' if token else 'without'} a token", file=sys.stderr)
    uvicorn.run(
        "clt.server.app:app",
        host=server.host,
        port=server.port,
        workers=server.workers,
        http="clt.server.protocol:Protocol",
        ws="none",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=_GRACE_SECONDS,
        **options,
    )
