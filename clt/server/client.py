"""The client of an activation server, for any process: needs neither starlette nor uvicorn.

Nothing that a server says is taken at its word: sizes are bounded by what was asked for, rows are compared with the
server's index, and an answer has to come at a least rate. What is wrong with an answer is a ServerError.
"""

from __future__ import annotations

import contextlib
import http.client
import io
import json
import logging
import os
import random
import socket
import stat
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlencode, urlsplit

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from clt.data.index import FORMAT_VERSION, STATISTICS_TENSORS, StoreIndex
from clt.data.statistics import Statistics
from clt.errors import UserError
from clt.server.wire import COLUMNS, ITEM_BYTES, Batch, Shape, WireError, read_frame

T = TypeVar("T")
log = logging.getLogger("clt")
LEAST_RATE = 1 << 16
"""Bytes a second at which an answer must come, once the server has begun to speak."""
_BACKOFF = (0.1, 10.0)  # seconds before the first and before the slowest new try
_ROUND = 1 << 20  # batches asked for at once: an answer of known length costs the server a copy less
_WAKE, _READ_AHEAD = 1 << 21, 1 << 16  # bytes that are worth waking for, and that buffers may hold already
_JSON_BYTES = 64 << 20
_INDEX: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(("model", "tokenizer_hash", "lm_dtype"), lambda v: type(v) is str),
    **dict.fromkeys(("revision", "lm_revision"), lambda v: v is None or type(v) is str),
    **dict.fromkeys(("seed", "context", "rows"), lambda v: type(v) is int and 0 <= v < 1 << 63),
    **dict.fromkeys(("n_layers", "d_acts"), lambda v: type(v) is int and 0 < v < 1 << 20),
    "lm_layers": lambda v: v is None or type(v) is int,
    "layers": lambda v: type(v) is list and all(type(each) is int for each in v),
    **dict.fromkeys(("input_sites", "output_sites"), lambda v: type(v) is list and all(type(e) is str for e in v)),
    "text": lambda v: type(v) is dict and v.get("part") in ("train", "heldout"),
    "format_version": lambda v: v == FORMAT_VERSION,
    "dtype": lambda v: type(v) is str and v in ITEM_BYTES,
    "shards": lambda v: v == [],
}


