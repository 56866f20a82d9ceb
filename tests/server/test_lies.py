"""Servers that lie, trickle or break off: each ends in a ServerError, and takes neither time nor memory."""

import contextlib
import dataclasses
import json
import re
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.torch
import torch

from clt.data.index import RowShape
from clt.data.raw_rows import COLUMNS, raw_rows
from clt.errors import UserError
from clt.server import client as module
from clt.server.client import ActivationClient, ServerError
from clt.server.remote import ServerStore
from clt.server.wire import frame

SHAPE = RowShape(3, 4, "float16")
INDEX = {"format_version": 1, "model": "m", "revision": None, "tokenizer_hash": "t", "layers": [0, 1, 2],
         "input_sites": ["a"] * 3, "output_sites": ["b"] * 3, "text": {"part": "train"}, "seed": 0, "context": 8,
         "n_layers": 3, "d_acts": 4, "dtype": "float16", "rows": 0, "shards": [], "lm_layers": 3, "lm_dtype": "float32",
         "lm_revision": None}  # fmt: skip
Send = Callable[[socket.socket], None]


def rows(n: int, shape: RowShape = SHAPE, sequence: int = 0, segment: str = "abc", first: int = 0) -> bytes:
    tensor = torch.zeros(n, 2, shape.n_layers, shape.d_acts, dtype=getattr(torch, shape.dtype))
    body = raw_rows(tensor, {name: np.arange(first, first + n) for name in COLUMNS})
    return b"".join(frame([body], sequence, shape, segment))


def answer(
    body: bytes, status: str = "200 OK", length: int | None = None, more: str = "x-clt-segment: abc\r\n"
) -> Send:
    head = f"HTTP/1.1 {status}\r\ncontent-length: {len(body) if length is None else length}\r\n{more}\r\n".encode()
    return lambda connection: connection.sendall(head + body)


def without_end(head: bytes, piece: bytes = b"1", pause: float = 0.02) -> Send:
    def send(connection: socket.socket) -> None:
        connection.sendall(head)
        while True:
            connection.sendall(piece)
            time.sleep(pause)

    return send


def statistics(**changes: torch.Tensor | None) -> bytes:
    names = ("input_mean", "input_sd", "target_mean", "target_sd")
    tensors = {**{name: torch.ones(3, 4, dtype=torch.float64) for name in names}, "rows": torch.tensor(9)}
    return safetensors.torch.save({key: value for key, value in (tensors | changes).items() if value is not None})


@contextlib.contextmanager
def liar(patience: float = 0.0, timeout: float = 60.0, **answers: Send | Iterator[Send]) -> Iterator[ActivationClient]:
    """A client of a server that gives these answers, by the last word of their paths; an iterator's one by one."""
    good = {"index": answer(json.dumps(INDEX).encode()), "stats": answer(b'{"max_batch": 100}'),
            "statistics": answer(statistics())}  # fmt: skip

    def handle(connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            request = connection.recv(65536).decode()
            word = re.split(r"[/? ]+", request.partition(" HTTP")[0].partition("?")[0])[-1]
            send = (good | answers).get(word, answer(b"no", "404 Not Found"))
            (next(send) if isinstance(send, Iterator) else send)(connection)

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=handle, args=(listener.accept()[0],), daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=serve, daemon=True).start()
        yield ActivationClient(f"http://127.0.0.1:{listener.getsockname()[1]}", timeout=timeout, patience=patience)
        listener.shutdown(socket.SHUT_RDWR)


def test_the_honest_one_is_believed():
    stream = answer(rows(2) + rows(1, sequence=1) + rows(1, sequence=2))
    with liar(
        stream=stream, heldout=answer(rows(2, segment="") + rows(1, sequence=1, segment="", first=2), more="")
    ) as it:
        assert [len(batch.row) for batch in it.stream_activations(2, 2)] == [2, 2]
        assert it.index().n_layers == 3
        assert it.statistics().rows == 9
        assert [batch.row.tolist() for batch in it.heldout(2)] == [[0, 1], [2]]


