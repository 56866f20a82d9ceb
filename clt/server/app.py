"""The activation server: `clt serve`, or `uvicorn clt.server.app:app` configured by the environment.

CLT_CONFIG            YAML file or preset (default: configs/quickstart.yaml with preset `test`)
CLT_SERVER_<FIELD>    any field of the config's server section, e.g. CLT_SERVER_ROWS=8192
CLT_SERVER_TOKEN      the bearer token that clients must send
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import hmac
import itertools
import json
import logging
import os
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send
from xxhash import xxh3_64_hexdigest

from clt.data.index import STATISTICS, read_index
from clt.data.store import DiscBuffer
from clt.memory import keep_freed_memory
from clt.server import run
from clt.server.buffer import Buffer
from clt.server.client import read_token
from clt.server.generator import lead
from clt.server.wire import Shape, Slice, activations_of, as_bytes, body_of, columns_of, count_of, frame, frame_bytes

log = logging.getLogger("uvicorn.error")
PUBLIC = ("/", "/healthz")
"""Paths that need no token: they tell nothing but whether the server works."""
COUNTED = ("/activations", "/activations/tensor", "/activations/stream", "/heldout")
"""Paths whose clients count among `server.max_streams`."""
LOCAL = ["localhost", "127.0.0.1", "::1", "[::1]"]
"""The names that a server without a token answers to."""
_NO_TOKEN = (
    "as Authorization: Bearer TOKEN (in Python ActivationClient(url, token), in a config data.token_file, in the "
    "environment of a run CLT_SERVER_TOKEN)"
)
_JSON_ROWS, _MEMORY = 64, 16 << 20  # rows, and bytes, of an answer that is made before it is sent (or a block)
_SAMPLE_SECONDS, _SAMPLES = 2.0, 300
_BYTES = "application/octet-stream"


class Unavailable(HTTPException):
    """There are no rows, and why; `retry_after` seconds later there may be some."""

    def __init__(self, reason: str, retry_after: int = 1) -> None:
        super().__init__(503, reason, {"retry-after": str(retry_after)})


class Ended(Exception):
    """An answer cannot be completed, and why."""


class Rows:
    """The rows of the buffer for this process's clients. All methods are called in the event loop's thread."""

    def __init__(self, buffer: Buffer, wait_seconds: float, max_streams: int) -> None:
        self.buffer, self.shape, self.wait_seconds, self.max_streams = buffer, buffer.shape, wait_seconds, max_streams
        self._rest: list[Slice] = []  # of a block that was not used up
        self._refreshes = int(buffer.header["refreshes"])
        self._turn = asyncio.Lock()  # one block at a time, so that a killed process costs no more
        self._samples: deque[tuple[float, int, float]] = deque(maxlen=_SAMPLES)  # time, rows served, fill

    async def draw(self, n: int, request: Request | None = None) -> list[Slice]:
        """n rows, for as long as the client that asks is there.

        Raises Unavailable, with the generator's cause, when there are none for `wait_seconds`.
        """
        end, parts = time.monotonic() + self.wait_seconds, []
        try:
            async with self._turn:
                if self._refreshes != (now := int(self.buffer.header["refreshes"])):
                    self._count("dropped", count_of(self._rest))
                    self._refreshes, self._rest = now, []
                while missing := n - count_of(parts):
                    whole = self._rest.pop() if self._rest else await self._block(end, request)
                    cut = min(whole.start + missing, whole.stop)
                    parts.append(whole._replace(stop=cut))
                    self._count("drawn", cut - whole.start)
                    self._rest += [whole._replace(start=cut)] if cut < whole.stop else []
        except BaseException:  # also of a client that has gone: others get its rows
            self._count("drawn", -count_of(parts))
            self._rest += parts
            raise
        return parts

    def _count(self, what: str, n: int) -> None:
        self.buffer.line[what] += n
        self.buffer.line["held"] -= n

    async def _block(self, end: float, request: Request | None) -> Slice:
        pause, buffer = 0.002, self.buffer
        while not buffer.ready or (body := await asyncio.to_thread(buffer.take)) is None:
            if (found := buffer.generator())["state"] == "failed":
                raise Unavailable(f"the generator of activations failed: {found['cause']}", 2)
            if time.monotonic() > end:
                raise Unavailable(f"the buffer had no rows for {self.wait_seconds:g} seconds")
            if request is not None and await request.is_disconnected():
                raise Unavailable("the client has gone")
            await asyncio.sleep(pause)
            pause = min(2 * pause, 0.05)
        return Slice(body, buffer.block_rows, 0, buffer.block_rows)

    async def frames(self, n: int, count: int | None, first: list[Slice]) -> AsyncIterator[bytes | memoryview]:
        """The pieces of the frames of `count` batches of n rows, or of batches without end."""
        sequence, parts, segment = 0, first, self.buffer.segment
        for _ in itertools.count() if count is None else range(count):
            for size in self.cut(n):
                try:
                    parts = parts if sequence == 0 else await self.draw(size)
                except Unavailable as error:
                    raise Ended(error.detail) from error
                for piece in frame(parts, sequence, self.shape, segment):
                    yield piece
                self.served(size, frame_bytes(size, self.shape, segment))
                sequence += 1
                await asyncio.sleep(0)  # sending alone gives way to nobody, not even to the client's departure

    def cut(self, n: int) -> list[int]:
        """The rows of the frames of a batch of n."""
        return [min(self.buffer.block_rows, n - at) for at in range(0, n, self.buffer.block_rows)]

    def served(self, rows: int, size: int) -> None:
        """Count what was sent."""
        self.buffer.line["served_rows"] += rows
        self.buffer.line["served_bytes"] += size

    @contextlib.contextmanager
    def client(self) -> Iterator[None]:
        """Count a client while its rows are drawn and sent; Unavailable when there are `max_streams` already."""
        if self.buffer.clients() >= self.max_streams:
            raise Unavailable(f"{self.max_streams} clients are being served already (server.max_streams)")
        self.buffer.line["clients"] += 1
        try:
            yield
        finally:
            self.buffer.line["clients"] -= 1

    async def sample(self) -> None:
        """Note the counters, again and again."""
        while True:
            stats = self.buffer.stats()
            self._samples.append((time.monotonic(), stats["rows_served"], stats["fill"]))
            await asyncio.sleep(_SAMPLE_SECONDS)

    def stats(self) -> dict[str, Any]:
        """The buffer's counters, the rate of serving over the last ten seconds, and a history of rate and fill."""
        now, pairs = time.monotonic(), list(itertools.pairwise(self._samples))
        seconds, rates = [round(b[0] - now, 1) for _, b in pairs], [(b[1] - a[1]) / (b[0] - a[0]) for a, b in pairs]
        recent = [rate for at, rate in zip(seconds, rates) if at > -10 - _SAMPLE_SECONDS]
        history = {"seconds": seconds, "rows_per_second": rates, "fill": [round(b[2], 4) for _, b in pairs]}
        return {**self.buffer.stats(), "rows_per_second": sum(recent) / max(len(recent), 1), "history": history}