class ServerError(UserError):
    """The server refused, failed or spoke nonsense; the message is what it said."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class _Again(Exception):
    """What may be mended by asking again, `after` seconds later at the earliest."""

    def __init__(self, reason: str, after: float = 0.0) -> None:
        super().__init__(reason)
        self.after = after


def read_token(file: str | None) -> str | None:
    """The bearer token: environment variable CLT_SERVER_TOKEN, else the first line of `file`, else None.

    Raises UserError for a file that is missing, that others can read, or that holds no token.
    """
    token, where = os.environ.get("CLT_SERVER_TOKEN"), "CLT_SERVER_TOKEN"
    if token is None and file is not None:
        where = f"token_file {file}"
        try:
            found = os.stat(file)
            token = Path(file).read_bytes()[:4096].partition(b"\n")[0].strip(b" \t\r").decode("latin-1")
        except OSError as error:
            raise UserError(f"{where}: {error.strerror}; write the token into it, `openssl rand -hex 32`") from error
        if found.st_uid == os.geteuid() and found.st_mode & 0o077:
            raise UserError(f"{where} can be read by others ({stat.filemode(found.st_mode)}): run `chmod 600 {file}`")
    if token is not None and not (len(token) >= 16 and token.isascii() and token.isprintable() and " " not in token):
        raise UserError(
            f"the token in {where} is not 16 or more printable ASCII characters, as of `openssl rand -hex 32`"
        )
    return token


class ActivationClient:
    """The activation server at `url` (http or https), asked with a bearer token when there is one.

    It makes one connection a call and keeps nothing in between: threads may share it. `timeout` is how many seconds the
    server may be silent; `patience` is for how many seconds without success (it is away, it restarts, it has no rows) a
    call tries again, ever more slowly. Calls raise ServerError for what the server refuses or gets wrong, and for the
    last failure when patience is at an end; a url or a token that cannot be one is a UserError.
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
        (batch,) = self.stream_activations(batch_size, 1)
        rows = batch.activations
        about = {"shape": list(rows.shape), "dtype": str(rows.dtype).removeprefix("torch."), "segment": batch.segment}
        return {**about, **{name: getattr(batch, name).tolist() for name in COLUMNS}, "activations": rows.tolist()}

    def get_activations_tensor(self, batch_size: int = 256) -> Tensor:
        """One batch (n, 2, L, D) in the server's dtype."""
        return next(self.stream_activations(batch_size, 1)).activations

    def stream_activations(self, batch_size: int = 256, max_batches: int | None = None) -> Iterator[Batch]:
        """Batches without end, or `max_batches` of them, each in memory of its own.

        Goes on by itself over broken connections and restarts of the server. No row comes twice: the server gives
        each away once, and one that was lost on the way is lost.
        """

        def query(batches: int) -> dict[str, int] | None:
            left = _ROUND if max_batches is None else min(max_batches - batches, _ROUND)
            return {"batch_size": batch_size, "max_batches": left} if left else None

        return self._batches("/activations/stream", batch_size, query)

    def heldout(self, batch_size: int = 256) -> Iterator[Batch]:
        """The held-out rows in their order, from the first to the last; `row` counts them from 0."""
        at = 0
        for batch in self._batches("/heldout", batch_size, lambda _: {"batch_size": batch_size, "start": at}):
            if batch.segment or not np.array_equal(batch.row, np.arange(at, at + len(batch.row))):
                raise ServerError(f"{self.url}/heldout: found other rows than those from {at} on", 200)
            at += len(batch.row)
            yield batch

    def stats(self) -> dict[str, Any]:
        """The server's counters and the generator's state."""
        found = self._json("/stats")
        if not isinstance(found, dict) or type(found.get("max_batch")) is not int or found["max_batch"] < 1:
            raise ServerError(f"{self.url}/stats is not of an activation server: {found!r:.200}", 200)
        return found

    def index(self) -> StoreIndex:
        """What a row is: model, layers, sites, text, L, D, dtype."""
        return self._patiently(self._index)

    def _index(self) -> StoreIndex:
        found, where = self._get("/index", _read_json), f"{self.url}/index is not of this version's activation server"
        if not isinstance(found, dict) or found.keys() != _INDEX.keys():
            odd = sorted(found.keys() ^ _INDEX.keys()) if isinstance(found, dict) else found
            raise ServerError(f"{where}: missing or unknown {odd!r:.300}", 200)
        odd = {name: found[name] for name, holds in _INDEX.items() if not holds(found[name])}
        if any(
            name not in odd and len(found[name]) != found["n_layers"]
            for name in ("layers", "input_sites", "output_sites")
        ):
            odd["n_layers"] = found["n_layers"]
        if odd:
            raise ServerError(f"{where}: found {odd!r:.300}", 200)
        return StoreIndex(**found)

    def statistics(self) -> Statistics:
        """Mean and sd of the training rows."""
        index = self.index()
        dims = (index.n_layers, index.d_acts)

        def read(answer: _Answer) -> Statistics:
            try:
                tensors = safetensors.torch.load(answer.read_all(4 * 8 * index.n_layers * index.d_acts + 65_536))
                rows = int(tensors.pop("rows"))
                right = rows > 0 and {*tensors, "rows"} == {*STATISTICS_TENSORS}
                for name, tensor in tensors.items():
                    right &= tensor.shape == dims and tensor.dtype == torch.float64 and bool(tensor.isfinite().all())
                    right &= "sd" not in name or bool((tensor >= 0).all())
            except (safetensors.SafetensorError, KeyError, ValueError, RuntimeError) as error:
                raise ServerError(f"{self.url}/statistics: found no statistics: {error}", 200) from error
            if not right:
                raise ServerError(
                    f"{self.url}/statistics: found other tensors than finite {dims} of 1 row or more", 200
                )
            return Statistics(**tensors, rows=rows)

        return self._patiently(lambda: self._get("/statistics", read))

    def refresh(self) -> int:
        """Have the server drop its rows and make others; returns how many it dropped. Asked once, without patience."""
        try:
            found = self._get("/refresh", _read_json, "POST")
        except _Again as error:
            raise ServerError(str(error), 503) from error
        if not isinstance(found, dict) or type(found.get("dropped")) is not int:
            raise ServerError(f"{self.url}/refresh: found {found!r:.200}, wanted how many rows were dropped", 200)
        return found["dropped"]

    def _json(self, path: str, **query: int) -> Any:
        return self._patiently(lambda: self._get(path, _read_json, "GET", **query))

    def _get(self, path: str, read: Callable[[_Answer], T], method: str = "GET", **query: int) -> T:
        """One request; raises _Again for what may pass and ServerError for what will not."""
        with self._open(path, method, query) as answer:
            return read(answer)

    @contextlib.contextmanager
    def _open(self, path: str, method: str, query: dict[str, int]) -> Iterator[_Answer]:
        connection, answer = self._connect(), None
        try:
            answer = _Answer(connection, self.timeout)
            target = self._prefix + path + ("?" + urlencode(query) if query else "")
            connection.request(method, target, headers=self._headers)
            answer.begin(connection.getresponse())
            if answer.status != 200:
                raise self._refusal(path, answer)
            yield answer
        except (OSError, http.client.HTTPException, WireError) as error:
            raise _Again(f"{self.url}{path}: {error or type(error).__name__}") from error
        finally:
            if answer is not None:
                answer.socket.close()

    def _refusal(self, path: str, answer: _Answer) -> Exception:
        text = answer.read_all(65_536).decode("utf-8", "replace")
        try:
            reason = str(json.loads(text)["error"])
        except (ValueError, KeyError, TypeError, RecursionError):
            reason = text or answer.response.reason
        message = f"{self.url}{path} answered {answer.status}: {reason:.1000}"
        if answer.status in (408, 429, 502, 503, 504):
            after = answer.headers.get("retry-after", "0")
            return _Again(message, float(after) if after.isascii() and after.isdigit() and len(after) < 9 else 0.0)
        return ServerError(message, answer.status)

    def _patiently(self, work: Callable[[], T]) -> T:
        wait = _Waiting(self.patience)
        while True:
            try:
                return work()
            except _Again as error:
                wait.after(error)

    def _batches(self, path: str, n: int, query: Callable[[int], dict[str, int] | None]) -> Iterator[Batch]:
        """The batches of as many requests as it takes; `query(batches)` had so far says what to ask for next."""
        wait, batches = _Waiting(self.patience), 0
        while (asked := query(batches)) is not None:
            try:
                index = self._index()
                shape = Shape(index.n_layers, index.d_acts, index.dtype)
                with self._open(path, "GET", asked) as answer:
                    if answer.length == 0 and path == "/heldout":  # behind the last row
                        return
                    sequence, before = 0, batches
                    while batches - before < asked.get("max_batches", _ROUND):
                        batch, sequence = _read_batch(answer, n, shape, sequence, short=path == "/heldout")
                        if batch is None:
                            break
                        wait.reset()
                        batches += 1
                        yield batch
                    if sequence == 0:
                        raise WireError("the stream ended before its first frame")
            except _Again as error:
                wait.after(error)


