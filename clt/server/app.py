"""The activation server: `clt serve`, or `uvicorn clt.server.app:app` configured by the environment.

CLT_CONFIG            YAML file or preset (default: configs/quickstart.yaml with preset `test`)
CLT_SERVER_<FIELD>    any field of the config's server section, e.g. CLT_SERVER_ROWS=8192
CLT_SERVER_TOKEN      the bearer token that clients must send
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import json
import logging
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route
from xxhash import xxh3_64_hexdigest

from clt.data.index import STATISTICS, read_index
from clt.data.store import DiscBuffer
from clt.memory import keep_freed_memory
from clt.server.buffer import Batch
from clt.server.limits import Guard, parameters
from clt.server.prepare import folder
from clt.server.responses import Counted, Pieces, until_gone
from clt.server.run import environment_config
from clt.server.supply import Drawn, Supply, Unavailable
from clt.server.token import read_token
from clt.server.wire import PIECE, Layout, as_bytes, error_frame, layout

log = logging.getLogger("uvicorn.error")
PAGE = Path(__file__).parent / "page.html"
_PARENT_SECONDS = 1.0
_NUMBER = 24  # bytes of a float as JSON, at most


@contextlib.asynccontextmanager
async def lifespan(app: Starlette) -> AsyncIterator[dict[str, Any]]:
    """From the first to the last request of one worker."""
    config = environment_config()
    keep_freed_memory(1 << 28)
    token = read_token(config.server.token_file)
    supply = Supply(config)
    tasks = [asyncio.create_task(_end_with_parent())]
    with _signals_end_it():
        await supply.open()
    tasks.append(asyncio.create_task(supply.watch()))
    try:
        yield {
            "config": config,
            "supply": supply,
            "token": token,
            "open": os.environ.get("CLT_SERVER_OPEN") == "1",
            "idle_seconds": config.server.idle_seconds,
            "answer_seconds": config.server.stream_seconds + config.server.idle_seconds,
            "index": {**dataclasses.asdict(read_index(folder(config))), "shards": []},
            "statistics": (folder(config) / STATISTICS).read_bytes(),
            "heldout": DiscBuffer(Path(config.data.store) / "heldout"),
            "page": PAGE.read_text(),
        }
    finally:
        for task in tasks:
            task.cancel()
        await supply.close()


async def _end_with_parent() -> None:
    """uvicorn's process of its workers; when it was killed, nobody else would end them."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return
    while parent.is_alive():
        await asyncio.sleep(_PARENT_SECONDS)
    log.error("the parent of this worker has died; it ends, too")
    os.kill(os.getpid(), signal.SIGTERM)


@contextlib.contextmanager
def _signals_end_it() -> Iterator[None]:
    """uvicorn takes Ctrl-C and SIGTERM for later, but what is prepared may take hours; it ends with this process."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, signal.SIG_DFL) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


async def stream(request: Request) -> Response:
    """GET /activations/stream: frames of `batch_size` rows, `max_batches` of them or without end."""
    supply: Supply = request.state.supply
    most = _most(request)
    given = parameters(request, batch_size=(1, most, min(256, most)), max_batches=(1, 10**9, None))
    n, count = given["batch_size"] or 0, given["max_batches"]
    # An error before the first frame is a status, not a frame.
    drawn = await until_gone(request.receive, supply.draw(n))
    size = None if count is None else count * _layout(drawn).size
    return Pieces(_frames(supply, count, drawn), size, {"x-clt-segment": drawn.buffer.segment}, drawn.release)


async def _frames(supply: Supply, count: int | None, drawn: Drawn) -> AsyncGenerator[bytes | memoryview, None]:
    """The pieces of a stream's frames; `drawn` are the rows of the first."""
    end, sequence, n = time.monotonic() + supply.config.server.stream_seconds, 0, len(drawn)
    try:
        for sequence in itertools.count(1):
            form = _layout(drawn)
            left = form.size
            for piece in form.pieces(drawn.columns, sequence - 1, drawn.copy):
                left -= len(piece)
                if left == 0:  # counted before the client can have it whole
                    drawn.release()
                    supply.add_served(drawn.buffer, n, form.size)
                yield piece
            if sequence == count or time.monotonic() > end:
                return
            drawn = await supply.draw(n, drawn.slow)
    except Unavailable as error:
        log.warning("a stream was ended: %s", error)
        yield error_frame(sequence, str(error), error.retry_after)
    finally:
        drawn.release()


