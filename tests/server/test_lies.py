"""Servers that lie, trickle or break off: each ends in a ServerError, and takes neither time nor memory."""

import contextlib
import copy
import json
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import safetensors.torch
import torch

from clt.server import client as module
from clt.server.client import ActivationClient, ServerError
from clt.server.remote import ServerStore
from clt.server.wire import COLUMNS, Shape, body_of, frame

SHAPE = Shape(3, 4, "float16")
INDEX = {"format_version": 1, "model": "m", "revision": None, "tokenizer_hash": "t", "layers": [0, 1, 2],
         "input_sites": ["a"] * 3, "output_sites": ["b"] * 3, "text": {"part": "train"}, "seed": 0, "context": 8,
         "n_layers": 3, "d_acts": 4, "dtype": "float16", "rows": 0, "shards": [], "lm_layers": 3, "lm_dtype": "float32",
         "lm_revision": None}  # fmt: skip
Send = Callable[[socket.socket], None]
Answers = dict[str, Send]


def rows(n: int, shape: Shape = SHAPE, sequence: int = 0, segment: str = "abc", first: int = 0) -> bytes:
    tensor = torch.zeros(n, 2, shape.n_layers, shape.d_acts, dtype=getattr(torch, shape.dtype))
    return b"".join(
        frame([body_of(tensor, {name: np.arange(first, first + n) for name in COLUMNS})], sequence, shape, segment)
    )


def answer(
    body: bytes, status: str = "200 OK", length: int | None = None, more: str = ""
) -> Callable[[socket.socket], None]:
    head = f"HTTP/1.1 {status}\r\ncontent-length: {len(body) if length is None else length}\r\n{more}\r\n".encode()
    return lambda connection: connection.sendall(head + body)


def trickle(head: bytes, pause: float = 0.02) -> Send:
    def send(connection: socket.socket) -> None:
        connection.sendall(head)
        while True:
            connection.sendall(b"1")
            time.sleep(pause)

    return send


def statistics(**changes: torch.Tensor | None) -> bytes:
    names = ("input_mean", "input_sd", "target_mean", "target_sd")
    tensors = {**{name: torch.ones(3, 4, dtype=torch.float64) for name in names}, "rows": torch.tensor(9)}
    return safetensors.torch.save({key: value for key, value in (tensors | changes).items() if value is not None})


GOOD: Answers = {"/index": answer(json.dumps(INDEX).encode()), "/stats": answer(b'{"max_batch": 100}'),
                 "/statistics": answer(statistics())}  # fmt: skip


@contextlib.contextmanager
def liar(answers: Answers) -> Iterator[ActivationClient]:
    """A client of a server that answers so; impatient, as asking again does not help."""

    def handle(connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            request = connection.recv(65536).decode()
            path = request.split()[1].split("?")[0] if request else "/"
            ({**GOOD, **answers}).get(path, answer(b"no", "404 Not Found"))(connection)

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=handle, args=(listener.accept()[0],), daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=serve, daemon=True).start()
        yield ActivationClient(f"http://127.0.0.1:{listener.getsockname()[1]}", timeout=0.5, patience=0)
        listener.shutdown(socket.SHUT_RDWR)


def test_the_honest_one_is_believed():
    stream = answer(rows(2) + rows(2, sequence=1), more="")
    with liar({"/activations/stream": stream, "/heldout": answer(rows(2, segment=""))}) as client:
        assert [len(batch.row) for batch in client.stream_activations(2, 2)] == [2, 2]
        assert client.index().n_layers == 3
        assert client.statistics().rows == 9
        assert len(next(client.heldout(2)).row) == 2


@pytest.mark.parametrize(
    "change",
    [
        {"n_layers": -1}, {"n_layers": 10**12}, {"n_layers": True}, {"n_layers": 3.0}, {"n_layers": "3"},
        {"n_layers": 2},
        {"d_acts": 0}, {"d_acts": None}, {"dtype": "float64"}, {"dtype": "load"}, {"dtype": ["float16"]},
        {"dtype": None},
        {"layers": [0, 1, "2"]}, {"layers": 3}, {"layers": None}, {"input_sites": "abc"}, {"text": []}, {"text": {}},
        {"format_version": 99}, {"shards": [{"file": "x"}]}, {"model": None}, {"rows": "many"}, {"unknown": 1},
        {"seed": None}, {"context": float("nan")}, {"lm_layers": "x"},
    ],
)  # fmt: skip
def test_an_index_that_makes_no_sense(change):
    tree = copy.deepcopy(INDEX) | change
    with liar({"/index": answer(json.dumps(tree).encode())}) as client:
        for ask in (client.index, client.statistics, lambda: next(client.stream_activations(2))):
            with pytest.raises(ServerError):
                ask()


