"""uvicorn's HTTP protocol with one deadline (against slowloris), for `clt serve` and `uvicorn --http`."""

from __future__ import annotations

import asyncio
import contextlib
import resource
import socket
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from clt.server.run import is_loopback

_MAX_HEAD, _HEAD_SECONDS = 16_384, 10.0


class Protocol(HttpToolsProtocol):
    """One connection. Its client has `server.idle_seconds` to take what it was sent, and ten at most to send a head."""

    timer: asyncio.TimerHandle | None = None
    head = 0  # bytes that came since the last head; no request here has a body

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        if self.client is not None and is_loopback(self.client[0]):
            # There is no bottleneck to be found out: bbr, where it is the default, costs a tenth (measured).
            with contextlib.suppress(OSError):
                transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"reno")
        if transport.get_extra_info("sslcontext") is None:  # with TLS, asyncio gives up what is unsent by itself
            transport.set_write_buffer_limits(0)  # pause_writing when anything waits, also behind a whole answer
        self.wait(True, _HEAD_SECONDS)
        if len(self.connections) > resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2:
            transport.abort()

    def data_received(self, data: bytes) -> None:
        self.head += len(data)
        self.wait(True, _HEAD_SECONDS)
        self.transport.abort() if self.head > _MAX_HEAD else super().data_received(data)

    def on_headers_complete(self) -> None:
        if self.cycle is not None and not self.cycle.response_complete:
            return self.transport.abort()  # pipelined: uvicorn would not tell the first answer of a client that leaves
        self.head = 0
        self.wait(self.flow.write_paused)
        super().on_headers_complete()

    def pause_writing(self) -> None:
        self.wait(True)
        super().pause_writing()

    def resume_writing(self) -> None:
        self.wait(False)
        super().resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        self.wait(False)
        super().connection_lost(exc)

    def wait(self, begins: bool, most: float = 1e9) -> None:
        if begins and self.timer is None:
            self.timer = self.loop.call_later(min(most, self.app_state["server"].idle_seconds), self.transport.abort)
        elif not begins and self.timer is not None:
            self.timer.cancel()
            self.timer = None