# The endpoints


async def stream(request: Request) -> Response:
    """Frames of batches of `batch_size` rows, `max_batches` of them or without end."""
    rows: Rows = request.state.rows
    n, count = parameters(request, batch_size=(1, request.state.server.max_batch, 256), max_batches=(1, 10**9, None))
    first = await rows.draw(rows.cut(n)[0], request)  # an error before the first frame is a status
    headers = {"x-clt-segment": rows.buffer.segment}
    if count is not None:  # of a known length, the pieces are passed on as they are; in chunks each would be copied
        sizes = (frame_bytes(size, rows.shape, rows.buffer.segment) for size in rows.cut(n))
        headers["content-length"] = str(count * sum(sizes))
    return StreamingResponse(rows.frames(n, count, first), 200, headers, _BYTES)


async def tensor(request: Request) -> Response:
    """One batch (n, 2, L, D) as raw little-endian bytes; x-tensor-shape, -dtype and -xxh3 in the headers."""
    rows: Rows = request.state.rows
    most = max(rows.buffer.block_rows, _MEMORY // rows.shape.row_bytes)
    (n,) = parameters(request, batch_size=(1, min(request.state.server.max_batch, most), 256))
    data = b"".join(as_bytes(activations_of(part, rows.shape)) for part in await rows.draw(n, request))
    rows.served(n, len(data))
    shape = f"{n},2,{rows.shape.n_layers},{rows.shape.d_acts}"
    headers = {"x-tensor-shape": shape, "x-tensor-dtype": rows.shape.dtype, "x-tensor-xxh3": xxh3_64_hexdigest(data)}
    return Response(data, 200, {**headers, "x-clt-segment": rows.buffer.segment}, _BYTES)


async def activations(request: Request) -> Response:
    """A few rows as JSON: shape, dtype, segment, row, token, position, document, activations as nested lists."""
    rows: Rows = request.state.rows
    (n,) = parameters(request, batch_size=(1, min(request.state.server.max_batch, _JSON_ROWS), 1))
    text = await asyncio.to_thread(_json, await rows.draw(n, request), rows.shape, rows.buffer.segment)
    rows.served(n, len(text))
    return Response(text, media_type="application/json")


def _json(parts: list[Slice], shape: Shape, segment: str) -> bytes:
    """Written row by row: one call for all of it would keep the other threads waiting."""
    dims = [count_of(parts), 2, shape.n_layers, shape.d_acts]
    about = {"shape": dims, "dtype": shape.dtype, "segment": segment}
    about |= {name: column.tolist() for name, column in columns_of(parts).items()}
    values = [json.dumps(row.tolist()) for part in parts for row in activations_of(part, shape).float()]
    return f'{json.dumps(about)[:-1]}, "activations": [{", ".join(values)}]}}'.encode()


async def heldout(request: Request) -> Response:
    """Frames: the held-out rows from number `start` on, in their order."""
    store: DiscBuffer = request.state.heldout
    shape = Shape(store.index.n_layers, store.index.d_acts, store.index.dtype)
    most = min(request.state.server.max_batch, max(1, _MEMORY // shape.row_bytes))
    n, start = parameters(request, batch_size=(1, most, 64), start=(0, len(store), 0))
    parts = [np.arange(at, min(at + n, len(store))) for at in range(start, len(store), n)]

    def read(rows: np.ndarray) -> Slice:
        columns = {"document": store.documents(rows), "row": rows, "token": store.tokens(rows)}
        return body_of(store.read(rows), {**columns, "position": store.positions(rows)})

    async def frames() -> AsyncIterator[bytes | memoryview]:
        for sequence, rows in enumerate(parts):
            for piece in frame([await asyncio.to_thread(read, rows)], sequence, shape, ""):
                yield piece

    size = sum(frame_bytes(len(rows), shape, "") for rows in parts)
    return StreamingResponse(frames(), 200, {"content-length": str(size)}, _BYTES)


async def stats(request: Request) -> Response:
    """JSON: the buffer's counters, the rate of serving and its history, the generator, the largest batch_size."""
    parameters(request)
    return JSONResponse({**request.state.rows.stats(), "max_batch": request.state.server.max_batch})


async def index(request: Request) -> Response:
    """JSON: what a row is and where it comes from, as in a store's index.json, without shards."""
    parameters(request)
    return JSONResponse(request.state.index)


async def statistics(request: Request) -> Response:
    """Mean and sd of the training rows: the bytes of a store's stats.safetensors."""
    parameters(request)
    return Response(request.state.statistics, media_type=_BYTES)


async def refresh(request: Request) -> Response:
    """JSON: how many of the buffer's rows were dropped; the generator makes others."""
    parameters(request)
    return JSONResponse({"dropped": await asyncio.to_thread(request.state.rows.buffer.refresh)})


async def health(request: Request) -> Response:
    """200 while rows can be expected, 503 when the generator has failed."""
    parameters(request)
    if (state := request.state.rows.buffer.generator()["state"]) == "failed":
        raise Unavailable("the generator has failed", 2)
    return JSONResponse({"status": "ok", "generator": state})


async def page(request: Request) -> Response:
    """The status page. It asks /stats, so it shows nothing to a person without the token."""
    parameters(request)
    policy = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'"
    return HTMLResponse(request.state.page, headers={"content-security-policy": policy})


def parameters(request: Request, **limits: tuple[int, int, int | None]) -> list[Any]:
    """The query's whole numbers, in the order of `limits`: (least, most, default) of each that may be given.

    Raises HTTPException: 400 for what is unknown, repeated or no number, 422 for what is out of range.
    """
    values = {name: default if default is None else min(default, most) for name, (_, most, default) in limits.items()}
    try:
        items = request.query_params.multi_items()
    except ValueError as error:
        raise HTTPException(400, f"the query cannot be read: {error}") from error
    for name, text in items:
        if name not in limits:
            raise HTTPException(400, f"unknown parameter {name[:40]!r}; known: {', '.join(limits) or 'none'}")
        if len(request.query_params.getlist(name)) > 1:
            raise HTTPException(400, f"parameter {name} is given more than once")
        if not (text.isascii() and text.removeprefix("-").isdigit()):
            raise HTTPException(400, f"parameter {name} is {text[:40]!r}; wanted a whole number")
        least, most, _ = limits[name]
        # Compared by length first: int() of a long text is slow, and refused from 4300 digits on.
        if text.startswith("-") or len(text.lstrip("0")) > len(str(most)) or not least <= int(text[-20:]) <= most:
            raise HTTPException(422, f"parameter {name} is {text[:40]}; wanted {least} to {most}")
        values[name] = int(text[-20:])
    return list(values.values())


# Around them


class Guard:
    """Refuses before anything else is done, and counts clients until their last byte is sent."""

    def __init__(self, app: ASGIApp) -> None:
        self.app, self.local = app, TrustedHostMiddleware(app, LOCAL, www_redirect=False)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        state = scope["state"]
        try:
            refuse(scope, Headers(scope=scope))
            app = self.local if state["token"] is None and not state["open"] else self.app
            with state["rows"].client() if scope["path"] in COUNTED else contextlib.nullcontext():
                await app(scope, receive, send)
        except HTTPException as error:
            await (await refused(Request(scope), error))(scope, receive, send)
        except Ended as error:  # without our protocol, uvicorn closes the connection with an error of its own
            log.warning("a stream was ended: %s", error)
            if "abort" in state:
                state["abort"]()
                while (await receive())["type"] != "http.disconnect":
                    pass


def refuse(scope: Scope, headers: Headers) -> None:
    """Raise HTTPException for a request that is not to be answered: a body, no token, a page of another site."""
    state, path, close = scope["state"], scope["path"], {"connection": "close"}
    if headers.get("content-length", "0").strip("0") or "transfer-encoding" in headers:
        raise HTTPException(413, "no request here has a body", close)
    if scope["method"] == "HEAD" and path in COUNTED:
        raise HTTPException(405, "the answer to HEAD would cost its rows", {"allow": "GET"})
    if (token := state["token"]) is not None:
        scheme, _, given = headers.get("authorization", "").partition(" ")
        right = hmac.compare_digest(given.strip().encode("latin-1"), token.encode()) and scheme.lower() == "bearer"
        if path not in PUBLIC and not (right and len(headers.getlist("authorization")) == 1):
            what = "the token is not this server's" if given else "this server wants its token"
            raise HTTPException(401, f"{what}, {_NO_TOKEN}", {"www-authenticate": "Bearer"})
        return
    if not state["open"] and (here := scope.get("server")) is not None and not run.is_loopback(here[0]):
        raise HTTPException(403, "this server has no token and so serves its own machine alone", close)
    origin, site = headers.get("origin"), headers.get("sec-fetch-site")  # of pages in a browser on this machine
    foreign = origin is not None and origin.partition("://")[2] != headers.get("host")
    if foreign or (site in ("cross-site", "same-site") and path not in PUBLIC):
        raise HTTPException(403, "requests from pages of other sites are refused", close)


async def mended(work: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Run background work for as long as the server; should it die, that is logged, and it begins anew."""
    while True:
        task = asyncio.create_task(work())
        try:
            await asyncio.wait([task])
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        log.error("a background task died and begins anew", exc_info=None if task.cancelled() else task.exception())
        await asyncio.sleep(1)


@contextlib.asynccontextmanager
async def lifespan(app: Starlette) -> AsyncIterator[dict[str, Any]]:
    """From the first to the last request of one worker."""
    with run.signals_end_it():
        config = run.environment_config()
        keep_freed_memory(1 << 28)
        run.allow_descriptors()
        token, buffer = read_token(config.server.token_file), await asyncio.to_thread(run.open_buffer, config)
    rows = Rows(buffer, config.server.wait_seconds, config.server.max_streams)
    record = functools.partial(run.record, config, buffer)
    work = (rows.sample, functools.partial(lead, config, run.buffer_name(config), buffer, record))
    tasks = [asyncio.create_task(mended(each)) for each in work]
    try:
        yield {
            "server": config.server,
            "rows": rows,
            "token": token,
            "open": os.environ.get("CLT_SERVER_OPEN") == "1",
            "index": {**dataclasses.asdict(read_index(run.folder(config))), "shards": []},
            "statistics": (run.folder(config) / STATISTICS).read_bytes(),
            "heldout": DiscBuffer(Path(config.data.store) / "heldout"),
            "page": (Path(__file__).parent / "page.html").read_text(),
        }
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.to_thread(run.close_buffer, config, buffer)


async def refused(request: Request, error: Exception) -> Response:
    """The reason as JSON."""
    assert isinstance(error, HTTPException)
    reason = error.detail
    if error.status_code == 404:
        reason = f"this activation server has nothing there; wanted one of {', '.join(route.path for route in ROUTES)}"
    elif error.status_code == 405 and reason == "Method Not Allowed":
        reason = f"{request.method} is not what this answers to; wanted {(error.headers or {}).get('Allow', 'GET')}"
    return JSONResponse({"error": reason}, error.status_code, error.headers)


async def failed(request: Request, error: Exception) -> Response:
    """A bug."""
    return JSONResponse({"error": f"a bug in the server ({type(error).__name__}); its log has the traceback"}, 500)


_GET = {"/": page, "/healthz": health, "/stats": stats, "/index": index, "/statistics": statistics, "/heldout": heldout,
        "/activations": activations, "/activations/tensor": tensor, "/activations/stream": stream}  # fmt: skip
ROUTES = [
    *(Route(path, answer, methods=["GET"]) for path, answer in _GET.items()),
    Route("/refresh", refresh, methods=["POST"]),
]
app = Starlette(
    routes=ROUTES, middleware=[Middleware(Guard)], lifespan=lifespan,
    exception_handlers={HTTPException: refused, Exception: failed},
)  # fmt: skip
app.router.redirect_slashes = False
