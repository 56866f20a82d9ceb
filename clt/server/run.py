"""`clt serve`: the shared buffer and what must exist before it, then uvicorn with the config's workers."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import ipaddress
import json
import multiprocessing
import os
import resource
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clt.config import DEFAULT_CONFIG, PRESETS, Config, ServerConfig, load_config
from clt.data.index import write_json, write_whole
from clt.data.lock import locked
from clt.errors import UserError
from clt.parsing import names, to_yaml

if TYPE_CHECKING:
    from clt.server.buffer import Buffer

_BLOCK_BYTES, _BLOCKS = 2 << 20, 16  # of a block, about (8 MB are sent a third more slowly), and blocks at least
_GRACE_SECONDS = 5  # for streams to end after Ctrl-C or SIGTERM
_TRAINING = ("source", "url", "token_file", "store", "prefetch")  # of the data section: not what the rows are
_PREPARE_SECONDS, _CLOSE_SECONDS = 86_400.0, 10.0  # to wait for another process that starts or ends this server
SIGNALS = (signal.SIGINT, signal.SIGTERM)


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
    """64 hexadecimal digits that two configs share if and only if they ask for the same buffer of the same rows."""
    server, store = dataclasses.asdict(config.server), os.path.realpath(config.data.store)
    same = ("rows", "open_share", "device", "statistics_tokens")
    return _digest([rows_tag(config), store, *(server[key] for key in same)])


def rows_tag(config: Config) -> str:
    """The same of the rows alone, and the order in which they come."""
    data = {key: value for key, value in dataclasses.asdict(config.data).items() if key not in _TRAINING}
    parts = [dataclasses.asdict(part) for part in (config.lm, config.text)]
    return _digest([*parts, data, config.server.source, config.run.seed])


def _digest(parts: list[Any]) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def open_buffer(config: Config, join: bool = True) -> Buffer:
    """The config's shared buffer, joined if so asked; made, with what must exist before, where there is none.

    One that a crash left behind is taken over: its rows are as good as before. Raises UserError for what is wrong with
    the config, memory that is missing, and a running server of another config on this buffer.
    """
    own_folder(config).mkdir(parents=True, exist_ok=True)
    with _alone(own_folder(config), _PREPARE_SECONDS):
        buffer = _attach(config) or _create(config)
        if join:
            buffer.join()
        return buffer


def close_buffer(config: Config, buffer: Buffer) -> None:
    """Leave the buffer; the last one records the place in the text and removes the buffer."""
    try:
        with _alone(own_folder(config), _CLOSE_SECONDS):
            if buffer.leave():
                record(config, buffer)
                buffer.remove()
    except (UserError, OSError) as error:  # e.g. the folder has gone
        print(f"{buffer.path} is left behind: {error}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def _alone(directory: Path, seconds: float) -> Iterator[None]:
    """While no other process opens or closes the buffer."""
    end, told = time.monotonic() + seconds, False
    with contextlib.ExitStack() as stack:
        while True:
            try:
                stack.enter_context(locked(directory))
                break
            except UserError as error:
                if time.monotonic() > end:
                    raise UserError(f"waited {seconds:g} s in vain: {error}") from error
                if not told:
                    print(f"waiting: {error}", file=sys.stderr, flush=True)
                told = True
                time.sleep(0.1)
        yield


def _attach(config: Config) -> Buffer | None:
    from clt.server.buffer import Buffer

    try:
        buffer = Buffer.attach(buffer_name(config))
    except FileNotFoundError:
        return None
    if buffer.tag == tag(config):
        return buffer
    if buffer.members():
        raise UserError(
            f"a server with other settings runs on the buffer {buffer_name(config)!r}: stop it first, or give this "
            "one another server.name"
        )
    record(config, buffer)
    buffer.remove()
    return None


def _create(config: Config) -> Buffer:
    from clt.data.feed import describe_feed
    from clt.server.buffer import Buffer

    mark, index = _position(config), describe_feed(config, folder(config), lambda: _load(config), sys.stderr.isatty())
    shape = (index.n_layers, index.d_acts, index.dtype)
    blocks, block_rows, size = _sizes(config, *shape)
    opened = min(blocks - 1, max(1, round(config.server.open_share * blocks)))
    print(
        f"shared buffer: {blocks} blocks of {block_rows} rows (2, L={shape[0]}, D={shape[1]}) {shape[2]}, "
        f"{size / 1e9:.2f} GB of memory; clients take three blocks each beside it",
        file=sys.stderr,
        flush=True,
    )
    tags = (tag(config), rows_tag(config))
    return Buffer.create(buffer_name(config), blocks, block_rows, opened, shape, tags, mark)


def _sizes(config: Config, n_layers: int, d_acts: int, dtype: str) -> tuple[int, int, int]:
    """(blocks, rows in each, bytes of all) of the config's buffer."""
    row_bytes = 2 * n_layers * d_acts * (4 if dtype == "float32" else 2)
    block_rows = max(1, min(_BLOCK_BYTES // row_bytes, config.server.rows // _BLOCKS))
    blocks = max(2, config.server.rows // block_rows)
    return blocks, block_rows, blocks * block_rows * row_bytes


def _load(config: Config) -> Any:
    """The language model, where it is needed before the buffer is made; memory that is missing is told first."""
    from clt.lm.load import load_language_model
    from clt.memory import check_memory
    from clt.server.generator import device_for

    lm = load_language_model(config.lm, device_for(config))
    check_memory(_sizes(config, len(lm.layers), lm.d_model, config.data.dtype)[-1], Path("/dev/shm"))
    return lm


def record(config: Config, buffer: Buffer) -> None:
    """Save the place in the text: a server that is started again goes on behind the rows that were in the buffer.

    After a crash the buffer itself knows it; after a power cut the rows since the last record are repeated. A disk that
    is full or gone is no reason to stop serving.
    """
    place = {"rows": buffer.header["rows_tag"].item().decode(), "mark": buffer.header["mark"].tolist()}
    try:
        write_json(own_folder(config) / "position.json", place)
    except OSError as error:
        print(f"the place in the text was not recorded: {error}", file=sys.stderr, flush=True)


def _position(config: Config) -> tuple[int, int, int]:
    file = own_folder(config) / "position.json"
    try:
        found = json.loads(file.read_text()) if file.exists() else {}
        first, second, third = found["mark"] if found.get("rows") == rows_tag(config) else (0, 0, 0)
        if not all(type(number) is int and number >= 0 for number in (first, second, third)):
            raise ValueError(f"found {found['mark']}")
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        raise UserError(f"{file}, the place in the text, is damaged ({error}); delete it to begin anew") from error
    return first, second, third


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


def is_loopback(host: str) -> bool:
    """Whether an address (or localhost, or the path of a Unix socket) can be reached from this machine alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.startswith("/")


@contextlib.contextmanager
def signals_end_it() -> Iterator[None]:
    """uvicorn takes Ctrl-C and SIGTERM for later, but what is prepared may take hours; it ends with this process.

    A worker also ends when uvicorn's process of its workers is killed, who would otherwise be the one to end it.
    """
    from clt.server.generator import end_with

    main = threading.current_thread() is threading.main_thread()
    before = {number: signal.signal(number, signal.SIG_DFL) for number in SIGNALS} if main else {}
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    if (parent := multiprocessing.parent_process()) is not None:
        end_with(parent.pid, signal.SIGTERM)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def allow_descriptors() -> None:
    """As many open files as the machine lets this process have: each connection is one."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 65_536), hard) if hard > 0 else (65_536, hard))


def serve(config: Config, without_token: bool = False, **options: Any) -> None:
    """Serve until Ctrl-C or SIGTERM; `options` are uvicorn's.

    Raises UserError for an address that other machines reach when there is no token, and as `open_buffer` does.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job of a shell inherits it as ignored
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(0))  # uvicorn raises it again when all is shut down
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    import uvicorn

    from clt.server.client import read_token

    server = config.server
    token = read_token(server.token_file)
    if token is None and not is_loopback(server.host) and not without_token:
        raise UserError(
            f"server.host={server.host} lets other machines in but there is no token: set server.token_file (or "
            "CLT_SERVER_TOKEN), or say --without-token if the network itself keeps strangers out"
        )
    _probe(server.host, server.port)
    buffer = open_buffer(config, join=False)
    try:
        text = to_yaml(config).encode()
        file = own_folder(config) / f"serve-{hashlib.sha256(text).hexdigest()[:8]}.yaml"  # stays, for new workers
        write_whole(file, text)
        os.environ["CLT_CONFIG"], os.environ["CLT_SERVER_OPEN"] = str(file), str(int(without_token))
        for name in names(ServerConfig):  # they are in the config already, below the command line's
            os.environ.pop(_variable(name), None)
        print(f"serving on {server.host}:{server.port}, {'with' if token else 'without'} a token", file=sys.stderr)
        uvicorn.run("clt.server.app:app", host=server.host, port=server.port, workers=server.workers, ws="none",
                    http="clt.server.protocol:Protocol", access_log=False, server_header=False,
                    timeout_graceful_shutdown=_GRACE_SECONDS, **options)  # fmt: skip
    finally:
        close_buffer(config, buffer)


def _probe(host: str, port: int) -> None:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise UserError(f"server.host={host} server.port={port}: {error.strerror}; choose others") from error