def test_what_breaks_off_is_asked_for_again_from_there_on(monkeypatch):
    """Patience counts from the first failure, not from the last batch, after which the caller may be busy for long."""
    stream = iter([answer(rows(2) + rows(2, sequence=1)[:-9]), answer(b"", "503 No"), answer(rows(2, first=2))])
    heldout = iter([answer(rows(2, segment=""), length=999, more=""), answer(rows(1, segment="", first=2), more="")])
    clock = SimpleNamespace(monotonic=time.monotonic, sleep=time.sleep)
    monkeypatch.setattr(module, "time", clock)
    with liar(patience=60, stream=stream, heldout=heldout) as it:
        batches = it.stream_activations(2, 2)
        assert next(batches).row.tolist() == [0, 1]
        clock.monotonic = lambda: time.monotonic() + 61
        assert next(batches).row.tolist() == [2, 3]
        assert [batch.row.tolist() for batch in it.heldout(2)] == [[0, 1], [2]]


@pytest.mark.parametrize(
    "change",
    [
        {"n_layers": -1}, {"n_layers": 10**12}, {"n_layers": True}, {"n_layers": 2}, {"d_acts": 0}, {"dtype": "load"},
        {"d_acts": 1 << 21}, {"layers": [0, 1, "2"]}, {"input_sites": "abc"}, {"text": {}}, {"format_version": 99},
        {"shards": [{"file": "x"}]}, {"rows": "many"}, {"unknown": 1}, {"context": float("nan")},
    ],
)  # fmt: skip
def test_an_index_that_makes_no_sense(change):
    with liar(index=answer(json.dumps(INDEX | change).encode()), stream=answer(rows(2))) as it:
        for ask in (it.index, it.statistics, lambda: next(it.stream_activations(2))):
            with pytest.raises(ServerError, match=next(iter(change))):
                ask()


@pytest.mark.parametrize(
    "body", [b"", b"null", b"[]", b"{", b"[" * 100_000, b"\xff\xfe", b'{"max_batch": 0}', b'{"max_batch": true}'],
)  # fmt: skip
def test_answers_of_another_kind_are_told_at_once(body):
    with liar(patience=600, **dict.fromkeys(("stats", "index", "refresh", "statistics"), answer(body))) as it:
        for ask in (it.stats, it.index, it.refresh):
            with pytest.raises(ServerError, match="which this version's activation servers do not answer"):
                ask()


ONES = torch.ones(3, 4, dtype=torch.float64)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"input_mean": ONES[:2]}, r"input_mean is torch.float64 \(2, 4\), wanted float64 \(3, 4\)"),
        ({"input_sd": -ONES}, "input_sd has values less than 0"),
        ({"rows": None, "more": ONES}, "found input_mean, input_sd, more, target_mean, target_sd, wanted"),
    ],
)
def test_statistics_of_another_shape_or_that_cannot_be(change, told):
    with liar(statistics=answer(statistics(**change))) as it, pytest.raises(ServerError, match=told):
        it.statistics()


@pytest.mark.parametrize(("field", "value"), [("n_layers", 2), ("dtype", "bfloat16"), ("layers", [5, 6, 7])])
def test_rows_of_a_server_that_was_started_again_with_another_config_are_refused(field, value):
    with liar(stream=answer(rows(2))) as it:
        index = dataclasses.replace(it.index(), **{field: value})
        with pytest.raises(ServerError, match=rf"now serves other rows \({field}: found .*, wanted "):
            next(it.stream_activations(2, index=index))


