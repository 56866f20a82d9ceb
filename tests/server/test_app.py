"""The server as its clients see it: real processes, plain sockets, and the store to compare with."""

import asyncio
import contextlib
import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import weakref
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from starlette.requests import Request
from xxhash import xxh3_64_hexdigest

from clt.config import Config, ServerConfig, load_config
from clt.data.extract import extract_all
from clt.data.raw_rows import Batch, RawRows, empty_rows
from clt.data.store import DiscBuffer
from clt.server import app
from clt.server.client import ActivationClient, ServerError
from clt.server.run import buffer_name
from tests.server.conftest import BACKGROUND, Server, eventually, pause_generator
from tests.server.test_buffer import SHAPE, adds_up

TOKEN = "a-token-of-the-tests-0123456789"


@pytest.fixture(scope="module")
def shared(serve) -> Server:
    """`clt serve` with the config's own limits."""
    return serve(before=BACKGROUND)


@pytest.fixture(scope="module")
def strict(serve, lm_overrides, tmp_path_factory) -> Server:
    """With a token, narrow limits and rows in bfloat16; two workers, by uvicorn and the environment."""
    path = tmp_path_factory.mktemp("strict")
    (path / "token").write_text(TOKEN + "\n")
    (path / "token").chmod(0o600)
    keys = [f"data.store={path / 'stores'}", "data.dtype=bfloat16"]
    extract_all(load_config(None, [*lm_overrides, *keys]), progress=False)
    limits = {"max_batch": 100, "max_streams": 2, "wait_seconds": 1.5, "idle_seconds": 1, "workers": 7}
    environment = {f"CLT_SERVER_{name.upper()}": str(value) for name, value in limits.items()}
    environment["CLT_SERVER_TOKEN_FILE"] = str(path / "token")
    server = serve(*keys, "server.workers=2", by="uvicorn", **environment)
    server.store = path / "stores"
    eventually(lambda: ActivationClient(server.url, TOKEN).stats()["fill"] == 1)
    return server


def bits(row: torch.Tensor) -> bytes:
    """Of a row of 16-bit numbers."""
    return row.contiguous().view(torch.int16).numpy().tobytes()


def stored(store: Path) -> Counter[tuple[int, int, int, bytes]]:
    """How often each row is in the training store, by document, position, token and bits."""
    buffer, every = DiscBuffer(store / "train"), slice(None)
    columns = [column(every).tolist() for column in (buffer.documents, buffer.positions, buffer.tokens)]
    return Counter((*place, bits(row)) for *place, row in zip(*columns, buffer[:]))


def identities(batch: Batch) -> list[tuple[int, int, int, bytes]]:
    """The same of rows that came from a server."""
    columns = (batch.document.tolist(), batch.position.tolist(), batch.token.tolist())
    return [(*place, bits(row)) for *place, row in zip(*columns, batch.activations)]


def test_streamed_rows_are_the_stores_come_once_in_no_order_and_about_equally_often(shared: Server) -> None:
    """Blocks are random samples of the last fills: over some epochs, no row is left out or favoured."""
    batches = list(ActivationClient(shared.url).stream_activations(50, 120))
    known, count = stored(shared.store), Counter(row for batch in batches for row in identities(batch))
    often = [count[row] / times for row, times in known.items()]
    assert set(count) <= set(known)
    assert len({row for batch in batches for row in batch.row.tolist()}) == 6000
    assert 4 <= min(often) <= max(often) <= 9
    assert all(10 < (np.diff(batch.row) > 0).sum() < 40 for batch in batches), "as of a shuffled list"


def test_a_stream_keeps_nothing_that_it_has_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []

    async def draw(_: Request, n: int) -> list[RawRows]:
        drawn.append(weakref.ref((part := empty_rows(n, SHAPE))["rows"]))
        return [part]

    async def read() -> list[int]:
        state = {"buffer": SimpleNamespace(shape=SHAPE, segment="", block_rows=8), "server": ServerConfig()}
        scope = {"type": "http", "path": "/activations/stream", "query_string": b"max_batches=9", "state": state}
        pieces = (await app.stream(Request(scope | {"headers": []}))).body_iterator
        return [sum(ref() is not None for ref in drawn) async for _ in pieces]

    monkeypatch.setattr(app, "draw", draw)
    assert set(asyncio.run(read())) == {1}


