"""uvicorn's HTTP protocol with a deadline (against slowloris), for `clt serve` and `uvicorn --http`."""

from __future__ import annotations

import asyncio
import contextlib
import resource
import socket
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

_MAX_HEAD, _HEAD_SECONDS = 16_384, 10.0


class Protocol(HttpToolsProtocol):
    """One connection. Its client has ten seconds to send a head, and `server.idle_seconds` to take what it was sent."""

    timer: asyncio.TimerHandle | None = None
    head = 0  # bytes that came since the last head; no request here has a body

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        if self.client is not None and self.client[0] in ("127.0.0.1", "::1"):
            # There is no bottleneck to be found out: bbr, where it is the default, costs a tenth (measured).
            with contextlib.suppress(OSError):
                transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"reno")
        self.wait(_HEAD_SECONDS)
        if len(self.connections) > resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2:
            transport.abort()

    def data_received(self, data: bytes) -> None:
        if self.head == 0:
            self.wait(_HEAD_SECONDS)
        self.head += len(data)
        self.transport.abort() if self.head > _MAX_HEAD else super().data_received(data)

    def on_headers_complete(self) -> None:
        if self.cycle is not None and not self.cycle.response_complete:
            return self.transport.abort()  # pipelined: uvicorn would not tell the first answer of a client that leaves
        self.head = 0
        if not self.flow.write_paused:
            self.wait(None)
        super().on_headers_complete()

    def on_response_complete(self) -> None:
        # What then waits may be too little for pause_writing, and a connection is not closed before it has left.
        self.wait(self.app_state["server"].idle_seconds)
        super().on_response_complete()

    def pause_writing(self) -> None:
        self.wait(self.app_state["server"].idle_seconds)
        super().pause_writing()

    def resume_writing(self) -> None:
        if not self.cycle.response_complete:
            self.wait(None)
        super().resume_writing()

    def wait(self, seconds: float | None) -> None:
        """End the connection in so many seconds, if nothing else is said until then."""
        if self.timer is not None:
            self.timer.cancel()
        if seconds is not None:
            seconds = min(seconds, self.app_state["server"].idle_seconds)
            self.timer = self.loop.call_later(seconds, self.transport.abort)
