"""Bodies end with their clients."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, MutableMapping
from types import SimpleNamespace
from typing import Any

import pytest
from starlette.requests import Request
from starlette.responses import Response

from clt.server.responses import Counted, Pieces


def test_a_body_that_never_waits_ends_when_the_client_has_gone() -> None:
    """As it is when rows are always there: to send to a client that has gone returns at once."""
    sent = 0

    async def pieces() -> AsyncGenerator[bytes, None]:
        while sent < 100_000:
            yield b"x"

    async def send(message: MutableMapping[str, Any]) -> None:
        nonlocal sent
        sent += 1

    async def receive() -> dict[str, str]:
        await asyncio.sleep(0.01)
        return {"type": "http.disconnect"}

    asyncio.run(Pieces(pieces(), None, {})({"type": "http", "state": {"answer_seconds": 60}}, receive, send))
    assert sent < 100_000


def test_rows_are_released_when_the_client_has_gone_before_the_first_piece() -> None:
    released = []

    async def pieces() -> AsyncGenerator[bytes, None]:
        yield b"never made"

    async def send(message: MutableMapping[str, Any]) -> None:
        raise RuntimeError("the connection is closed")

    async def receive() -> dict[str, str]:
        await asyncio.Event().wait()
        raise AssertionError

    body = Pieces(pieces(), None, {}, lambda: released.append(True))
    with pytest.raises(RuntimeError):
        asyncio.run(body({"type": "http", "state": {"answer_seconds": 60}}, receive, send))
    assert released == [True]


def test_an_answer_has_its_time(caplog: pytest.LogCaptureFixture) -> None:
    ended = []

    async def pieces() -> AsyncGenerator[bytes, None]:
        yield b"x"
        await asyncio.Event().wait()

    async def send(message: MutableMapping[str, Any]) -> None:
        pass

    async def receive() -> dict[str, str]:
        await asyncio.Event().wait()
        raise AssertionError

    state = {"answer_seconds": 0.05, "end": lambda: ended.append(True)}
    asyncio.run(Pieces(pieces(), 2, {})({"type": "http", "path": "/x", "state": state}, receive, send))
    assert ended == [True]
    assert caplog.messages == ["/x was cut off: it took longer than 0.05 seconds"]


def test_an_answer_is_never_longer_than_it_said(caplog: pytest.LogCaptureFixture) -> None:
    """An error's frame has no room in an answer of known length; the client sees that it ends too early."""
    ended, sent = [], []

    async def pieces() -> AsyncGenerator[bytes, None]:
        yield b"row"
        yield b"an error"

    async def send(message: MutableMapping[str, Any]) -> None:
        sent.append(message.get("body"))

    async def receive() -> dict[str, str]:
        await asyncio.Event().wait()
        raise AssertionError

    state = {"answer_seconds": 60, "end": lambda: ended.append(True)}
    asyncio.run(Pieces(pieces(), 6, {})({"type": "http", "path": "/x", "state": state}, receive, send))
    assert sent == [None, b"row"]
    assert ended == [True]


def test_who_waits_for_rows_when_the_server_is_shut_down_is_asked_to_come_again() -> None:
    """uvicorn cancels what is under way; without an answer it would say 500, which no client tries again."""
    sent: list[MutableMapping[str, Any]] = []

    async def endpoint(request: Request) -> Response:
        await asyncio.Event().wait()
        raise AssertionError

    async def send(message: MutableMapping[str, Any]) -> None:
        sent.append(message)

    async def receive() -> dict[str, str]:
        return {"type": "http.request"}

    async def shut_down() -> None:
        scope = {"type": "http", "method": "GET", "state": {"supply": SimpleNamespace(client=contextlib.nullcontext)}}
        task = asyncio.create_task(Counted(endpoint)(scope, receive, send))
        await asyncio.sleep(0.01)
        task.cancel()
        await task

    asyncio.run(shut_down())
    assert sent[0]["status"] == 503
    assert (b"retry-after", b"5") in sent[0]["headers"]
    assert sent[1]["body"] == b'{"error":"the server is shutting down"}'
