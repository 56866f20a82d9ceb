"""The client of an activation server, for any process: needs neither starlette nor uvicorn."""

from __future__ import annotations

import functools
import http.client
import json
import logging
import random
import socket
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar
from urllib.parse import urlencode, urlsplit

import numpy as np
import safetensors.torch
import torch
import xxhash
from torch import Tensor

from clt.data.index import StoreIndex
from clt.data.statistics import Statistics
from clt.errors import UserError
from clt.server.buffer import Batch
from clt.server.wire import Frame, StreamEnded, WireError, read_frame

T = TypeVar("T")
log = logging.getLogger("clt")
_BACKOFF = (0.1, 10.0)  # seconds before the first and before the slowest new try
_ROUND = 1 << 20  # batches asked for at once: an answer of known length costs the server a copy less


class ServerError(UserError):
    """The server refused or failed; the message is what it said."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class _Again(Exception):
    """What may be mended by asking again, `after` seconds later at the earliest."""

    def __init__(self, reason: str, after: float = 0.0) -> None:
        super().__init__(reason)
        self.after = after


class ActivationClient:
    """The activation server at `url` (http or https), asked with a bearer token when there is one.

    It makes one connection a call and keeps nothing in between: threads may share it. `timeout` is how many seconds the
    server may be silent; `patience` is for how many seconds without success (it is away, it restarts, it has no rows) a
    call tries again, ever more slowly. Calls raise ServerError for what the server refuses, and for the last failure
    when patience is at an end; a url or a token that cannot be one is a UserError.
    """

    def __init__(self, url: str, token: str | None = None, timeout: float = 90.0, patience: float = 60.0) -> None:
        try:
            parts = urlsplit(url)
            host, port = parts.hostname, parts.port
        except ValueError as error:
            raise UserError(f"url {url!r} is not of the form http://HOST:PORT or https://HOST:PORT: {error}") from error
        if parts.username is not None:
            raise UserError(f"url {parts.hostname} has a user's name or password in it; give the token by itself")
        if parts.scheme not in ("http", "https") or host is None:
            raise UserError(f"url {url!r} is not of the form http://HOST:PORT or https://HOST:PORT")
        token = None if token is None else token.strip()
        if token is not None and not (token.isascii() and token.isprintable()):
            raise UserError("the token has characters that a header cannot carry; wanted printable ASCII")
        self.url, self.timeout, self.patience = url.rstrip("/"), timeout, patience
        self._headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        self._connect = lambda: kind(host, port, timeout=timeout)
        self._prefix = parts.path.rstrip("/")

    def get_activations(self, batch_size: int = 1) -> dict[str, Any]:
        """A few rows as plain lists: shape, dtype, segment, row, token, position, document, activations."""
        return self._json("/activations", batch_size=batch_size)

    def get_activations_tensor(self, batch_size: int = 256) -> Tensor:
        """One batch (n, 2, L, D) in the server's dtype."""

        def read(response: http.client.HTTPResponse) -> Tensor:
            data = np.empty(int(response.headers["content-length"]), np.uint8)
            _fill(response, data.data)
            if xxhash.xxh3_64_hexdigest(data.data) != response.headers["x-tensor-xxh3"]:
                raise WireError("the batch is damaged: its checksum does not match")
            shape = [int(size) for size in response.headers["x-tensor-shape"].split(",")]
            return torch.from_numpy(data).view(getattr(torch, response.headers["x-tensor-dtype"])).view(shape)

        return self._patiently(lambda: self._get("/activations/tensor", read, batch_size=batch_size))

    def stream_activations(self, batch_size: int = 256, max_batches: int | None = None) -> Iterator[Batch]:
        """Batches without end, or `max_batches` of them; each views the memory that it was received into.

        Goes on by itself over broken connections and restarts of the server. No row comes twice: the server gives
        each away once, and one that was lost on the way is lost.
        """
        for frame in self.stream_frames(batch_size, max_batches):
            yield frame.batch

    def stream_frames(self, batch_size: int = 256, max_batches: int | None = None) -> Iterator[Frame]:
        """As `stream_activations`, with the segment that each batch's row numbers belong to."""

        def query(batches: int, rows: int) -> dict[str, int] | None:
            if batches == max_batches:
                return None
            return {
                "batch_size": batch_size,
                "max_batches": min(max_batches - batches, _ROUND) if max_batches else _ROUND,
            }

        return self._frames("/activations/stream", query)

    def heldout(self, batch_size: int = 256) -> Iterator[Batch]:
        """The held-out rows in their order, from the first to the last; `row` counts them from 0."""
        for frame in self._frames("/heldout", lambda _, rows: {"batch_size": batch_size, "start": rows}):
            yield frame.batch

    def stats(self) -> dict[str, Any]:
        """The server's counters and the generator's state."""
        return self._json("/stats")

    def index(self) -> StoreIndex:
        """What a row is: model, layers, sites, text, L, D, dtype."""
        found = self._json("/index")
        try:
            return StoreIndex(**found)
        except TypeError as error:
            raise ServerError(f"{self.url}/index is not of this version's activation server: {error}", 200) from error

    def statistics(self) -> Statistics:
        """Mean and sd of the training rows."""

        def read(response: http.client.HTTPResponse) -> Statistics:
            data = response.read()
            try:
                tensors = safetensors.torch.load(data)
                return Statistics(**{**tensors, "rows": int(tensors["rows"])})
            except (safetensors.SafetensorError, KeyError, TypeError) as error:
                raise ServerError(f"{self.url}/statistics: found no statistics: {error}", 200) from error

        return self._patiently(lambda: self._get("/statistics", read))

    def refresh(self) -> int:
        """Have the server drop its rows and make others; returns how many it dropped. Asked once, without patience."""
        try:
            return self._get("/refresh", _read_json, "POST")["dropped"]
        except _Again as error:
            raise ServerError(str(error), 503) from error

    def _json(self, path: str, **query: int) -> Any:
        return self._patiently(lambda: self._get(path, _read_json, "GET", **query))

    def _get(self, path: str, read: Callable[[http.client.HTTPResponse], T], method: str = "GET", **query: int) -> T:
        """One request; raises _Again for what may pass and ServerError for what will not."""
        connection = self._connect()
        try:
            return read(self._open(connection, path, method, query))
        except (OSError, http.client.HTTPException, WireError) as error:
            raise _Again(f"{self.url}{path}: {error or type(error).__name__}") from error
        finally:
            connection.close()

    def _open(
        self, connection: http.client.HTTPConnection, path: str, method: str, query: dict[str, int]
    ) -> http.client.HTTPResponse:
        target = self._prefix + path + ("?" + urlencode(query) if query else "")
        connection.request(method, target, headers=self._headers)
        response = connection.getresponse()
        if response.status == 200:
            return response
        text = response.read(65_536).decode("utf-8", "replace")
        try:
            reason = json.loads(text)["error"]
        except (ValueError, KeyError, TypeError):
            reason = text[:200] or response.reason
        message = f"{self.url}{path} answered {response.status}: {reason}"
        if response.status in (408, 429, 502, 503, 504):
            after = response.headers.get("retry-after", "0")
            raise _Again(message, float(after) if after.isdigit() else 0.0)
        raise ServerError(message, response.status)

    def _patiently(self, work: Callable[[], T]) -> T:
        wait = _Waiting(self.patience)
        while True:
            try:
                return work()
            except _Again as error:
                wait.after(error)

    def _frames(self, path: str, query: Callable[[int, int], dict[str, int] | None]) -> Iterator[Frame]:
        """The frames of as many requests as it takes; `query(frames, rows)` had so far says what to ask for next."""
        wait, frames, rows = _Waiting(self.patience), 0, 0
        while (asked := query(frames, rows)) is not None:
            connection = self._connect()
            try:
                response = self._open(connection, path, "GET", asked)
                if response.length == 0:  # behind the last held-out row
                    return
                sequence, wake = 0, _waker(connection.sock)
                while (frame := read_frame(response.readinto, sequence, wake)) is not None:
                    wait.reset()
                    sequence, frames, rows = sequence + 1, frames + 1, rows + len(frame.batch.row)
                    yield frame
                if sequence == 0:
                    raise WireError("the stream ended before its first frame")
            except StreamEnded as error:
                wait.after(_Again(f"{self.url}{path} ended the stream: {error}", error.retry_after))
            except (OSError, http.client.HTTPException, WireError) as error:
                wait.after(_Again(f"{self.url}{path}: {error or type(error).__name__}"))
            except _Again as error:
                wait.after(error)
            finally:
                connection.close()