def _read_batch(answer: _Answer, n: int, shape: Shape, sequence: int, short: bool) -> tuple[Batch | None, int]:
    """The next batch of n rows, or of fewer where the stream may be `short`, and the number of the frame behind it."""
    out = torch.empty(n, 2, shape.n_layers, shape.d_acts, dtype=getattr(torch, shape.dtype))
    done, parts, segments = 0, [], set()
    while done < n:
        answer.expect(0)
        found = read_frame(answer.fill, shape, out[done:], sequence, answer.expect)
        if found is None:
            if done and not short:
                raise WireError(f"the stream was cut off within a batch: found {done} rows, wanted {n}")
            break
        columns, segment = found
        done, sequence = done + len(columns["row"]), sequence + 1
        parts.append(columns)
        segments.add(segment)
    if not parts:
        return None, sequence
    if len(segments) > 1:
        raise WireError(f"found rows of several buffers in one batch: {sorted(segments)}")
    columns = {
        name: np.concatenate([part[name] for part in parts]) if len(parts) > 1 else parts[0][name] for name in COLUMNS
    }
    return Batch(out[:done], **columns, segment=segments.pop()), sequence


class _Answer(io.RawIOBase):
    """A connection's socket, as http.client wants it, and then its answer: read at a least rate and within bounds."""

    def __init__(self, connection: http.client.HTTPConnection, timeout: float) -> None:
        connection.connect()
        self.socket, self.timeout = connection.sock, timeout
        connection.sock = self  # type: ignore[assignment]
        self.expect(0)

    def expect(self, size: int) -> None:
        """From now on `size` bytes are to come within `timeout` and the time that the least rate gives them."""
        self.deadline = time.monotonic() + self.timeout + size / LEAST_RATE

    def makefile(self, mode: str) -> io.BufferedReader:
        return io.BufferedReader(self)

    def readable(self) -> bool:
        return True

    def readinto(self, view: Any) -> int:
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError(f"the answer came at less than {LEAST_RATE} bytes a second")
        self.socket.settimeout(min(self.timeout, left))
        return self.socket.recv_into(view)

    def sendall(self, data: Any) -> None:
        self.socket.sendall(data)

    def close(self) -> None:
        """Nothing: http.client closes it while the answer is still read."""

    def begin(self, response: http.client.HTTPResponse) -> None:
        """The head has come."""
        self.response, self.headers, self.status, self.length = (
            response, response.headers, response.status, response.length,
        )  # fmt: skip

    def fill(self, view: memoryview) -> int:
        """Fill the view; returns how many bytes that were, fewer at the end of the answer alone."""
        done = 0
        while done < len(view):
            # For each packet that woke this process, both ends would pay dearly.
            wake = _WAKE if len(view) - done > _WAKE + _READ_AHEAD else 1
            if sys.platform == "linux":
                self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, wake)
            count = self.response.readinto(view[done : done + _WAKE])
            if not count:
                break
            done += count
        return done

    def read_all(self, most: int) -> bytes:
        """All of it. Raises WireError when that is more than `most` bytes, or less than was announced."""
        self.expect(most)
        data = b""
        while piece := self.response.read1(65_536):
            data += piece
            if len(data) > most:
                raise WireError(f"the answer is longer than {most} bytes")
        if self.length is not None and len(data) < self.length:
            raise WireError(f"the answer was cut off: found {len(data)} bytes, wanted {self.length}")
        return data


def _read_json(answer: _Answer) -> Any:
    text = answer.read_all(_JSON_BYTES)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ServerError(f"found {text[:40]!r} where an activation server answers in JSON", 200) from error


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