def _layout(drawn: Drawn) -> Layout:
    buffer = drawn.buffer
    return layout(len(drawn), buffer.n_layers, buffer.d_acts, buffer.dtype, buffer.segment)


async def tensor(request: Request) -> Response:
    """GET /activations/tensor: one batch as raw bytes (n, 2, L, D), little-endian; shape and dtype in the headers."""
    supply: Supply = request.state.supply
    most = _most(request)
    n = parameters(request, batch_size=(1, most, min(256, most)))["batch_size"] or 0
    batch, buffer, release = await until_gone(request.receive, supply.batch(n, n * supply.buffer.row_bytes))
    data = as_bytes(batch.activations)
    try:
        checksum = await supply.run(xxh3_64_hexdigest, data)
    except BaseException:
        release()
        raise
    headers = {
        "x-tensor-shape": ",".join(map(str, batch.activations.shape)),
        "x-tensor-dtype": buffer.dtype,
        "x-tensor-xxh3": checksum,
        "x-clt-segment": buffer.segment,
    }

    async def pieces() -> AsyncGenerator[memoryview, None]:
        for start in range(0, len(data), PIECE):
            if start + PIECE >= len(data):  # counted before the client can have it whole
                supply.add_served(buffer, n, len(data))
            yield data[start : start + PIECE]

    return Pieces(pieces(), len(data), headers, release)


async def activations(request: Request) -> Response:
    """GET /activations: a few rows as JSON."""
    supply: Supply = request.state.supply
    most = min(_most(request), request.state.config.server.max_json_batch)
    n = parameters(request, batch_size=(1, most, 1))["batch_size"] or 0
    size = n * supply.buffer.n_layers * 2 * supply.buffer.d_acts * _NUMBER
    batch, buffer, release = await until_gone(request.receive, supply.batch(n, size))
    try:
        text = await supply.run(_json, batch, buffer.dtype, buffer.segment)
    except BaseException:
        release()
        raise

    async def pieces() -> AsyncGenerator[bytes, None]:
        supply.add_served(buffer, n, len(text))
        yield text

    return Pieces(pieces(), len(text), {"content-type": "application/json"}, release)


def _json(batch: Batch, dtype: str, segment: str) -> bytes:
    """Written layer by layer: one call for all of it would keep the other threads waiting."""
    about = {"shape": list(batch.activations.shape), "dtype": dtype, "segment": segment}
    about |= {name: getattr(batch, name).tolist() for name in ("row", "token", "position", "document")}
    rows = [[_list(json.dumps(layer.tolist()) for layer in side) for side in row] for row in batch.activations.float()]
    return f'{json.dumps(about)[:-1]}, "activations": {_list(_list(row) for row in rows)}}}'.encode()


def _list(items: Iterable[str]) -> str:
    return f"[{','.join(items)}]"


async def heldout(request: Request) -> Response:
    """GET /heldout: the held-out rows from number `start` on, in their order, as frames of `batch_size` rows."""
    supply: Supply = request.state.supply
    store: DiscBuffer = request.state.heldout
    most = request.state.config.server.max_batch
    given = parameters(request, batch_size=(1, most, min(256, most)), start=(0, len(store), 0))
    n, start = given["batch_size"] or 0, given["start"] or 0
    parts = [range(at, min(at + n, len(store))) for at in range(start, len(store), n)]

    async def pieces() -> AsyncGenerator[memoryview, None]:
        for sequence, rows in enumerate(parts):
            frame = _heldout_frame(store, rows, sequence)
            while piece := await supply.run(_next, frame):  # it reads the disc, so in a thread
                yield piece

    return Pieces(pieces(), sum(_heldout_layout(store, len(rows)).size for rows in parts), {})


