"""The client of an activation server, for any process: needs neither starlette nor uvicorn.

Nothing that a server says is taken at its word: sizes are bounded by what was asked for, rows are compared with the
server's index, and an answer has to come at a least rate. What is wrong with an answer is a ServerError.
"""

from __future__ import annotations

import contextlib
import dataclasses
import http.client
import io
import logging
import random
import re
import socket
import ssl
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Annotated, Any, TypeVar
from urllib.parse import urlencode

import numpy as np

from clt.data.index import StoreIndex
from clt.data.raw_rows import COLUMNS, Batch, empty_rows, tensor_of
from clt.data.statistics import Statistics
from clt.errors import UserError, mismatches, printable
from clt.files import parse_object
from clt.ranges import NOT_NEGATIVE, POSITIVE
from clt.server.wire import ENDLESS, WireError, read_frame

T = TypeVar("T")
log = logging.getLogger("clt")
LEAST_RATE = 1 << 16  # bytes a second at which an answer must come, once `timeout` is over
_DELAYS = (0.1, 10.0)  # seconds before the first and before the slowest new try
_PASSING = (408, 429, 502, 503, 504)  # statuses of a server that may answer later
_WAKE = 1 << 20  # bytes that are worth waking up for
_COUNT, _SIZE = Annotated[int, NOT_NEGATIVE], Annotated[int, POSITIVE]


class ServerError(UserError):
    """The server refused (`status`), failed or spoke nonsense. After `_PASSING` ones, ask again in `after` seconds."""

    def __init__(self, message: str, status: int = 200, after: float = 0.0) -> None:
        super().__init__(message)
        self.status, self.after = status, after


