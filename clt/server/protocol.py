"""uvicorn's HTTP protocol with what a server that runs for a week needs besides: deadlines, limits, reasons in JSON.

`clt serve` uses it; by hand: `uvicorn clt.server.app:app --http clt.server.protocol:Protocol --ws none`.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import socket
import struct
from typing import Any

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from clt.server.limits import is_loopback

MAX_HEAD = 16_384
"""Bytes of a request's line and headers."""
MAX_CONNECTIONS = 1024
"""Open connections of one worker."""
HEAD_SECONDS = 10.0
"""Time for a request's line and headers, from the connection or the first byte."""


class Protocol(HttpToolsProtocol):
    """One connection. The lifespan's state sets `idle_seconds`, the time to take what was sent before it is dropped.

    A request's state has `end()`, for an answer that cannot be completed.
    """

    _head_bytes = 0
    _head_timer: asyncio.TimerHandle | None = None
    _write_timer: asyncio.TimerHandle | None = None
    _under_way: tuple[Any, ...] = ()
    """Cycles of requests whose answers were under way when the next request came on the same connection."""

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self.app_state["limited"] = True  # by this protocol; see clt.server.limits
        if transport.get_extra_info("sslcontext") is None:  # with TLS, asyncio gives up what is unsent by itself
            transport.set_write_buffer_limits(0)  # `pause_writing` when anything waits, also behind a whole answer
        if self.client is not None and is_loopback(self.client[0]):
            # There is no bottleneck to be found out: bbr, where it is the default, costs a tenth (measured).
            with contextlib.suppress(OSError):
                transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"reno")
        if len(self.connections) > MAX_CONNECTIONS:
            self.refuse(503, f"this worker has its {MAX_CONNECTIONS} connections; come again")
        else:
            self._head_timer = self.loop.call_later(HEAD_SECONDS, self._head_is_late)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop(self._head_timer)
        self._stop(self._write_timer)
        super().connection_lost(exc)
        for cycle in self._under_way:  # uvicorn tells the last one alone, and a stream would go on for nobody
            cycle.disconnected = True
            cycle.message_event.set()

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        self._head_bytes += len(data)  # no request here has a body
        if self._head_bytes > MAX_HEAD:
            return self.refuse(431, f"the request's line and headers are longer than {MAX_HEAD} bytes")
        if self._head_timer is None and (self.cycle is None or self.cycle.response_complete):
            self._head_timer = self.loop.call_later(HEAD_SECONDS, self._head_is_late)
        super().data_received(data)

    def on_headers_complete(self) -> None:
        self._stop(self._head_timer)
        self._head_timer, self._head_bytes = None, 0
        before = () if self.cycle is None else (*self._under_way, self.cycle)
        self._under_way = tuple(cycle for cycle in before if not cycle.response_complete)
        super().on_headers_complete()
        self.scope.setdefault("state", {})["end"] = functools.partial(self._end, self.cycle)

    def pause_writing(self) -> None:
        self._stop(self._write_timer)
        self._write_timer = self.loop.call_later(self.app_state["idle_seconds"], self._drop)
        super().pause_writing()

    def resume_writing(self) -> None:
        self._stop(self._write_timer)
        super().resume_writing()

    def send_400_response(self, msg: str) -> None:
        self.refuse(400, msg)

    def refuse(self, status: int, reason: str) -> None:
        """Answer with a reason and close; within a response there is only the closing."""
        if self.cycle is not None and not self.cycle.response_complete:
            self._drop()
            return
        body = json.dumps({"error": reason}).encode()
        head = b"content-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n" % len(body)
        retry = b"retry-after: 1\r\n" if status == 503 else b""
        self.transport.write(STATUS_LINE[status] + head + retry + b"\r\n" + body)
        self.transport.close()

    def _head_is_late(self) -> None:
        if self._head_bytes:
            self.refuse(408, f"no complete request came within {HEAD_SECONDS:g} seconds")
        else:
            self.transport.close()

    def _end(self, cycle: Any) -> None:
        """Close behind what was sent of an answer without an end; uvicorn would log that as the application's error."""
        cycle.disconnected = True
        self.transport.close()

    def _drop(self) -> None:
        """End the connection now: the kernel would keep megabytes, for minutes, for one who does not read."""
        with contextlib.suppress(OSError):
            now = struct.pack("ii", 1, 0)
            self.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, now)
        self.transport.abort()

    @staticmethod
    def _stop(timer: asyncio.TimerHandle | None) -> None:
        if timer is not None:
            timer.cancel()
