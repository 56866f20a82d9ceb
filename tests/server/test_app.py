"""The server as its clients see it: real processes, plain sockets, and the store to compare with."""

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from clt.data.extract import extract
from clt.data.store import DiscBuffer
from clt.server.client import ActivationClient
from tests.server.conftest import Server, eventually, pause_generator

ROOT = Path(__file__).parents[2]
TOKEN = "a-token-of-the-tests-0123456789"


@pytest.fixture(scope="module")
def server(serve) -> Server:
    """With the config's own limits, by `clt serve`."""
    return serve()


@pytest.fixture(scope="module")
def strict(serve, tmp_path_factory) -> Server:
    """With a token and narrow limits, two workers, by uvicorn and the environment."""
    file = tmp_path_factory.mktemp("token") / "token"
    file.write_text(TOKEN + "\n")
    file.chmod(0o600)
    limits = {"max_batch": 100, "max_streams": 2, "wait_seconds": 1.5, "idle_seconds": 1}
    environment = {f"CLT_SERVER_{name.upper()}": str(value) for name, value in limits.items()}
    environment |= {"CLT_SERVER_TOKEN_FILE": str(file), "CLT_SERVER_WORKERS": "7"}
    return serve("server.workers=2", by="uvicorn", **environment)


def ask(server: Server, path: str, method: str = "GET", **headers: str) -> tuple[int, http.client.HTTPMessage, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    try:
        connection.request(method, path, headers={name.replace("_", "-"): value for name, value in headers.items()})
        response = connection.getresponse()
        return response.status, response.headers, response.read()
    finally:
        connection.close()


def send(server: Server, *parts: bytes, pause: float = 0.0, half_close: bool = False) -> bytes:
    """What a raw connection answers until it is closed."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as connection:
        with contextlib.suppress(ConnectionError):
            for part in parts:
                connection.sendall(part)
                time.sleep(pause)
            if half_close:
                connection.shutdown(socket.SHUT_WR)
        answer = b""
        with contextlib.suppress(ConnectionError):
            while piece := connection.recv(65536):
                answer += piece
        return answer


def known_rows(store: Path) -> set[tuple[int, int, int, bytes]]:
    """(document, position, token, bytes) of the training store's rows."""
    buffer, every = DiscBuffer(store / "train"), slice(None)
    columns = [column(every).tolist() for column in (buffer.documents, buffer.positions, buffer.tokens)]
    return {(*keys, bits(row)) for *keys, row in zip(*columns, buffer[:])}


def bits(row: torch.Tensor) -> bytes:
    """Of a row of 16-bit numbers."""
    return row.contiguous().view(torch.int16).numpy().tobytes()


def test_streamed_rows_are_the_stores_and_come_once(server):
    known, seen = known_rows(server.store), set()
    for batch in ActivationClient(server.url).stream_activations(50, max_batches=30):
        for i, row in enumerate(batch.activations):
            place = (int(batch.document[i]), int(batch.position[i]), int(batch.token[i]))
            assert (*place, bits(row)) in known
        seen |= set(batch.row.tolist())
    assert len(seen) == 1500


def test_rows_come_in_no_order(server):
    batch = next(ActivationClient(server.url).stream_activations(100, 1))
    steps = np.diff(batch.row)
    assert 20 < (steps > 0).sum() < 79, "as of a shuffled list"


def test_a_tensor_says_its_shape_and_dtype(server):
    status, headers, body = ask(server, "/activations/tensor?batch_size=7")
    assert status == 200
    assert headers["x-tensor-shape"] == "7,2,3,16"
    assert headers["x-tensor-dtype"] == "float16"
    tensor = torch.frombuffer(bytearray(body), dtype=torch.float16).view(7, 2, 3, 16)
    known = {row for *_, row in known_rows(server.store)}
    assert all(bits(row) in known for row in tensor)


def test_json_carries_the_values_exactly(server):
    status, _, body = ask(server, "/activations?batch_size=4")
    assert status == 200
    found, known = json.loads(body), known_rows(server.store)
    assert (found["shape"], found["dtype"]) == ([4, 2, 3, 16], "float16")
    values = torch.tensor(found["activations"], dtype=torch.float64)
    assert torch.equal(values, values.half().double())
    for i, row in enumerate(values.half()):
        assert (found["document"][i], found["position"][i], found["token"][i], bits(row)) in known


def test_bfloat16_is_carried_exactly(serve, config):
    own = config("data.dtype=bfloat16")
    for part in ("train", "heldout"):
        extract(own, part, progress=False)
    server = serve(f"data.store={own.data.store}", "data.dtype=bfloat16")
    client, known = ActivationClient(server.url), {row for *_, row in known_rows(Path(own.data.store))}
    listed = torch.tensor(client.get_activations(7)["activations"], dtype=torch.float64)
    assert torch.equal(listed, listed.bfloat16().double())
    tensors = [client.get_activations_tensor(7), next(client.stream_activations(7)).activations, listed.bfloat16()]
    for tensor in (*tensors, next(client.heldout(7)).activations):
        assert tensor.dtype == torch.bfloat16
        assert tensor.shape == (7, 2, 3, 16)
    assert all(bits(row) in known for tensor in tensors for row in tensor)


def test_a_second_request_before_the_first_answer_ends_the_connection_and_no_stream_goes_on(server):
    asked = b"".join(
        b"GET %s HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n" % path
        for path in (b"/activations/stream?batch_size=8", b"/stats")
    )
    send(server, asked)
    eventually(lambda: json.loads(ask(server, "/stats")[2])["clients"] == 0)
    assert "Traceback" not in server.log.read_text()


def test_plain_uvicorn_serves(serve):
    server = serve(by="plain uvicorn")
    assert len({row for batch in ActivationClient(server.url).stream_activations(50, 4) for row in batch.row}) == 200


def test_workers_of_a_killed_server_end_and_it_can_be_started_again(serve):
    server = serve("server.workers=2")
    server.process.kill()
    server.process.wait()
    eventually(lambda: server.status("/healthz") is None)
    server.start()
    assert len(next(ActivationClient(server.url).stream_activations(5)).row) == 5


def test_a_stream_without_end_goes_on_until_the_client_leaves(server):
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    connection.request("GET", "/activations/stream?batch_size=64")
    response = connection.getresponse()
    assert response.headers["transfer-encoding"] == "chunked"
    assert len(response.read(1_000_000)) == 1_000_000
    assert json.loads(ask(server, "/stats")[2])["clients"] == 1
    connection.close()
    eventually(lambda: json.loads(ask(server, "/stats")[2])["clients"] == 0)


def test_what_training_needs_besides(server):
    client, heldout = ActivationClient(server.url), DiscBuffer(server.store / "heldout")
    train = DiscBuffer(server.store / "train")
    batches = list(client.heldout(64))
    assert [len(batch.row) for batch in batches] == [64, 64, 22]
    assert torch.equal(torch.cat([batch.activations for batch in batches]), heldout[:])
    assert np.array_equal(np.concatenate([batch.token for batch in batches]), heldout.tokens(slice(None)))
    assert np.array_equal(np.concatenate([batch.row for batch in batches]), np.arange(150))
    index = client.index()
    assert (index.n_layers, index.d_acts, index.model, index.shards) == (3, 16, train.index.model, [])
    assert torch.equal(client.statistics().target_sd, train.statistics.target_sd)
    assert client.statistics().rows == 1000


def test_the_counters_add_up(server):
    client = ActivationClient(server.url)
    eventually(lambda: client.stats()["fill"] == 1)
    before = client.stats()
    for _ in client.stream_activations(40, 10):
        pass
    ask(server, "/activations/tensor?batch_size=30")
    ask(server, "/activations?batch_size=5")
    eventually(lambda: client.stats()["fill"] == 1)
    after = client.stats()
    gone = {key: after[key] - before[key] for key in ("rows_drawn", "rows_served", "rows_lost")}
    assert gone == {"rows_drawn": 435, "rows_served": 435, "rows_lost": 0}
    names = ("valid", "open", "in_flight", "rows_drawn", "rows_dropped", "rows_lost")
    assert after["rows_generated"] == sum(after[name] for name in names)
    assert after["bytes_served"] - before["bytes_served"] > 430 * 2 * 3 * 16 * 2


def test_refresh_makes_other_rows(server):
    client = ActivationClient(server.url)
    eventually(lambda: client.stats()["fill"] == 1)
    newest = client.stats()["rows_generated"]
    assert client.refresh() > 256
    assert min(next(client.stream_activations(100, 1)).row) >= newest
    assert client.stats()["rows_dropped"] > 256


@pytest.mark.parametrize(
    ("path", "status", "reason"),
    [
        ("/activations/stream?batch_size=0", 422, "wanted 1 to 8192"),
        ("/activations/stream?batch_size=-5", 422, "wanted 1 to 8192"),
        ("/activations/stream?batch_size=8193", 422, "wanted 1 to 8192"),
        ("/activations/stream?batch_size=" + "9" * 5000, 422, "wanted 1 to 8192"),
        ("/activations/stream?batch_size=1e3", 400, "wanted a whole number"),
        ("/activations/stream?batch_size=", 400, "wanted a whole number"),
        ("/activations/stream?batch_size=%D9%A3", 400, "wanted a whole number"),
        ("/activations/stream?batch_size=1&batch_size=1", 400, "given more than once"),
        ("/activations/stream?max_batches=0", 422, "wanted 1 to"),
        ("/activations/stream?batchsize=1", 400, "unknown parameter 'batchsize'; known: batch_size, max_batches"),
        ("/activations?batch_size=65", 422, "wanted 1 to 64"),
        ("/activations/tensor?max_batches=1", 400, "unknown parameter"),
        ("/heldout?start=151", 422, "wanted 0 to 150"),
        ("/stats?x", 400, "unknown parameter"),
        ("/nowhere", 404, "nothing there; wanted one of /, /healthz"),
        ("/activations/", 404, "nothing there; wanted one of /, /healthz"),
        ("/../../etc/passwd", 404, "nothing there; wanted one of /, /healthz"),
    ],
)
def test_mistakes_are_told(server, path, status, reason):
    found, headers, body = ask(server, path)
    assert (found, headers["content-type"]) == (status, "application/json")
    assert reason in json.loads(body)["error"]


def test_wrong_methods_and_bodies(server):
    for method, path in [("POST", "/stats"), ("GET", "/refresh"), ("DELETE", "/"), ("PUT", "/activations/tensor")]:
        status, headers, body = ask(server, path, method)
        assert status == 405
        assert "error" in json.loads(body)
        assert headers["allow"]
    before = ActivationClient(server.url).stats()["rows_drawn"]
    assert ask(server, "/activations/tensor", "HEAD")[0] == 405
    assert ActivationClient(server.url).stats()["rows_drawn"] == before
    assert ask(server, "/refresh", "POST", content_length="5")[0] == 413
    assert ask(server, "/stats", transfer_encoding="chunked")[0] == 413


def test_pages_of_other_sites_cannot_use_a_browser_on_this_machine(server):
    assert ask(server, "/refresh", "POST", origin="http://evil.example")[0] == 403
    assert ask(server, "/stats", origin=server.url)[0] == 200
    for site in ("cross-site", "same-site"):  # e.g. of an <img>, which has no origin
        assert ask(server, "/activations/stream", sec_fetch_site=site)[0] == 403
    assert ask(server, "/", sec_fetch_site="cross-site")[0] == 200, "a link to the page"
    assert ask(server, "/refresh", "POST", origin="http://localhost:1")[0] == 403, "another port is another site"
    assert ask(server, "/stats", host="evil.example:8000")[0] == 400, "a name that stands for this machine's address"
    assert ask(server, "/stats", host=f"localhost:{server.port}")[0] == 200
    assert ask(server, "/stats", host="[")[0] == 400
    assert ask(server, "/stats", origin="http://[")[0] == 403


def test_headers_have_a_limit_while_an_answer_is_under_way(server):
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as connection:
        connection.sendall(b"GET /activations/stream?batch_size=1 HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n")
        assert connection.recv(65536).startswith(b"HTTP/1.1 200 ")
        connection.sendall(b"GET /stats HTTP/1.1\r\nhost: 127.0.0.1\r\na: " + b"b" * 20_000)
        end = time.monotonic() + 60
        with contextlib.suppress(ConnectionError):
            while connection.recv(1 << 20):  # the stream is without end, unless the server drops the connection
                assert time.monotonic() < end


def test_bytes_that_are_no_request_end_the_connection(server):
    assert send(server, b"\x00\x01 nonsense\r\n\r\n").startswith(b"HTTP/1.1 400 ")
    assert send(server, b"GET / HTTP/1.1\r\nhost: x\r\n" + b"a: b\r\n" * 4000 + b"\r\n") == b""
    assert send(server, b"GET /stats HT", half_close=True) == b""


def test_a_request_that_does_not_end_is_not_waited_for(server):
    drip = [b"GET /stats HTTP/1.1\r\n", *[b"a: b\r\n"] * 30]
    with ThreadPoolExecutor(2) as pool:
        answers = [pool.submit(send, server, *drip, pause=0.5), pool.submit(send, server)]
        assert [answer.result(60) for answer in answers] == [b"", b""]


def test_waiting_clients_hear_at_once_why_the_generator_died(server):
    client = ActivationClient(server.url, patience=0)
    pid = pause_generator(client, TOKEN)
    client.refresh()
    answers: list[tuple[int, http.client.HTTPMessage, bytes]] = []
    waiting = [threading.Thread(target=lambda: answers.append(ask(server, "/activations"))) for _ in range(3)]
    for thread in waiting:
        thread.start()
    eventually(lambda: client.stats()["clients"] == 3)
    os.kill(pid, signal.SIGKILL)
    began = time.monotonic()
    for thread in waiting:
        thread.join()
    assert time.monotonic() - began < 10  # and not the 30 seconds of wait_seconds
    for status, headers, body in answers:
        assert status == 503
        assert "SIGKILL" in json.loads(body)["error"]
        assert int(headers["retry-after"]) > 0
    patient = ActivationClient(server.url, patience=60)
    assert len(patient.get_activations_tensor(10)) == 10
    assert patient.stats()["generator"]["restarts"] >= 1


def test_the_token_is_asked_for_and_told_nobody(strict):
    for headers in (
        {},
        {"authorization": f"Bearer {TOKEN}x"},
        {"authorization": f"Basic {TOKEN}"},
        {"authorization": "é"},
    ):
        for path in ("/stats", "/activations", "/index", "/nowhere"):
            status, answer, body = ask(strict, path, **headers)
            assert (status, answer["www-authenticate"]) == (401, "Bearer")
            assert "token" in json.loads(body)["error"]
    assert ask(strict, "/refresh", "POST")[0] == 401
    assert ask(strict, "/")[0] == ask(strict, "/healthz")[0] == 200
    assert ask(strict, "/stats", authorization=f"bearer {TOKEN}")[0] == 200
    assert TOKEN not in strict.log.read_text()


def test_limits_from_the_environment(strict):
    def error(path: str) -> tuple[int, str]:
        status, _, body = ask(strict, path, authorization=f"Bearer {TOKEN}")
        return status, json.loads(body)["error"]

    assert error("/activations/tensor?batch_size=101") == (422, "parameter batch_size is 101; wanted 1 to 100")
    assert error("/activations?batch_size=65") == (422, "parameter batch_size is 65; wanted 1 to 64")


def test_slow_readers_are_ended(strict):
    client = ActivationClient(strict.url, TOKEN)
    request = f"GET /activations/stream?batch_size=100 HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {TOKEN}\r\n\r\n"
    with contextlib.ExitStack() as stack:
        for _ in range(2):
            connection = stack.enter_context(socket.create_connection(("127.0.0.1", strict.port)))
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.sendall(request.encode())
        eventually(lambda: client.stats()["clients"] == 2)
        status, _, body = ask(strict, "/activations", authorization=f"Bearer {TOKEN}")
        assert status == 503, "a third client of two"
        assert "server.max_streams" in json.loads(body)["error"]
        eventually(lambda: client.stats()["clients"] == 0, 30)  # they read nothing for idle_seconds


def test_answers_that_nobody_reads_are_ended_however_small(strict):
    """A connection that is to be closed waits for what is unsent: without a deadline, for ever."""
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", strict.port))
        with contextlib.suppress(ConnectionError):
            while True:
                connection.sendall(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
                time.sleep(0.01)  # each is answered before the next comes


def test_two_workers_give_each_row_once(strict):
    client, seen = ActivationClient(strict.url, TOKEN), []
    assert client.stats()["workers"] == 2, "CLT_SERVER_WORKERS is for clt serve"

    def read() -> None:
        for batch in client.stream_activations(20, 10):
            seen.extend(batch.row.tolist())

    threads = [threading.Thread(target=read) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(seen) == len(set(seen)) == 400


def test_an_empty_buffer_is_waited_for_and_then_reported(strict):
    client = ActivationClient(strict.url, TOKEN, patience=0)
    eventually(lambda: client.stats()["fill"] > 0.9)
    pid = pause_generator(client, TOKEN)
    try:
        query = f"?batch_size=100&max_batches=100 HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {TOKEN}\r\n\r\n"
        head, _, body = send(strict, f"GET /activations/stream{query}".encode()).partition(b"\r\n\r\n")
        assert len(body) < int(head.lower().partition(b"content-length: ")[2].split()[0]), "the connection is closed"
        assert "a stream was ended: the buffer had no rows for 1.5 seconds" in strict.log.read_text()
        assert "ASGI callable" not in strict.log.read_text(), "uvicorn's error in one's own program"
        client.refresh()
        began = time.monotonic()
        status, headers, body = ask(strict, "/activations", authorization=f"Bearer {TOKEN}")
        assert (status, headers["retry-after"]) == (503, "1")
        assert "had no rows for 1.5 seconds" in json.loads(body)["error"]
        assert 1.4 < time.monotonic() - began < 20
    finally:
        os.kill(pid, signal.SIGCONT)


def test_other_machines_are_not_served_without_a_token(tmp_path):
    command = [sys.executable, "-m", "clt.cli", "serve", "server.host=0.0.0.0", f"data.store={tmp_path}"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 2
    assert "server.token_file" in result.stderr
    assert "Traceback" not in result.stderr


def test_stopping_leaves_nothing(serve):
    name = f"test-{os.getpid()}-stop"
    server, file = serve(f"server.name={name}"), Path(f"/dev/shm/clt-{name}")
    assert file.exists()
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(b"GET /activations/stream HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n")
        assert connection.recv(12) == b"HTTP/1.1 200"
        server.process.terminate()
        assert server.process.wait(60) == 0
    assert not file.exists()