class ActivationClient:
    """The activation server at `url` (http or https), asked with a bearer token when there is one.

    It makes one connection a call and keeps nothing in between: threads may share it. `timeout` is how many seconds the
    server may be silent; `patience` is for how many seconds without success (it is away, it restarts, it has no rows) a
    call tries again, ever more slowly. Calls raise ServerError for what the server refuses or gets wrong, and for the
    last failure when patience is at an end; a url or a token that cannot be one is a UserError.
    """

    def __init__(self, url: str, token: str | None = None, timeout: float = 90.0, patience: float = 60.0) -> None:
        parts = re.fullmatch(r"(https?)://([\w.-]+|\[[\w:.]+\])(?::([0-9]{1,5}))?(/[!-~]*)?", url)
        if parts is None or int(parts[3] or 0) > 65535:
            shown = "with a user's name or password in it" if "@" in url else repr(url)
            raise UserError(f"url {shown} is not of the form http://HOST:PORT or https://HOST:PORT")
        if not re.fullmatch("[!-~]*", token or ""):
            raise UserError("the token has characters that a header cannot carry; wanted printable ASCII")
        self.url, self.timeout, self.patience = url.rstrip("/"), timeout, patience
        self._headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        kind = http.client.HTTPSConnection if parts[1] == "https" else http.client.HTTPConnection
        self._connect = lambda: kind(parts[2].strip("[]"), int(parts[3]) if parts[3] else None, timeout=timeout)
        self._prefix = (parts[4] or "").rstrip("/")

    def stream_activations(
        self, batch_size: int = 256, max_batches: int = ENDLESS, index: StoreIndex | None = None
    ) -> Iterator[Batch]:
        """`max_batches` batches. Each has its own memory.

        Goes on by itself over broken connections and restarts of the server. No row comes twice: the server gives
        each away once, and one that was lost on the way is lost. With an `index`, rows of another one are an error.
        """
        query = {"batch_size": batch_size, "max_batches": max_batches}
        return self._ask("/activations/stream", lambda answer: self._batches(answer, query, index), query)

    def heldout(self, batch_size: int = 64) -> Iterator[Batch]:
        """The held-out rows in their order, from the first to the last; `row` counts them from 0."""
        query = {"batch_size": batch_size, "start": 0}
        return self._ask("/heldout", lambda answer: self._batches(answer, query), query)

    def stats(self) -> dict[str, Any]:
        """The server's counters and the generator's state."""
        return self._get("/stats", lambda data: parse_object(data, {"max_batch": _SIZE}))

    def index(self) -> StoreIndex:
        """What a row is: model, layers, sites, text, L, D, dtype."""
        return self._get("/index", StoreIndex.parse)

    def statistics(self) -> Statistics:
        """Mean and sd of the training rows."""
        L, D, _ = self.index().shape
        return self._get("/statistics", lambda data: Statistics.parse(data, (L, D)), 32 * L * D + (1 << 16))

    def refresh(self) -> int:
        """Have the server drop its rows and make others; returns how many it dropped."""
        return self._get("/refresh", lambda data: parse_object(data, {"dropped": _COUNT}), method="POST")["dropped"]

    def _get(self, path: str, parse: Callable[[bytes], T], most: int = 1 << 20, method: str = "GET") -> T:
        (found,) = self._ask(path, lambda answer: [answer.parsed(parse, most)], {}, method)
        return found

    def _ask(
        self, path: str, read: Callable[[_Answer], Iterable[T]], query: Mapping[str, int], method: str = "GET"
    ) -> Iterator[T]:
        """What `read` makes of an answer. One that breaks off is asked for again, with `query` as it is by then.

        Patience counts from the first failure since an item: what the caller does between two of them is not waiting.
        """
        since, delay = None, _DELAYS[0]
        while True:
            try:
                with self._open(path, query, method) as answer:
                    for item in read(answer):
                        since, delay = None, _DELAYS[0]
                        yield item
                return
            except (OSError, http.client.HTTPException, WireError, ServerError) as error:
                told, now = f"{self.url}{path}: {error or type(error).__name__}", time.monotonic()
                status, least = (error.status, error.after) if isinstance(error, ServerError) else (503, 0.0)
                pause = max(least, delay * random.uniform(0.5, 1.0))  # many clients do not come back at once
                if status not in _PASSING or now + pause - (since or now) > self.patience:
                    tried = f" (tried for {now - since:.0f} s)" if since else ""
                    raise ServerError(told + tried, status) from error
                if since is None:  # so that nobody sits before a silent program
                    reason = printable(told)
                    log.warning("%s; trying again for %.0f s. Does the server run (clt serve)?", reason, self.patience)
            since, delay = since or now, min(2 * delay, _DELAYS[1])
            time.sleep(pause)

    @contextlib.contextmanager
    def _open(self, path: str, query: Mapping[str, int], method: str = "GET") -> Iterator[_Answer]:
        """The answer to one request. Raises ServerError for a refusal."""
        connection = self._connect()
        connection.connect()
        with contextlib.closing(connection.sock) as connected:
            connection.sock = answer = _Answer(connected, self.timeout)
            target = self._prefix + path + ("?" + urlencode(query) if query else "")
            connection.request(method, target, headers=self._headers)
            answer.response = response = connection.getresponse()
            if response.status != 200:
                after = response.headers.get("retry-after", "")
                seconds = int(after) if re.fullmatch("[0-9]{1,8}", after) else 0
                raise ServerError(answer.reason(), response.status, seconds)
            yield answer

    def _batches(self, answer: _Answer, query: dict[str, int], wanted: StoreIndex | None = None) -> Iterator[Batch]:
        """The batches of an answer: as many as asked for or, of held-out rows, all to the end. Raises WireError.

        `query` becomes what is still to be asked for. The index is asked for when the answer has begun: it is of the
        same server, or of a later one.
        """
        with self._open("/index", {}) as other:
            index = other.parsed(StoreIndex.parse)
        tree = dataclasses.asdict(wanted or index)
        if odd := mismatches(dataclasses.asdict(index) | {"rows": tree["rows"]}, tree):
            raise ServerError(f"the server now serves other rows ({odd}): start it as it was, or begin a new run")
        shape, n, whole = index.shape, query["batch_size"], "max_batches" in query
        segment = answer.response.headers.get("x-clt-segment", "")
        if not re.fullmatch(r"\w{1,16}" if whole else "", segment, re.ASCII):
            raise WireError(f"found the segment {segment!r:.40}, wanted 1 to 16 letters and digits (held out: none)")
        sequence, done = 0, n
        while done == n > 0 and query.get("max_batches") != 0:
            rows, done = empty_rows(n, shape), 0
            answer.expect(n * shape.row_bytes)
            while done < n and (k := read_frame(answer.response.readinto, sequence, shape, segment, rows, done)):
                done, sequence = done + k, sequence + 1
            if done < n and (whole or answer.response.length):
                raise WireError(f"the stream ended after {done} of the {n} rows of a batch")
            columns, first = {name: rows[name][:done] for name in COLUMNS}, query.get("start", 0)
            if not whole and not np.array_equal(columns["row"], np.arange(first, first + done)):
                raise ServerError(f"found other rows than those from {first} on")
            query |= {"max_batches": query["max_batches"] - 1} if whole else {"start": first + done}
            if done:
                yield Batch(tensor_of(rows, shape)[:done], **columns, segment=segment)