@pytest.mark.parametrize(
    "body", [b"", b"null", b"[]", b"3", b"{", b"[" * 100_000, b"\xff\xfe", b'{"max_batch": -1}', b'{"max_batch": 1e9}',
             b'{"max_batch": true}', b"<html>a notebook</html>"],
)  # fmt: skip
@pytest.mark.parametrize("path", ["/stats", "/index", "/refresh", "/statistics"])
def test_answers_of_another_kind(path, body):
    with liar({path: answer(body)}) as client:
        ask = {
            "/stats": client.stats,
            "/index": client.index,
            "/refresh": client.refresh,
            "/statistics": client.statistics,
        }
        with pytest.raises(ServerError):
            ask[path]()


@pytest.mark.parametrize(
    "change",
    [
        {"input_mean": torch.ones(3, 5, dtype=torch.float64)}, {"input_sd": -torch.ones(3, 4, dtype=torch.float64)},
        {"target_sd": torch.full((3, 4), torch.nan, dtype=torch.float64)}, {"target_mean": torch.ones(3, 4)},
        {"rows": torch.tensor(-3)}, {"rows": torch.tensor([1, 2])}, {"rows": None}, {"input_sd": None},
        {"more": torch.ones(1)},
    ],
)  # fmt: skip
def test_statistics_of_another_shape_or_that_cannot_be(change):
    with liar({"/statistics": answer(statistics(**change))}) as client, pytest.raises(ServerError):
        client.statistics()


good = rows(2)
LIES = {
    "another shape": rows(2, Shape(3, 5, "float16")),
    "another dtype": rows(2, Shape(3, 4, "bfloat16")),
    "more rows than asked for": rows(3),
    "no rows": good[:4] + struct.pack("<I", 0) + good[8:],
    "4 billion rows": good[:4] + struct.pack("<I", 2**32 - 1) + good[8:],
    "out of order": rows(2, sequence=5),
    "a flipped bit": good[:-3] + bytes([good[-3] ^ 4]) + good[-2:],
    "a segment of other bytes": rows(2, segment="a\n\x1b"),
    "cut off": good[:-10],
    "no frame": b"x" * 500,
    "nothing": b"",
}


@pytest.mark.parametrize("lie", LIES)
def test_frames_that_are_not_what_was_asked_for(lie):
    with liar({"/activations/stream": answer(LIES[lie])}) as client:
        with pytest.raises(ServerError):
            next(client.stream_activations(2))
        with pytest.raises(ServerError):
            ServerStore(client, 100).read(np.arange(2), torch.zeros(2, 2, 3, 4, dtype=torch.float16))


def test_heldout_rows_out_of_order():
    for lie in (rows(2, segment="", first=1), rows(2, segment="abc")):
        with (
            liar({"/heldout": answer(lie)}) as client,
            pytest.raises(ServerError, match="other rows than those from 0"),
        ):
            list(client.heldout(2))


@pytest.mark.parametrize(
    "send",
    [
        answer(b"{}", length=10**15), answer(b"{}", length=-5), answer(b"x", "500 Oops"),
        answer(b"[" * 99_999, "503 No"),
        answer(b'{"error": {"a": 1}}', "403 No"), answer(b"", "503 No", more="retry-after: 99999999999999\r\n"),
        answer(b"", "503 No", more="retry-after: \xb2\r\n"), answer(b"", "302 Found", more="location: /\r\n"),
        answer(b"", "999 What"), answer(b"x", "abc"), trickle(b"HTTP/1.1 200 OK\r\na: "), trickle(b""),
        trickle(b"HTTP/1.1 200 OK\r\ncontent-length: 9999999\r\n\r\n"), trickle(b"HTTP/1.1 100 Continue\r\n\r\n" * 50),
        trickle(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"),
        lambda connection: connection.sendall(b"HTTP/1.1 200 OK\r\n" + b"a: b\r\n" * 500),
        lambda connection: None,
    ],
)  # fmt: skip
def test_answers_that_trickle_or_are_no_http(send, monkeypatch):
    """`timeout` is for each read, so a byte now and then would hold a client for ever without a least rate."""
    monkeypatch.setattr(module, "LEAST_RATE", 1 << 26)
    with liar({"/stats": send, "/activations/stream": send}) as client:
        for ask in (client.stats, lambda: next(client.stream_activations(2))):
            with pytest.raises(ServerError):
                ask()


def test_an_endless_answer_takes_no_memory():
    def endless(connection: socket.socket) -> None:
        connection.sendall(b"HTTP/1.1 200 OK\r\nconnection: close\r\n\r\n")
        while True:
            connection.sendall(b" " * (1 << 20))

    with liar({"/stats": endless}) as client, pytest.raises(ServerError, match="at most"):
        client.stats()
