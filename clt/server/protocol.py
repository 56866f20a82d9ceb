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
    """One connection, ended by one timer while it has no request. While it has one, the app may end it by `abort`."""

    head = 0  # bytes that came since the last head; no request here has a body

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self.app_state = {**self.app_state, "abort": transport.abort}
        self.timer = self.abort_in(min(_HEAD_SECONDS, self.app_state["server"].idle_seconds))
        if len(self.connections) > resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2:
            transport.abort()
        tune(transport)

    def data_received(self, data: bytes) -> None:
        self.head += len(data)
        self.transport.abort() if self.head > _MAX_HEAD else super().data_received(data)

    def on_headers_complete(self) -> None:
        if self.cycle is not None and not self.cycle.response_complete:
            return self.transport.abort()  # pipelined: uvicorn would not tell the first answer of a client that leaves
        self.head = 0
        self.timer.cancel()
        super().on_headers_complete()

    def on_response_complete(self) -> None:  # but it may not be sent, and a connection is not closed before it is
        super().on_response_complete()
        self.timer = self.abort_in(self.app_state["server"].idle_seconds)

    def abort_in(self, seconds: float) -> asyncio.TimerHandle:
        return self.loop.call_later(seconds, self.transport.abort)


def tune(transport: Any) -> None:
    """Between programs of one machine, bbr looks for a bottleneck; where it is the default, it costs a tenth."""
    with contextlib.suppress(OSError):
        if (transport.get_extra_info("peername") or [""])[0] in ("127.0.0.1", "::1"):
            transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"reno")
