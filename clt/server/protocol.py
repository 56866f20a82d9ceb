"""uvicorn's HTTP protocol with a deadline for a client that keeps the server waiting (slowloris).

`clt serve` uses it; by hand: `uvicorn clt.server.app:app --http clt.server.protocol:Protocol --ws none`.
"""

from __future__ import annotations

import asyncio
import resource
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEAD = 16_384


class Protocol(HttpToolsProtocol):
    """One connection. Its client has `server.idle_seconds` to send a whole head, and to take what it was sent."""

    timer: asyncio.TimerHandle | None = None
    head = 0  # bytes that came since the last head; no request here has a body

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        transport.set_write_buffer_limits(0)  # pause_writing when anything waits, also behind a whole answer
        if len(self.connections) > resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2:
            transport.abort()
        self.wait(True)

    def data_received(self, data: bytes) -> None:
        self.head += len(data)
        if self.head > MAX_HEAD:
            return self.transport.abort()
        self.wait(True)
        super().data_received(data)

    def on_headers_complete(self) -> None:
        if self.cycle is not None and not self.cycle.response_complete:
            return self.transport.abort()  # pipelined: uvicorn would not tell the first answer of a client that leaves
        self.head = 0
        self.wait(self.flow.write_paused)
        super().on_headers_complete()
        self.scope["state"]["abort"] = self.transport.abort

    def pause_writing(self) -> None:
        self.wait(True)
        super().pause_writing()

    def resume_writing(self) -> None:
        self.wait(False)
        super().resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        self.wait(False)
        super().connection_lost(exc)

    def wait(self, begins: bool) -> None:
        if begins and self.timer is None:
            self.timer = self.loop.call_later(self.app_state["server"].idle_seconds, self.transport.abort)
        elif not begins and self.timer is not None:
            self.timer.cancel()
            self.timer = None
