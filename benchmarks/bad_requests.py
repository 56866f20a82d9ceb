"""Requests that no client should send, and whether the server answers each as it must. Used by serving.py."""

from __future__ import annotations

import contextlib
import json
import random
import socket
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple
from urllib.parse import quote

PATHS = ["/", "/stats", "/index", "/statistics", "/healthz", "/heldout", "/refresh", "/nowhere", "/activations",
         "/activations/tensor", "/activations/stream", "/activations/", "//stats",
         "/../../etc/passwd", "/%00", "/stats/.."]  # fmt: skip
METHODS = ["GET", "GET", "GET", "POST", "PUT", "DELETE", "HEAD", "PATCH", "OPTIONS", "TRACE", "CONNECT", "BREW", "get"]
NAMES = [
    "batch_size",
    "max_batches",
    "start",
    "batch_size ",
    "BATCH_SIZE",
    "x",
    "",
    "__proto__",
    "batch_size[]",
    "\x00",
]
VALUES = ["0", "-1", "1e9", "9" * 30, "9" * 5000, "NaN", "inf", "", " 1", "1 ", "0x10", "1.5", "true", "null", "٣",
          "1;drop table", "../../etc/passwd", "%00", "\xed\xa0\x80", "[1]"]  # fmt: skip

HOSTS = ["x", "[", "[::1", "]", "", "127.0.0.1:x", "127.0.0.1:99999", "evil.example:8000", "a b", "é", "//", "@"]

PLAIN = (b"Invalid host header", b"Invalid HTTP request received.")
"""Reasons that starlette and uvicorn give themselves."""


class Request(NamedTuple):
    """What goes over the wire, in parts with a pause (seconds) between them, and how the sending ends."""

    parts: list[bytes]
    pause: float = 0.0
    half_close: bool = False
    complete: bool = True
    """False: it may be closed without an answer."""


def generate(count: int, seed: int) -> Iterator[Request]:
    """About `count` bad requests, the same ones for the same seed; one in 250 is slow."""
    dice = random.Random(seed)
    for number in range(count):
        if number % 500 == 0:
            yield Request([b"GET /stats HTTP/1.1\r\n"] + [b"a: b\r\n"] * 40, pause=0.4, complete=False)
            yield Request([b""], complete=False)  # and one that says nothing at all
            continue
        kind = dice.random()
        if kind < 0.6:
            yield Request([_request(dice, _target(dice), "")])
        elif kind < 0.75:
            yield Request([_request(dice, _target(dice), _headers(dice))], complete=False)
        elif kind < 0.85:
            whole = _request(dice, _target(dice), "")
            yield Request([whole[: dice.randrange(len(whole))]], half_close=True, complete=False)
        elif kind < 0.95:
            body = dice.randbytes(dice.randrange(1, 3000))
            length = dice.choice([f"content-length: {len(body)}", "transfer-encoding: chunked", "content-length: -5",
                                  "content-length: 99999999999", "content-length: 1\r\ncontent-length: 2"])  # fmt: skip
            yield Request([_request(dice, "/refresh", length + "\r\n"), body], complete=False)
        else:
            yield Request([dice.randbytes(dice.randrange(1, 400)) + b"\r\n\r\n"], half_close=True, complete=False)


def _target(dice: random.Random) -> str:
    pairs = [
        (dice.choice(NAMES), dice.choice([*VALUES, str(dice.randrange(-5, 10**6))])) for _ in range(dice.randrange(4))
    ]
    encode = dice.choice([quote, lambda text: quote(text, safe="[];,/"), lambda text: quote(quote(text))])
    query = "&".join(f"{encode(name)}={encode(value)}" for name, value in pairs)
    return dice.choice(PATHS) + dice.choice(["?", "?&", "?", "?=&"]) * bool(pairs) + query


def _request(dice: random.Random, target: str, headers: str) -> bytes:
    host = dice.choice(HOSTS) if dice.random() < 0.05 else "127.0.0.1"  # another one is refused before all else
    return f"{dice.choice(METHODS)} {target} HTTP/1.1\r\nhost: {host}\r\nconnection: close\r\n{headers}\r\n".encode()


def _headers(dice: random.Random) -> str:
    return dice.choice(
        [
            "a: " + "b" * dice.randrange(1000, 200_000) + "\r\n",
            "a: b\r\n" * dice.randrange(100, 5000),
            "authorization: Bearer " + "x" * 50 + "\r\n",
            "upgrade: websocket\r\nconnection: upgrade\r\nsec-websocket-key: x\r\nsec-websocket-version: 13\r\n",
            "expect: 100-continue\r\ncontent-length: 10\r\n",
            "origin: http://elsewhere.example\r\n",
            "origin: http://[\r\n",
            "origin: null\r\n",
            "\x00: \x01\r\n",
            "no colon\r\n",
        ]
    )


def judge(port: int, request: Request, timeout: float = 30.0) -> str:
    """ "fine", "closed" (without an answer; no fault either), or what is wrong with how the server took it."""
    try:
        with socket.create_connection(("127.0.0.1", port), timeout) as connection:
            with contextlib.suppress(ConnectionError):
                for part in request.parts:
                    connection.sendall(part)
                    time.sleep(request.pause)
                if request.half_close:
                    connection.shutdown(socket.SHUT_WR)
            answer, end = b"", time.monotonic() + timeout
            with contextlib.suppress(ConnectionError):
                while len(answer) < 200_000 and (piece := connection.recv(65_536)):
                    answer += piece
                    if time.monotonic() > end:
                        return "hang"
    except TimeoutError:
        return "hang"
    return _verdict(answer, request)


def _verdict(answer: bytes, request: Request) -> str:
    if answer.startswith(b"HTTP/1.1 100 Continue\r\n\r\n"):
        answer = answer[25:]
    if not answer:
        return "no answer" if request.complete else "closed"
    head, _, body = answer.partition(b"\r\n\r\n")
    status = int(head.split(None, 2)[1])
    if 200 <= status < 300:
        return "fine"
    if not (400 <= status < 500 or status == 503):
        return f"status {status}"
    if request.parts[0].startswith(b"HEAD") or (status == 400 and body in PLAIN):
        return "fine"
    try:
        return "fine" if json.loads(body)["error"] else "no reason"
    except (ValueError, KeyError, TypeError):
        return f"status {status} without a reason"


def send_all(port: int, count: int, seed: int = 0) -> Counter[str]:
    """How many of `count` requests came to which verdict."""
    with ThreadPoolExecutor(16) as pool:
        return Counter(pool.map(lambda request: judge(port, request), generate(count, seed)))
