"""`clt serve`: the shared buffer and what must exist before it, then uvicorn with the config's workers."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
import uvicorn

from clt.config import DEFAULT_CONFIG, PRESETS, Config, ServerConfig, load_config
from clt.data.feed import describe_feed
from clt.data.index import write_json, write_whole
from clt.data.lock import locked
from clt.errors import UserError, size_text, tell
from clt.files import read_object, reading
from clt.parsing import names, to_yaml
from clt.server.buffer import Buffer
from clt.server.client import read_token
from clt.server.local import check_address, is_loopback
from clt.server.wire import Shape

_BLOCK_BYTES, _BLOCKS = 2 << 20, 16  # of a block, about (8 MB are sent a third more slowly), and blocks at least
_GRACE_SECONDS = 5  # for streams to end after Ctrl-C or SIGTERM
_PREPARE_SECONDS, _CLOSE_SECONDS = 86_400.0, 10.0  # to wait for another process that starts or ends this server
_TRAINING = ("source", "url", "token_file", "store", "prefetch")  # of the data section: not what the rows are


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
    return config.server.name or hashlib.sha256(path.encode()).hexdigest()[:16]


def tag(config: Config) -> str:
    """128 hexadecimal digits that two configs share if and only if they ask for the same buffer.

    The first 64 are those of the rows alone, and of the order in which they come.
    """
    tree = dataclasses.asdict(config)
    data, server = {key: value for key, value in tree["data"].items() if key not in _TRAINING}, tree["server"]
    rows = [tree["lm"], tree["text"], data, server["source"], config.run.seed]
    size = [server[key] for key in ("rows", "open_share", "device", "statistics_tokens")]
    parts = (rows, [os.path.realpath(config.data.store), *size])
    return "".join(hashlib.sha256(json.dumps(part, sort_keys=True).encode()).hexdigest() for part in parts)


def open_buffer(config: Config, join: bool = True) -> Buffer:
    """The config's shared buffer, joined if so asked; made, with what must exist before, where there is none.

    One that a crash left behind is taken over: its rows are as good as before. Raises UserError for what is wrong with
    the config, memory that is missing, and a running server of another config on this buffer.
    """
    own_folder(config).mkdir(parents=True, exist_ok=True)
    with _alone(config, _PREPARE_SECONDS):
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
        with _alone(config, _CLOSE_SECONDS):
            buffer.leave()
            if len(buffer.living()) == 0 and buffer.is_current():
                record(config, buffer)
                buffer.path.unlink(missing_ok=True)
    except (UserError, OSError) as error:  # e.g. the folder has gone
        tell(f"{buffer.path} is left behind: {error}")


def _alone(config: Config, seconds: float) -> contextlib.ExitStack:
    """While no other process opens or closes the buffer; such a one is waited for, and that is said."""
    end, told, stack = time.monotonic() + seconds, False, contextlib.ExitStack()
    while True:
        try:
            stack.enter_context(locked(own_folder(config)))
            return stack
        except UserError as error:
            if time.monotonic() > end:
                raise
            if not told:
                tell(f"waiting: {error}")
            told = True
            time.sleep(0.1)


def _create(config: Config) -> Buffer:
    mark, server = _position(config), config.server
    index = describe_feed(config, folder(config), functools.partial(load, config), sys.stderr.isatty())
    shape = Shape(index.n_layers, index.d_acts, index.dtype)
    block_rows = max(1, min(_BLOCK_BYTES // shape.row_bytes, server.rows // _BLOCKS))
    blocks = max(2, server.rows // block_rows)
    open_blocks = min(blocks - 1, max(1, round(server.open_share * blocks)))
    size = size_text(blocks * block_rows * shape.row_bytes)
    tell(
        f"shared buffer: {blocks} blocks of {block_rows} rows {shape}, {size}; clients take three blocks each beside it"
    )
    return Buffer.create(buffer_name(config), (blocks, block_rows, open_blocks), shape, tag(config), mark)


def load(config: Config) -> Any:
    """The language model, on `server.device`. Raises UserError for a GPU that is not there."""
    from transformers.utils.logging import disable_progress_bar

    from clt.lm.load import load_language_model

    gpu = torch.cuda.is_available()
    if config.server.device == "gpu" and not gpu:
        raise UserError("server.device=gpu but no CUDA device is available; set server.device=cpu")
    disable_progress_bar()  # a log is no place for it, and its semaphore outlives a process that is killed
    return load_language_model(config.lm, "cuda" if gpu and config.server.device != "cpu" else "cpu")


def record(config: Config, buffer: Buffer) -> None:
    """Save the place in the text. A server that starts without the buffer goes on from it."""
    try:
        place = {"rows": buffer.tag[:64], "mark": buffer.snapshot()["mark"].tolist()}
        write_json(own_folder(config) / "position.json", place)
    except OSError as error:  # a disk that is full or gone is no reason to stop serving
        tell(f"the place in the text was not recorded: {error}")


def _position(config: Config) -> tuple[int, int, int]:
    file, anew = own_folder(config) / "position.json", "it is the place in the text: delete it to begin anew"
    if not file.exists():
        return 0, 0, 0
    found = read_object(file, {"mark": list[int], "rows": str}, anew)
    with reading(file, anew):
        first, second, third = found["mark"]
    return (first, second, third) if found["rows"] == tag(config)[:64] else (0, 0, 0)


def environment_overrides() -> list[str]:
    """What CLT_SERVER_<FIELD> set, as overrides of a config."""
    known = {f"CLT_SERVER_{field.upper()}": f"server.{field}" for field in names(ServerConfig)}
    for name in os.environ:
        if name.startswith("CLT_SERVER_") and name not in {*known, "CLT_SERVER_TOKEN"}:
            raise UserError(f"{name} in the environment sets nothing; known: CLT_SERVER_TOKEN, {', '.join(known)}")
    return [f"{key}={os.environ[name]}" for name, key in known.items() if name in os.environ]


def environment_config() -> Config:
    """The config that the environment asks for; raises UserError as `load_config` does."""
    path = os.environ.get("CLT_CONFIG", "test")
    file, preset = (DEFAULT_CONFIG, path) if path in PRESETS else (path, None)
    return load_config(file, preset=preset, environment=environment_overrides())


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
        write_whole(file, to_yaml(config).encode())
        os.environ["CLT_CONFIG"] = str(file)
        for field in names(ServerConfig):  # they are in the config already, below the command line's
            os.environ.pop(f"CLT_SERVER_{field.upper()}", None)
        uvicorn.run("clt.server.app:app", host=host, port=port, workers=config.server.workers, ws="none",
                    http="clt.server.protocol:Protocol", access_log=False, server_header=False,
                    timeout_graceful_shutdown=_GRACE_SECONDS, **options)  # fmt: skip
    finally:
        close_buffer(config, buffer)
