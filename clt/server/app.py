"""The activation server: `clt serve`, or `uvicorn clt.server.app:app` configured by the environment.

CLT_CONFIG is a YAML file or preset (default: `test` over configs/quickstart.yaml), CLT_SERVER_<FIELD> any field of the
config's server section, and CLT_SERVER_TOKEN the bearer token that clients must send.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hmac
import logging
import re
import signal
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from torch import Tensor
from xxhash import xxh3_64_hexdigest

from clt.config import environment_config
from clt.data.index import STATISTICS, read_index
from clt.data.raw_rows import COLUMNS, RawRows, tensor_of
from clt.data.store import DiscBuffer
from clt.files import read_token
from clt.local import Local, refused
from clt.memory import keep_freed_memory
from clt.server.generator import end_with_parent, lead
from clt.server.run import close_buffer, folder, open_buffer
from clt.server.wire import ENDLESS, frame, frame_bytes

log = logging.getLogger("uvicorn.error")
log.addFilter(lambda record: "without completing response" not in str(record.msg))  # of a stream that was ended
QUERIES = {
    "/activations": {"batch_size": (1, 1)},
    "/activations/tensor": {"batch_size": (1, 256)},
    "/activations/stream": {"batch_size": (1, 256), "max_batches": (1, ENDLESS)},
    "/heldout": {"batch_size": (1, 64), "start": (0, 0)},
}
"""Of the paths that give rows, whose clients count among `server.max_streams`: (least, default) of each parameter."""
_PUBLIC = ("/", "/healthz")  # need no token: they tell nothing but whether the server works
_TENSOR_BYTES, _JSON_BYTES = 2 << 20, 1 << 17  # of the rows in an answer that is made at once
_BYTES = "application/octet-stream"


class Unavailable(HTTPException):
    """There are no rows, and why; `retry_after` seconds later there may be some."""

    def __init__(self, reason: str, retry_after: int = 1) -> None:
        super().__init__(503, reason, {"retry-after": str(retry_after)})


async def draw(request: Request, n: int) -> list[RawRows]:
    """n rows, at most a block. Raises Unavailable, with the generator's cause, when none come in `wait_seconds`."""
    buffer, seconds, pause = request.state.buffer, request.state.server.wait_seconds, 0.002
    end = time.monotonic() + seconds
    while (parts := buffer.draw(n)) is None:
        if (found := buffer.generator())["state"] == "failed":
            raise Unavailable(f"the generator of activations failed: {found['cause']}", 2)
        if time.monotonic() > end:
            raise Unavailable(f"the buffer had no rows for {seconds:g} seconds; its generator is {found['state']}")
        await asyncio.sleep(pause)
        pause = min(2 * pause, 0.05)
    return parts


def frames(n: int, most: int) -> list[int]:
    """The rows of the frames of a batch of n."""
    return [min(most, n - at) for at in range(0, n, most)]


class Ended(Exception):
    """A stream cannot continue. Its connection is closed; the client retries and gets the cause."""


async def stream(request: Request) -> Response:
    """Frames of `max_batches` batches of `batch_size` rows. Raises Unavailable where there are none for the first."""
    buffer = request.state.buffer
    n, count = parameters(request, batch_size=request.state.server.max_batch, max_batches=ENDLESS)
    sizes, about = frames(n, buffer.block_rows), (buffer.shape, buffer.segment)
    first = [await draw(request, sizes[0])]  # given up once it is sent

    async def pieces() -> AsyncIterator[bytes | memoryview]:
        for sequence in range(count * len(sizes)):
            try:
                rows = first.pop() if first else await draw(request, sizes[sequence % len(sizes)])
            except Unavailable as error:
                raise Ended(error.detail) from error
            for piece in frame(rows, sequence, *about):
                yield piece
            await asyncio.sleep(0)  # sending alone may never yield to the event loop, which tells of a disconnect

    # Of a known length, the pieces are passed on as they are; in chunks each would be copied.
    size = count * sum(frame_bytes(size, *about) for size in sizes)
    headers = {"x-clt-segment": buffer.segment, "content-length": str(size)}
    return StreamingResponse(pieces(), 200, headers, _BYTES)