def _next(pieces: Iterator[memoryview]) -> memoryview | None:
    return next(pieces, None)


def _heldout_layout(store: DiscBuffer, n: int) -> Layout:
    return layout(n, store.index.n_layers, store.index.d_acts, store.index.dtype)


def _heldout_frame(store: DiscBuffer, rows: range, sequence: int) -> Iterator[memoryview]:
    form, numbers = _heldout_layout(store, len(rows)), np.array(rows)
    names = ("token", "position", "document")
    columns = dict(zip(names, (store.tokens(rows), store.positions(rows), store.documents(rows))))

    def copy(part: slice, out: memoryview) -> None:
        views = [out[start : start + form.row_bytes] for start in range(0, len(out), form.row_bytes)]
        store.read_into(numbers[part], views)

    yield from form.pieces({**columns, "row": numbers}, sequence, copy)


async def stats(request: Request) -> Response:
    """GET /stats: the buffer's counters, the rate of serving and its history, the generator, the largest batch_size."""
    parameters(request)
    return JSONResponse({**request.state.supply.stats(), "max_batch": _most(request)})


async def index(request: Request) -> Response:
    """GET /index: what a row is and where it comes from, in the form of a store's index.json without shards."""
    parameters(request)
    return JSONResponse(request.state.index)


async def statistics(request: Request) -> Response:
    """GET /statistics: mean and sd of the training rows, the bytes of a store's stats.safetensors."""
    parameters(request)
    return Response(request.state.statistics, media_type="application/octet-stream")


async def refresh(request: Request) -> Response:
    """POST /refresh: drop the buffer's rows; the generator makes others."""
    parameters(request)
    supply: Supply = request.state.supply
    return JSONResponse({"dropped": await supply.run(supply.buffer.refresh)})


async def health(request: Request) -> Response:
    """GET /healthz: 200 while rows can be expected, 503 when the generator is down."""
    parameters(request)
    state = request.state.supply.buffer.generator()["state"]
    if state in ("failed", "stopped"):
        raise Unavailable(f"the generator has {state}", 2)
    return JSONResponse({"status": "ok", "generator": state})


async def page(request: Request) -> Response:
    """GET /: the status page. It asks /stats, so it shows nothing to a person without the token."""
    parameters(request)
    policy = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'"
    return HTMLResponse(request.state.page, headers={"content-security-policy": policy})


def _most(request: Request) -> int:
    return min(request.state.config.server.max_batch, request.state.supply.buffer.rows)


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    reason = error.detail
    if error.status_code == 404:
        reason = f"this activation server has nothing there; wanted one of {', '.join(route.path for route in ROUTES)}"
    elif error.status_code == 405 and error.headers:
        reason = f"{request.method} is not what this answers to; wanted {error.headers.get('Allow', 'GET')}"
    return JSONResponse({"error": reason}, error.status_code, error.headers)


async def _unavailable(request: Request, error: Exception) -> Response:
    assert isinstance(error, Unavailable)
    return JSONResponse({"error": str(error)}, 503, {"retry-after": str(error.retry_after)})


async def _failed(request: Request, error: Exception) -> Response:
    return JSONResponse({"error": f"a bug in the server ({type(error).__name__}); its log has the traceback"}, 500)


ROUTES = [
    Route("/", page, methods=["GET"]),
    Route("/healthz", health, methods=["GET"]),
    Route("/stats", stats, methods=["GET"]),
    Route("/index", index, methods=["GET"]),
    Route("/statistics", statistics, methods=["GET"]),
    Route("/heldout", Counted(heldout), methods=["GET"]),
    Route("/activations", Counted(activations), methods=["GET"]),
    Route("/activations/tensor", Counted(tensor), methods=["GET"]),
    Route("/activations/stream", Counted(stream), methods=["GET"]),
    Route("/refresh", refresh, methods=["POST"]),
]
app = Starlette(
    routes=ROUTES,
    middleware=[Middleware(Guard)],
    exception_handlers={HTTPException: _refused, Unavailable: _unavailable, Exception: _failed},
    lifespan=lifespan,
)
app.router.redirect_slashes = False