class _Waiting:
    """Back-off: `after(error)` sleeps, ever longer, or raises `patience` seconds after the first error since a success.

    What a consumer does between two batches is not waiting.
    """

    def __init__(self, patience: float) -> None:
        self.patience = patience
        self.reset()

    def reset(self) -> None:
        self.since, self.delay = None, _BACKOFF[0]

    def after(self, error: _Again) -> None:
        delay = max(error.after, self.delay * random.uniform(0.5, 1.0))  # many clients do not come back at once
        first, self.since = self.since is None, self.since or time.monotonic()
        if time.monotonic() + delay - self.since > self.patience:
            raise ServerError(f"{error} (tried for {time.monotonic() - self.since:.0f} s)", 503) from error
        if first:  # so that nobody sits before a silent program
            log.warning("%s; trying again for %.0f s. Does the server run (clt serve)?", error, self.patience)
        time.sleep(delay)
        self.delay = min(2 * self.delay, _BACKOFF[1])


def _waker(connection: socket.socket | None) -> Callable[[int], None]:
    """Has the kernel wake this process when so many bytes are there: for each packet, both ends would pay dearly."""
    if connection is None or sys.platform != "linux":
        return lambda _: None
    return functools.partial(connection.setsockopt, socket.SOL_SOCKET, socket.SO_RCVLOWAT)


def _read_json(response: http.client.HTTPResponse) -> Any:
    text = response.read()
    try:
        return json.loads(text)
    except ValueError as error:
        raise ServerError(f"found {text[:40]!r} where an activation server answers in JSON", 200) from error


def _fill(response: http.client.HTTPResponse, view: memoryview) -> None:
    done = 0
    while done < len(view):
        count = response.readinto(view[done:])
        if not count:
            raise WireError(f"the answer was cut off: found {done} bytes, wanted {len(view)}")
        done += count
