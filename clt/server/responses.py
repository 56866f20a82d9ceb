"""Answers that end when their client does: bodies sent while they are made, and endpoints whose clients are counted."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from typing import Any, TypeVar

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

T = TypeVar("T")
log = logging.getLogger("uvicorn.error")
_TURN_SECONDS = 0.003  # of sending, before it is others' turn


class ClientGone(Exception):
    """Nobody waits for the answer any more, or it was given up for the reason that is said."""


async def until_gone(receive: Receive, work: Coroutine[Any, Any, T], seconds: float | None = None) -> T:
    """The result of `work`, which is cancelled when the client goes away or time is over: then raises ClientGone."""

    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    task, watch = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait({task, watch}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone("" if watch.done() else f"it took longer than {seconds:g} seconds")
        return task.result()
    finally:
        for each in (task, watch):
            each.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)  # nothing of it runs on unseen


class Pieces(Response):
    """A body of bytes-likes that are sent as they are made.

    `size` is their sum, or None if that is unknown. Where fewer come, the connection is closed, which clients notice.
    `release` is called in the end, also when the client has gone before the first piece was made.
    """

    media_type = "application/octet-stream"

    def __init__(
        self,
        pieces: AsyncGenerator[Any, None],
        size: int | None,
        headers: dict[str, str],
        release: Callable[[], object] = lambda: None,
    ) -> None:
        self.pieces, self.size, self.release, self.status_code, self.background = pieces, size, release, 200, None
        self.init_headers(headers if size is None else {**headers, "content-length": str(size)})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        complete = False

        async def answer() -> None:
            nonlocal complete
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            sent, turn_ends = 0, time.monotonic()
            async with contextlib.aclosing(self.pieces) as pieces:
                async for piece in pieces:
                    if self.size is not None and sent + len(piece) > self.size:  # an error's frame, without the room
                        return
                    await send({"type": "http.response.body", "body": piece, "more_body": True})
                    sent += len(piece)
                    if (now := time.monotonic()) > turn_ends:  # sending alone does not give way to others, ever
                        await asyncio.sleep(0)
                        turn_ends = now + _TURN_SECONDS
            if self.size is None or sent == self.size:
                await send({"type": "http.response.body", "body": b""})
                complete = True

        try:
            await until_gone(receive, answer(), scope["state"]["answer_seconds"])
        except ClientGone as error:
            if str(error):
                log.warning("%s was cut off: %s", scope["path"], error)
        finally:
            self.release()
        if not complete:
            scope["state"].get("end", lambda: None)()


class Counted:
    """An endpoint as an ASGI app; its client counts from before the first row is drawn until the last byte is sent."""

    def __init__(self, endpoint: Callable[[Request], Awaitable[Response]]) -> None:
        self.endpoint = endpoint

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["method"] == "HEAD":  # rows would be drawn in vain
            raise HTTPException(405, "the answer to HEAD would cost its rows", {"allow": "GET"})
        request = Request(scope, receive)
        response = None
        try:
            with contextlib.suppress(ClientGone), request.state.supply.client():
                response = await self.endpoint(request)
                await response(scope, receive, send)
        except asyncio.CancelledError:  # a shutdown: it waits for a while, and then for nobody
            if response is None:
                refusal = {"error": "the server is shutting down"}
                await JSONResponse(refusal, 503, {"retry-after": "5"})(scope, receive, send)