def test_a_tensor_and_json_carry_the_rows_exactly(shared: Server, strict: Server) -> None:
    for server, token, dtype in ((shared, "", "float16"), (strict, TOKEN, "bfloat16")):
        known = {row for *_, row in stored(server.store)}
        status, headers, body = server.ask("/activations/tensor?batch_size=70", authorization=f"Bearer {token}")
        assert (status, headers["x-tensor-shape"], headers["x-tensor-dtype"]) == (200, "70,2,3,16", dtype)
        assert headers["x-tensor-xxh3"] == xxh3_64_hexdigest(body)
        tensor = torch.frombuffer(bytearray(body), dtype=getattr(torch, dtype)).view(70, 2, 3, 16)
        status, _, body = server.ask("/activations?batch_size=40", authorization=f"Bearer {token}")
        found = json.loads(body)
        assert (status, found["shape"], found["dtype"]) == (200, [40, 2, 3, 16], dtype)
        listed = torch.tensor(found["activations"], dtype=torch.float64)
        assert torch.equal(listed, listed.to(tensor.dtype).double())
        streamed = next(ActivationClient(server.url, token or None).stream_activations(7)).activations
        for rows in (tensor, listed.to(tensor.dtype), streamed):
            assert all(bits(row) in known for row in rows)


def test_the_counters_add_up_and_refresh_makes_other_rows(shared: Server) -> None:
    client = ActivationClient(shared.url)
    eventually(lambda: client.stats()["fill"] == 1)
    before = client.stats()
    assert shared.ask("/activations/tensor", "HEAD")[0] == 405, "its answer would cost rows"
    assert len(list(client.stream_activations(40, 10))) == 10
    assert shared.ask("/activations/tensor?batch_size=30")[0] == shared.ask("/activations?batch_size=5")[0] == 200
    eventually(lambda: client.stats()["fill"] == 1)
    after = client.stats()
    assert (after["rows_drawn"] - before["rows_drawn"], after["rows_lost"]) == (435, 0)
    assert adds_up(after)
    assert client.refresh() > 256
    assert min(next(client.stream_activations(100, 1)).row) >= after["rows_generated"]
    assert client.stats()["rows_dropped"] > 256


def test_plain_uvicorn_serves_what_a_model_gives(serve) -> None:
    server = serve("server.source=model", "server.statistics_tokens=100", by="plain uvicorn")
    batches = list(ActivationClient(server.url).stream_activations(50, 4))
    assert len({row for batch in batches for row in batch.row.tolist()}) == 200
    known = {row[:3] for row in stored(server.store)}  # document, position and token
    assert len({row[:3] for batch in batches for row in identities(batch)} & known) > 100


@pytest.mark.parametrize(
    ("path", "status", "reason"),
    [
        ("/activations/stream?batch_size=0", 422, "parameter batch_size is 0; wanted 1 to 8192"),
        ("/activations/stream?batch_size=8193", 422, "wanted 1 to 8192"),
        ("/activations/stream?batch_size=" + "9" * 5000, 400, "wanted one whole number"),
        ("/activations/stream?batch_size=%D9%A3", 400, "wanted one whole number"),
        ("/activations/stream?batch_size=1&batch_size=1", 400, "wanted one whole number"),
        ("/activations/stream?batchsize=1", 400, "unknown parameter 'batchsize'; known: batch_size, max_batches"),
        ("/activations/stream?max_batches=0", 422, "wanted 1 to"), ("/activations?batch_size=65", 422, "1 to 64"),
        ("/heldout?start=151", 422, "wanted 0 to 150"), ("/refresh", 405, "Method Not Allowed"),
        ("/nowhere", 404, "Not Found"), ("/activations/", 404, "Not Found"),
    ],
)  # fmt: skip
def test_mistakes_are_told(shared: Server, path: str, status: int, reason: str) -> None:
    found, headers, body = shared.ask(path)
    assert (found, headers["content-type"]) == (status, "application/json")
    assert reason in json.loads(body)["error"]


@pytest.mark.parametrize(
    ("status", "request_", "headers"),
    [
        (403, "POST /refresh", {"origin": "http://evil.example"}), (403, "GET /stats", {"origin": "http://["}),
        (403, "POST /refresh", {"origin": "http://localhost:1"}), (400, "GET /stats", {"host": "["}),
        (403, "GET /activations/stream", {"sec_fetch_site": "cross-site"}),  # e.g. of an <img>, which has no origin
        (403, "GET /activations/stream", {"sec_fetch_site": "same-site"}),
        (400, "GET /stats", {"host": "evil.example:8000"}),  # a name that stands for this machine's address
        (200, "GET /", {"sec_fetch_site": "cross-site"}),  # a link to the page
        (200, "GET /stats", {"host": "localhost:1", "origin": "http://localhost:1"}),
    ],
)  # fmt: skip
def test_pages_of_other_sites_cannot_use_a_browser_on_this_machine(shared: Server, status, request_, headers) -> None:
    method, path = request_.split()
    assert shared.ask(path, method, **headers)[0] == status


