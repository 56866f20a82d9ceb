"""`clt serve`: the shared buffer and what must exist before it, then uvicorn with the config's workers."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from pathlib import Path
from typing import Any

import uvicorn

from clt.config import SERVER_VARIABLES, Config, digest
from clt.data.feed import describe_feed, feed_hash, load_place, save_place
from clt.data.index import write_atomically
from clt.data.lock import locked
from clt.errors import UserError, size_text, tell
from clt.files import read_token
from clt.local import check_address, is_loopback
from clt.parsing import to_yaml
from clt.server.buffer import Buffer

_BLOCK_BYTES, _BLOCKS = 3 << 20, 16  # of a block, at most (8 MB are sent a third more slowly), and blocks at least
_GRACE_SECONDS = 5  # for streams to end after Ctrl-C or SIGTERM
_PREPARE_SECONDS, _CLOSE_SECONDS = 86_400.0, 10.0  # to wait for another process that starts or ends this server


def folder(config: Config) -> Path:
    """The directory whose index.json and stats.safetensors describe the rows that are served."""
    return Path(config.data.store) / "train" if config.server.source == "store" else own_folder(config)


def own_folder(config: Config) -> Path:
    """The directory of what one server keeps: its config, its place in the text, statistics."""
    name = config.server.name
    return Path(config.data.store) / ("server" if name is None else f"server-{name}")


def buffer_name(config: Config) -> str:
    """The name of the config's buffer: `server.name`, else one for this user and the path of `data.store`."""
    path = f"{os.geteuid()}:{os.path.realpath(config.data.store)}"
    return config.server.name or digest(path)[:16]


def tag(config: Config) -> str:
    """128 hexadecimal digits that two configs share if and only if they ask for the same buffer.

    The first 64 are those of the rows alone, and of the order in which they come.
    """
    server = config.server
    size = [server.rows, server.open_share, server.device, server.statistics_tokens]
    return feed_hash(config) + digest([os.path.realpath(config.data.store), *size])


def open_buffer(config: Config, join: bool = True) -> Buffer:
    """The config's shared buffer, joined if so asked; made, with what must exist before, where there is none.

    One that a crash left behind is taken over: its rows are as good as before. Raises UserError for what is wrong with
    the config, memory that is missing, and a running server of another config on this buffer.
    """
    own_folder(config).mkdir(parents=True, exist_ok=True)
    with locked(own_folder(config), wait=_PREPARE_SECONDS):
        buffer = None
        with contextlib.suppress(FileNotFoundError):
            buffer = Buffer(buffer_name(config))
        if buffer is not None and buffer.tag != tag(config):
            if len(buffer.living()):
                raise UserError(f"a server with other settings runs on {buffer.path}: stop it, or set server.name")
            record(config, buffer)
            buffer.path.unlink(missing_ok=True)
            buffer = None  # its memory goes before the next is asked for
        buffer = buffer or _create(config)
        if join:
            buffer.join()
        return buffer


def close_buffer(config: Config, buffer: Buffer) -> None:
    """Leave the buffer; the last one records the place in the text and removes the buffer."""
    try:
        with locked(own_folder(config), wait=_CLOSE_SECONDS):
            buffer.leave()
            if len(buffer.living()) == 0 and not buffer.removed():
                record(config, buffer)
                buffer.path.unlink()
    except (UserError, OSError) as error:  # e.g. the folder has gone
        tell(f"{buffer.path} is left behind: {error}")


def _create(config: Config) -> Buffer:
    mark, server = load_place(own_folder(config), feed_hash(config)), config.server
    shape = describe_feed(config, folder(config), sys.stderr.isatty()).shape
    block_rows = 1 << max(1, min(_BLOCK_BYTES // shape.row_bytes, server.rows // _BLOCKS)).bit_length() - 1
    blocks = max(2, server.rows // block_rows)
    open_blocks = min(blocks - 1, max(1, round(server.open_share * blocks)))
    size = size_text(blocks * block_rows * shape.row_bytes)
    tell(f"shared buffer: {blocks} blocks of {block_rows} rows {shape}, {size}; a client takes three more at most")
    return Buffer.create(buffer_name(config), (blocks, block_rows, open_blocks), shape, tag(config), mark)


def record(config: Config, buffer: Buffer) -> None:
    """Save the place in the text. A server that starts without the buffer goes on from it."""
    save_place(own_folder(config), buffer.tag[:64], buffer.progress["mark"].tolist())


def serve(config: Config, **options: Any) -> None:
    """Serve until Ctrl-C or SIGTERM; `options` are uvicorn's.

    Raises UserError for an address that other machines reach when there is no token, and as `open_buffer` does.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job of a shell inherits it as ignored
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(0))  # uvicorn raises it again when all is shut down
    host, port = config.server.host, config.server.port
    if read_token(config.server.token_file) is None and not is_loopback(host):
        raise UserError(f"server.host={host} lets other machines in, who need a token: set server.token_file")
    check_address(host, port, ("server.host", "server.port"))
    buffer = open_buffer(config, join=False)
    try:
        file = own_folder(config) / f"serve-{port}.yaml"  # stays, for new workers
        write_atomically(file, to_yaml(config).encode())
        os.environ["CLT_CONFIG"] = str(file)
        for name in SERVER_VARIABLES:  # they are in the config already, below the command line's
            os.environ.pop(name, None)
        uvicorn.run("clt.server.app:app", host=host, port=port, workers=config.server.workers, ws="none",
                    http="clt.server.protocol:Protocol", access_log=False, server_header=False,
                    timeout_graceful_shutdown=_GRACE_SECONDS, **options)  # fmt: skip
    finally:
        close_buffer(config, buffer)