class _Answer(socket.SocketIO):
    """A connection's socket for http.client, and then its answer: read at a least rate, and of a largest size."""

    response: http.client.HTTPResponse

    def __init__(self, connected: socket.socket, timeout: float) -> None:
        super().__init__(connected, "r")
        self.socket, self.timeout, self.sendall = connected, timeout, connected.sendall
        self.expect(0)

    def expect(self, size: int) -> None:
        """From now on `size` bytes are to come within `timeout` and the time that the least rate gives them."""
        self.deadline = time.monotonic() + self.timeout + size / LEAST_RATE

    def makefile(self, mode: str) -> io.BufferedReader:
        return io.BufferedReader(self)

    def readinto(self, b: Any) -> int:
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError(f"the answer did not come within {self.timeout:g} s and at {LEAST_RATE} bytes a second")
        self.socket.settimeout(min(self.timeout, left))
        # For each packet that woke this process, both ends would pay dearly. A view that is larger than the buffer of
        # the BufferedReader above is one that will be filled. (Under TLS the kernel counts other bytes than `b`.)
        if sys.platform == "linux" and not isinstance(self.socket, ssl.SSLSocket):
            soon = min(len(b), _WAKE, int(LEAST_RATE * min(self.timeout, left) / 2))
            wake = soon if len(b) > io.DEFAULT_BUFFER_SIZE else 1
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, wake)
        return self.socket.recv_into(b)

    def close(self) -> None:
        """Nothing: http.client closes it while the answer is still read."""

    def read_all(self, most: int = 1 << 20) -> bytes:
        """All of it. Raises WireError when that is more than `most` bytes, or less than was announced."""
        self.expect(most)
        data = self.response.read(most + 1)
        if len(data) > most or self.response.length:
            raise WireError(f"found an answer of {len(data)} bytes that was cut off, or of more than {most}")
        return data

    def parsed(self, parse: Callable[[bytes], T], most: int = 1 << 20) -> T:
        """What `parse` makes of all of it. Raises ServerError where that raises ValueError."""
        data = self.read_all(most)
        try:
            return parse(data)
        except (ValueError, RecursionError) as error:
            told = f"found {data[:40]!r}, which this version's activation servers do not answer: {error!s:.500}"
            raise ServerError(told) from error

    def reason(self) -> str:
        """What it says for itself, of a refusal."""
        text = self.read_all().decode("utf-8", "replace") or self.response.reason
        with contextlib.suppress(ValueError, RecursionError):
            text = parse_object(text, {"error": str})["error"]
        return f"answered {self.response.status}: {text!s:.1000}"