async def batch(request: Request, most: int) -> tuple[RawRows, Tensor]:
    """The rows, and their activations (n, 2, L, D), of an answer that is made before it is sent."""
    buffer = request.state.buffer
    (n,) = parameters(request, batch_size=min(request.state.server.max_batch, most))
    parts = [part for size in frames(n, buffer.block_rows) for part in await draw(request, size)]
    whole = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    return whole, tensor_of(whole, buffer.shape)


async def tensor(request: Request) -> Response:
    """One batch (n, 2, L, D) as raw little-endian bytes; x-tensor-shape, -dtype and -xxh3 in the headers."""
    buffer = request.state.buffer
    rows, tensor = await batch(request, max(1, _TENSOR_BYTES // buffer.shape.row_bytes))
    data = rows["rows"].tobytes()
    headers = {"x-tensor-shape": ",".join(map(str, tensor.shape)), "x-tensor-dtype": buffer.shape.dtype}
    headers |= {"x-tensor-xxh3": xxh3_64_hexdigest(data), "x-clt-segment": buffer.segment}
    return Response(data, 200, headers, _BYTES)


async def activations(request: Request) -> Response:
    """A few rows as JSON: shape, dtype, segment, row, token, position, document, activations as nested lists."""
    buffer = request.state.buffer
    rows, tensor = await batch(request, max(1, min(64, _JSON_BYTES // buffer.shape.row_bytes)))
    about = {"shape": list(tensor.shape), "dtype": buffer.shape.dtype, "segment": buffer.segment}
    return JSONResponse({**about, **{name: rows[name].tolist() for name in COLUMNS}, "activations": tensor.tolist()})


async def heldout(request: Request) -> Response:
    """Frames: the held-out rows from number `start` on, in their order."""
    store: DiscBuffer = request.state.heldout
    shape = store.index.shape
    n, start = parameters(request, batch_size=request.state.server.max_batch, start=len(store))
    numbers, most = np.arange(start, len(store)), max(1, _TENSOR_BYTES // shape.row_bytes)
    batches = np.split(numbers, range(n, len(numbers), n))
    parts = [rows[at : at + most] for rows in batches for at in range(0, len(rows), most)]

    def pieces() -> Iterator[bytes | memoryview]:  # starlette asks for each in a thread, as the disk is read
        for sequence, rows in enumerate(parts):
            yield from frame([store.read_raw(rows)], sequence, shape, "")

    size = sum(frame_bytes(len(rows), shape, "") for rows in parts)
    return StreamingResponse(pieces(), 200, {"content-length": str(size)}, _BYTES)


async def stats(request: Request) -> Response:
    """JSON: the buffer's counters and the last of them, the generator, the largest batch_size."""
    return JSONResponse({**request.state.buffer.stats(), "max_batch": request.state.server.max_batch})


async def refresh(request: Request) -> Response:
    """JSON: how many of the buffer's rows were dropped; the generator makes others."""
    return JSONResponse({"dropped": request.state.buffer.refresh()})


async def health(request: Request) -> Response:
    """200 while rows can be expected, 503 when the generator has failed."""
    if (state := request.state.buffer.generator()["state"]) == "failed":
        raise Unavailable("the generator has failed", 2)
    return JSONResponse({"status": "ok", "generator": state})


async def kept(request: Request) -> Response:
    """What `lifespan` has made."""
    return request.state.kept[request.url.path]


def parameters(request: Request, **most: int) -> list[int]:
    """The query's integers, in the order of `most`, which gives each one's maximum. Raises HTTPException for others."""
    known, given = QUERIES[request.url.path], request.query_params
    values = {name: min(default, most[name]) for name, (_, default) in known.items()}
    for name, text in given.items():
        if name not in known:
            raise HTTPException(400, f"unknown parameter {name[:40]!r}; known: {', '.join(known)}")
        if len(given.getlist(name)) > 1 or not re.fullmatch("-?[0-9]{1,100}", text):
            raise HTTPException(400, f"parameter {name} is {text[:40]!r}; wanted one whole number")
        if not known[name][0] <= int(text) <= most[name]:
            raise HTTPException(422, f"parameter {name} is {text[:40]}; wanted {known[name][0]} to {most[name]}")
        values[name] = int(text)
    return [values[name] for name in most]


class Guard:
    """Refuses before anything else is done, and ends answers that are not read."""

    def __init__(self, app: ASGIApp) -> None:
        self.app, self.local = app, Local(app, _PUBLIC)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        idle, abort = scope["state"]["server"].idle_seconds, scope["state"]["abort"]
        inner, loop = self.local if scope["state"]["token"] is None else self.app, asyncio.get_running_loop()

        async def send_in_time(message: Message) -> None:
            timer = loop.call_later(idle, abort)  # then uvicorn tells the app that its client has left
            try:
                await send(message)
            finally:
                timer.cancel()

        try:
            with admitted(scope, Headers(scope=scope)):
                await inner(scope, receive, send_in_time)
        except HTTPException as error:
            await (await refused(Request(scope), error))(scope, receive, send_in_time)
        except Ended as error:  # uvicorn closes the connection of an answer that is not complete, once it is sent
            loop.call_later(idle, abort)
            log.warning("a stream was ended: %s", error)


@contextlib.contextmanager
def admitted(scope: Scope, headers: Headers) -> Iterator[None]:
    """Count a client of rows until its last byte is sent. Raises HTTPException for a request that gets no answer."""
    state, path, counts = scope["state"], scope["path"], scope["path"] in QUERIES
    token, buffer, most = state["token"], state["buffer"], state["server"].max_streams
    if scope["method"] == "HEAD" and counts:
        raise HTTPException(405, "the answer to HEAD would cost its rows", {"allow": "GET"})
    if token is not None:
        scheme, _, given = headers.get("authorization", "").partition(" ")
        right = hmac.compare_digest(given.strip().encode("latin-1"), token.encode()) and scheme.lower() == "bearer"
        if path not in _PUBLIC and not right:
            what = "the token is not this server's" if given else "this server wants its token"
            raise HTTPException(401, f"{what}, as Authorization: Bearer TOKEN", {"www-authenticate": "Bearer"})
    if counts and buffer.living()["clients"].sum() >= most:
        raise Unavailable(f"{most} clients are being served already (server.max_streams)")
    buffer.line["clients"] += counts
    try:
        yield
    finally:
        buffer.line["clients"] -= counts


@contextlib.asynccontextmanager
async def lifespan(app: Starlette) -> AsyncIterator[dict[str, Any]]:
    """From the first to the last request of one worker."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    end_with_parent(signal.SIGTERM)  # uvicorn takes signals for later, but what is prepared may take hours
    config = environment_config()
    keep_freed_memory(1 << 28)
    token, buffer, path = read_token(config.server.token_file), open_buffer(config), folder(config)
    for number, handler in handlers.items():
        signal.signal(number, handler)
    index, heldout = read_index(path), DiscBuffer(Path(config.data.store) / "heldout")
    fingerprints = heldout.index.fingerprints and index.fingerprints and heldout.index.fingerprints | index.fingerprints
    served = dataclasses.replace(index, shards=[], fingerprints=fingerprints)  # a client's held-out rows get it, too
    kept = {
        "/": HTMLResponse(Path(__file__).with_name("page.html").read_text()),
        "/index": JSONResponse(dataclasses.asdict(served)),
        "/statistics": Response((path / STATISTICS).read_bytes(), media_type=_BYTES),
    }
    leading = asyncio.create_task(lead(config, buffer))
    try:
        yield {"abort": lambda: log.warning("no slow client is dropped without --http clt.server.protocol:Protocol"),
               "server": config.server, "token": token, "buffer": buffer, "heldout": heldout, "kept": kept}  # fmt: skip
    finally:
        leading.cancel()
        await asyncio.wait([leading])
        await asyncio.to_thread(close_buffer, config, buffer)  # it may wait for others that close theirs


_GET = {"/": kept, "/index": kept, "/statistics": kept, "/healthz": health, "/stats": stats, "/heldout": heldout,
        "/activations": activations, "/activations/tensor": tensor, "/activations/stream": stream}  # fmt: skip
ROUTES = [*(Route(path, answer) for path, answer in _GET.items()), Route("/refresh", refresh, methods=["POST"])]
app = Starlette(False, ROUTES, [Middleware(Guard)], exception_handlers={HTTPException: refused}, lifespan=lifespan)
app.router.redirect_slashes = False