def test_the_token_is_asked_for_and_told_nobody_and_limits_come_from_the_environment(strict: Server) -> None:
    for given in (None, f"Bearer {TOKEN}x", f"Basic {TOKEN}", "é"):
        headers = {} if given is None else {"authorization": given}
        for path in ("/stats", "/activations", "/index", "/nowhere"):
            status, answer, body = strict.ask(path, **headers)
            assert (status, answer["www-authenticate"]) == (401, "Bearer")
            assert "token" in json.loads(body)["error"]
    assert strict.ask("/refresh", "POST")[0] == 401
    assert strict.ask("/")[0] == strict.ask("/healthz")[0] == 200
    assert strict.ask("/stats", authorization=f"bearer {TOKEN}")[0] == 200
    assert TOKEN not in strict.log.read_text()
    status, _, body = strict.ask("/activations/tensor?batch_size=101", authorization=f"Bearer {TOKEN}")
    assert (status, json.loads(body)["error"]) == (422, "parameter batch_size is 101; wanted 1 to 100")


@pytest.mark.parametrize(
    ("parts", "half_close", "answer"),
    [
        ([b"\x00\x01 nonsense\r\n\r\n"], False, b"HTTP/1.1 400 "),
        ([b"GET / HTTP/1.1\r\nhost: x\r\n" + b"a: b\r\n" * 4000 + b"\r\n"], False, b""),  # a head of 24 KB
        ([b"GET /stats HT"], True, b""),
        ([b"GET /stats HTTP/1.1\r\n", *[b"a: b\r\n"] * 20], False, b""),  # a head that does not end
        ([], False, b""),  # nothing at all
    ],
)
def test_what_is_no_request_ends_the_connection(strict: Server, parts, half_close: bool, answer: bytes) -> None:
    found = b""
    with socket.create_connection(("127.0.0.1", strict.port), 0.2) as it, contextlib.suppress(ConnectionError):
        for part in parts:
            it.sendall(part)
            with contextlib.suppress(TimeoutError):  # the next one comes while the server says nothing
                it.recv(1, socket.MSG_PEEK)
        if half_close:
            it.shutdown(socket.SHUT_WR)
        it.settimeout(60)
        while piece := it.recv(65536):
            found += piece
    assert found.startswith(answer) if answer else found == b""


def test_a_stream_goes_on_until_the_client_leaves_or_asks_again(shared: Server) -> None:
    """Another request behind it, or a part of one, ends the connection: uvicorn would go on with the stream."""
    client, head = ActivationClient(shared.url), b"GET /stats HTTP/1.1\r\nhost: 127.0.0.1\r\n"
    for more in (None, head + b"\r\n", head + b"a: " + b"b" * 20_000):
        connection = shared.connect("/activations/stream?batch_size=64")
        with connection, contextlib.closing(http.client.HTTPResponse(connection)) as response:
            response.begin()
            assert len(response.read(1_000_000)) == 1_000_000
            assert client.stats()["clients"] == 1
            if more is not None:
                connection.sendall(more)
                eventually(lambda: client.stats()["clients"] == 0)  # while the connection is open
        eventually(lambda: client.stats()["clients"] == 0)
    assert "Traceback" not in shared.log.read_text()


def test_many_slow_readers_cost_bounded_memory(shared: Server) -> None:
    """Three blocks a client at most, whatever they ask for; here blocks are small, so the bound is generous."""
    client = ActivationClient(shared.url)
    list(client.stream_activations(64, 20))

    def rss() -> int:
        return int(Path(f"/proc/{shared.process.pid}/status").read_text().split("RssAnon:")[1].split()[0])

    before = rss()
    with contextlib.ExitStack() as stack:
        for _ in range(12):
            stack.enter_context(shared.connect("/activations/stream?batch_size=8192", 4096))
        eventually(lambda: client.stats()["clients"] == 12)
        drawn = -1
        while drawn != (drawn := client.stats()["rows_drawn"]):  # until all that the sockets hold is sent
            assert len(next(client.stream_activations(64, 1)).row) == 64, "others are served beside them"
            drawn += 64
        assert rss() - before < 8 * 1024
    eventually(lambda: client.stats()["clients"] == 0)


def test_slow_readers_are_ended_and_others_are_told_of_them(strict: Server) -> None:
    client = ActivationClient(strict.url, TOKEN)
    with contextlib.ExitStack() as stack:
        for _ in range(2):
            stack.enter_context(strict.connect("/activations/stream?batch_size=100", 4096, TOKEN))
        eventually(lambda: client.stats()["clients"] == 2)
        status, _, body = strict.ask("/activations", authorization=f"Bearer {TOKEN}")
        assert status == 503, "a third client of two"
        assert "server.max_streams" in json.loads(body)["error"]
        eventually(lambda: client.stats()["clients"] == 0)  # they read nothing for idle_seconds
    for _ in range(3):  # nor do requests that fail, or whose client leaves, keep their place
        assert strict.ask("/activations/tensor?batch_size=0", authorization=f"Bearer {TOKEN}")[0] == 422
        with strict.connect("/activations/stream", token=TOKEN) as connection:
            connection.recv(10)
        eventually(lambda: client.stats()["clients"] == 0)
    assert len(next(client.stream_activations(5)).row) == 5


