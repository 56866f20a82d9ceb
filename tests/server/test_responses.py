"""Bodies end with their clients."""

import asyncio
from collections.abc import AsyncGenerator, MutableMapping
from typing import Any

import pytest

from clt.server.responses import ClientGone, Pieces


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

    with pytest.raises(ClientGone):
        asyncio.run(Pieces(pieces(), None, {})({"type": "http"}, receive, send))
    assert sent < 100_000