good = rows(2)
LIES = {
    "another shape": answer(rows(2, RowShape(3, 5, "float16"))),
    "another shape of the same size": answer(rows(2, RowShape(4, 3, "float16"))),
    "another dtype": answer(rows(2, RowShape(3, 4, "bfloat16"))),
    "more rows than asked for": answer(rows(3)),
    "no rows": answer(good[:4] + struct.pack("<I", 0) + good[8:]),
    "4 billion rows": answer(good[:4] + struct.pack("<I", 2**32 - 1) + good[8:]),
    "out of order": answer(rows(2, sequence=5)),
    "another segment": answer(rows(2, segment="abd")),
    "a segment of other bytes": answer(rows(2, segment="a\x1b"), more="x-clt-segment: a\x1b\r\n"),
    "no segment": answer(rows(2, segment=""), more=""),
    "fewer rows than asked for": answer(rows(1)),
    "no frame": answer(b"x" * 500),
    "nothing": answer(b""),
}


@pytest.mark.parametrize("lie", LIES)
def test_frames_that_are_not_what_was_asked_for(lie):
    with liar(stream=LIES[lie]) as it:
        with pytest.raises(ServerError):
            next(it.stream_activations(2, 1))
        with pytest.raises(ServerError):
            ServerStore(it, 100).read(np.arange(2), torch.zeros(2, 2, 3, 4, dtype=torch.float16))


@pytest.mark.parametrize("lie", [answer(rows(2, segment="", first=1), more=""), answer(rows(2))])
def test_heldout_rows_that_are_none_or_out_of_order(lie):
    with liar(heldout=lie) as it, pytest.raises(ServerError, match=r"other rows than those from 0|segment"):
        list(it.heldout(2))


OK = b"HTTP/1.1 200 OK\r\n"


@pytest.mark.parametrize(
    "send",
    [
        answer(b"{}", length=10**15), answer(b"{}", length=-5), answer(b"x", "500 Oops"),
        answer(b"[" * 99_999, "503 No"), answer(b'{"error": {"a": 1}}', "403 No"),
        answer(b"", "503 No", more="retry-after: 99999999999999\r\n"),
        answer(b"", "503 No", more="retry-after: \xb2\r\n"), answer(b"", "302 Found", more="location: /\r\n"),
        answer(b"", "999 What"), answer(b"x", "abc"), without_end(OK + b"a: "), without_end(b""),
        without_end(OK + b"content-length: 9999999\r\n\r\n"), without_end(b"HTTP/1.1 100 Continue\r\n\r\n" * 50),
        without_end(OK + b"transfer-encoding: chunked\r\n\r\n"), without_end(OK, b"a: b\r\n", 0.001),
        without_end(OK + b"connection: close\r\n\r\n", b" " * (1 << 20), 0.0), lambda connection: None,
    ],
)  # fmt: skip
def test_answers_that_trickle_or_have_no_end_or_are_no_http(send, monkeypatch):
    """`timeout` is for each read, so a byte now and then would hold a client for ever without a least rate."""
    monkeypatch.setattr(module, "LEAST_RATE", 1 << 26)
    with liar(timeout=0.3, stats=send, stream=send) as it:
        for ask in (it.stats, lambda: next(it.stream_activations(2))):
            with pytest.raises(ServerError):
                ask()


def test_patience_has_an_end_and_says_that_it_waits(caplog):
    with pytest.raises(ServerError, match=r"127.0.0.1:9/stats: .*refused.*\(tried for"):
        ActivationClient("http://127.0.0.1:9", patience=0.3).stats()
    (waits,) = [record.message for record in caplog.records]
    assert "refused; trying again for 0 s. Does the server run (clt serve)?" in waits


@pytest.mark.parametrize(
    ("url", "token"),
    [("ftp://a", None), ("a:1", None), ("http://a:80000", None), ("http://a:80a", None), ("http://[::1", None),
     ("http://u:secret@a", None), ("http://a:1", "secret\nsecret"), ("http://a:1", "secret\u20ac")],
)  # fmt: skip
def test_a_url_or_a_token_that_cannot_be_one_is_told_without_its_secret(url, token):
    wanted = r"not of the form http://HOST:PORT|has a user's name or password|wanted printable ASCII"
    with pytest.raises(UserError, match=wanted) as caught:
        ActivationClient(url, token)
    assert "secret" not in str(caught.value)