def test_answers_that_nobody_reads_are_ended_however_small(strict: Server) -> None:
    """A connection that is to be closed waits for what is unsent: without a deadline, for ever."""
    with strict.connect("/", 4096) as connection, contextlib.suppress(ConnectionError):
        while True:
            connection.sendall(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
            connection.settimeout(0.01)  # each is answered before the next comes
            with contextlib.suppress(TimeoutError):
                connection.recv(1, socket.MSG_WAITALL | socket.MSG_PEEK)


def test_an_empty_buffer_is_waited_for_and_then_reported(strict: Server) -> None:
    client = ActivationClient(strict.url, TOKEN, patience=0)
    pid = pause_generator(client)
    try:
        client.refresh()
        status, headers, body = strict.ask("/activations", authorization=f"Bearer {TOKEN}")
        assert (status, headers["retry-after"]) == (503, "1")
        assert "had no rows for 1.5 seconds" in json.loads(body)["error"]
    finally:
        os.kill(pid, signal.SIGCONT)


def test_waiting_clients_hear_why_the_generator_died_and_streams_go_on_after_it(shared: Server) -> None:
    client = ActivationClient(shared.url, patience=0)
    stream = ActivationClient(shared.url).stream_activations(8, 1000)  # ended by the server, it asks again
    next(stream)
    pid = pause_generator(client)
    client.refresh()
    with ThreadPoolExecutor(3) as pool:
        answers = [pool.submit(shared.ask, "/activations") for _ in range(3)]
        eventually(lambda: client.stats()["clients"] == 4)
        os.kill(pid, signal.SIGKILL)
    for status, headers, body in (each.result() for each in answers):
        assert (status, int(headers["retry-after"]) > 0) == (503, True)
        assert "SIGKILL" in json.loads(body)["error"], "and not that there were no rows for wait_seconds"
    assert len({row for batch in stream for row in batch.row.tolist()}) == 999 * 8
    assert client.stats()["generator"]["restarts"] >= 1
    assert ("a stream was ended" in (log := shared.log.read_text()), "ASGI" in log) == (True, False)


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl")
def test_tls_and_ipv6(serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError as error:
        pytest.skip(f"needs IPv6: {error}")
    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    make = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    make += ["-addext", "subjectAltName=IP:::1", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run(make, check=True, capture_output=True)
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    options = ["server.host=::1", "--ssl-certfile", str(certificate), "--ssl-keyfile", str(key)]
    server = serve(options=options, url="https://[::1]:{port}")
    client = ActivationClient(server.url)
    batches = list(client.stream_activations(100, 20))
    assert len({row for batch in batches for row in batch.row.tolist()}) == 2000
    monkeypatch.delenv("SSL_CERT_FILE")
    for url, told in ((server.url, "CERTIFICATE_VERIFY_FAILED"), (server.url.replace("https", "http"), "stats")):
        with pytest.raises(ServerError, match=told):
            ActivationClient(url, patience=0).stats()
    server.stop()
    assert "Traceback" not in server.log.read_text()


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")
def test_the_status_page_in_a_browser(shared: Server, tmp_path: Path) -> None:
    client = ActivationClient(shared.url)
    list(client.stream_activations(100, 10))
    eventually(lambda: client.stats()["fill"] == 1 and len(client.stats()["history"]) > 2)
    browser = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'browser'}"]
    browser += ["--virtual-time-budget=6000", "--dump-dom", shared.url]
    dom = subprocess.run(browser, check=True, capture_output=True, text=True, timeout=120).stdout
    assert "Generator <b>running</b>" in dom
    figures = dict(re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", dom))
    assert int(figures["Rows served"].replace(",", "")) >= 1000
    assert figures["Rows in the buffer"].endswith("/ 512")
    assert figures["Fill"] == "100.0 %"
    charts = re.findall(r'<polyline points="([0-9., ]+)"', dom)
    assert len(charts) == 2, "rows/s and fill over time"
    assert "rows (2, 3, 16)" in dom


def test_ctrl_c_ends_a_server_and_leaves_nothing(shared: Server, own_config: Config) -> None:
    own_config.data.store = str(shared.store)
    generator = ActivationClient(shared.url).stats()["generator"]["pid"]
    shared.stop()
    assert shared.process.returncode in (0, 130), shared.log.read_text()
    assert not Path(f"/dev/shm/clt-{buffer_name(own_config)}").exists()
    eventually(lambda: not Path(f"/proc/{generator}").exists())
