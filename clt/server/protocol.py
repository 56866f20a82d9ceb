"""uvicorn's HTTP protocol with one deadline: for a whole head, and for a client to take what it was sent (slowloris).

`clt serve` uses it; by hand: `uvicorn clt.server.app:app --http clt.server.protocol:Protocol --ws none`.
"""

from __future__ import annotations

import asyncio
import contextlib
import resource
import socket
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

HEAD_SECONDS, MAX_HEAD = 10.0, 16_384
"""Time for a request's line and headers, and their bytes."""


class Protocol(HttpToolsProtocol):
    """One connection. The lifespan's state has `server`, whose `idle_seconds` are the time to take what was sent."""

    _timer: asyncio.TimerHandle | None = None
    _head = 0

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        if transport.get_extra_info("sslcontext") is None:  # with TLS, asyncio gives up what is unsent by itself
            transport.set_write_buffer_limits(0)  # `pause_writing` when anything waits, also behind a whole answer
        with contextlib.suppress(OSError):  # bbr, where it is the default, costs a tenth on the loopback (measured)
            transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"reno")
        if len(self.connections) > resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2:
            transport.abort()
        self._deadline(HEAD_SECONDS)

    def data_received(self, data: bytes) -> None:
        self._head += len(data)  # no request here has a body
        if self._head > MAX_HEAD:
            self.transport.abort()
        elif not self.transport.is_closing():
            if self._timer is None:
                self._deadline(HEAD_SECONDS)
            super().data_received(data)

    def on_headers_complete(self) -> None:
        if self.cycle is not None and not self.cycle.response_complete:
            return self.transport.abort()  # pipelined: uvicorn would not tell the first answer of a client that leaves
        self._head = 0
        self._deadline(None)
        super().on_headers_complete()
        self.scope.setdefault("state", {})["abort"] = self.transport.abort

    def pause_writing(self) -> None:
        self._deadline(self.app_state["server"].idle_seconds)
        super().pause_writing()

    def resume_writing(self) -> None:
        self._deadline(HEAD_SECONDS if self._head else None)
        super().resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        self._deadline(None)
        super().connection_lost(exc)

    def _deadline(self, seconds: float | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None if seconds is None else self.loop.call_later(seconds, self.transport.abort)
