"""Servers under SIGKILL, floods and frozen processes: no row twice, none damaged, the lost ones counted."""

import contextlib
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest

from clt.data.store import DiscBuffer
from clt.server.buffer import LEADER, Buffer
from clt.server.client import ActivationClient
from clt.server.wire import Batch
from tests.server.conftest import Server, eventually
from tests.server.test_app import ask, bits, known_rows


def workers(server: Server) -> list[int]:
    """The serving processes of a server with several."""
    children = Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children").read_text().split()
    return [int(pid) for pid in children if b"resource_tracker" not in Path(f"/proc/{pid}/cmdline").read_bytes()]


def leader(server: Server) -> int:
    """The serving process that has the generator as its child; 0 while there is none."""
    stat = Path(f"/proc/{ActivationClient(server.url, patience=120).stats()['generator']['pid']}/stat")
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return int(stat.read_text().rpartition(")")[2].split()[1])
    return 0


class Reader(threading.Thread):
    """Streams until it is told to stop; `rows` are (segment, row), `wrong` those that are not the store's."""

    def __init__(self, server: Server, known: set[tuple[int, int, int, bytes]], n: int) -> None:
        super().__init__(daemon=True)
        self.client, self.known, self.n = ActivationClient(server.url, timeout=20, patience=120), known, n
        self.rows: list[tuple[str, int]] = []
        self.wrong, self.stop = 0, False
        self.start()

    def run(self) -> None:
        for batch in self.client.stream_activations(self.n):
            self.wrong += sum(row not in self.known for row in identities(batch))
            self.rows += [(batch.segment, row) for row in batch.row.tolist()]
            if self.stop:
                return


def identities(batch: Batch) -> list[tuple[int, int, int, bytes]]:
    """What a row is: document, position, token and bits."""
    columns = (batch.document.tolist(), batch.position.tolist(), batch.token.tolist())
    return [(*place, bits(row)) for *place, row in zip(*columns, batch.activations)]


def stored(store: Path) -> Counter[tuple[int, int, int, bytes]]:
    """How often each row is in the training store: windows that begin alike have the same."""
    buffer, every = DiscBuffer(store / "train"), slice(None)
    columns = [column(every).tolist() for column in (buffer.documents, buffer.positions, buffer.tokens)]
    return Counter((*place, bits(row)) for *place, row in zip(*columns, buffer[:]))


def test_whoever_is_killed_no_row_comes_twice_and_the_lost_are_counted(serve):
    server = serve("server.workers=2")
    rows = known_rows(server.store)
    readers = [Reader(server, rows, n) for n in (8, 50)]
    kills, client = 0, ActivationClient(server.url, patience=120)
    for victim in ("generator", "worker", "leader", "generator", "leader"):
        before = sum(len(reader.rows) for reader in readers)
        eventually(lambda before=before: sum(len(reader.rows) for reader in readers) > before + 1000)
        eventually(lambda: len(workers(server)) == 2 and client.stats()["workers"] == 2, 60)
        eventually(lambda: client.stats()["generator"]["state"] == "running" and leader(server) in workers(server), 60)
        pid = {"generator": lambda: client.stats()["generator"]["pid"], "leader": lambda: leader(server),
               "worker": lambda: next(pid for pid in workers(server) if pid != leader(server))}[victim]()  # fmt: skip
        assert pid
        os.kill(pid, signal.SIGKILL)
        kills += 1
    for reader in readers:
        reader.stop = True
    for reader in readers:
        reader.join(60)
    seen = [row for reader in readers for row in reader.rows]
    assert len(seen) == len(set(seen)) > 5000
    assert sum(reader.wrong for reader in readers) == 0
    assert len({segment for segment, _ in seen}) == 1, "one buffer outlived them all"
    eventually(lambda: client.stats()["fill"] == 1 and client.stats()["clients"] == 0)
    stats = client.stats()
    assert stats["rows_lost"] <= kills * stats["block_rows"]
    names = ("valid", "open", "in_flight", "rows_drawn", "rows_dropped", "rows_lost")
    assert stats["rows_generated"] == sum(stats[name] for name in names)


def test_all_of_it_is_killed_and_started_again_and_goes_on_in_the_text(serve):
    """By `row` and place in the order of the store: each place once, in the one buffer that outlives the kill."""
    server = serve()
    client, seen = ActivationClient(server.url, patience=120), []

    def take(n: int) -> None:
        for batch in client.stream_activations(32, n):
            seen.extend(zip(batch.row.tolist(), identities(batch)))

    take(10)
    for pid in (server.process.pid, client.stats()["generator"]["pid"]):
        os.kill(pid, signal.SIGKILL)
    server.process.wait()
    server.start()
    take(25)
    assert len({row for row, _ in seen}) == len(seen) == 35 * 32
    epoch = [identity for row, identity in seen if row < 1000]
    assert len(epoch) > 500
    assert Counter(epoch) <= stored(server.store), "no row of the first epoch comes twice"


def test_a_process_that_is_frozen_with_a_block_stops_nobody(serve):
    name = f"test-{os.getpid()}-frozen"
    server = serve(f"server.name={name}")
    code = (
        "import sys, time; from clt.server.buffer import *; b = Buffer.attach(sys.argv[1]); b.hold(b._claim())\n"
        "print('held', flush=True); time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", code, name], stdout=subprocess.PIPE) as frozen:
        assert frozen.stdout is not None
        frozen.stdout.readline()
        frozen.send_signal(signal.SIGSTOP)
        assert len(list(ActivationClient(server.url).stream_activations(64, 40))) == 40
        assert ask(server, "/stats")[0] == ask(server, "/refresh", "POST")[0] == 200
        server.stop()
        assert server.process.returncode == 0
        frozen.kill()
    server.start()


def test_an_owner_in_another_place_is_told_by_the_lock_itself(serve):
    """Not by a pid, which another PID namespace does not know: who holds the leader's lock leads."""
    name = f"test-{os.getpid()}-lock"
    server = serve(f"server.name={name}")
    client = ActivationClient(server.url)
    eventually(lambda: client.stats()["generator"]["state"] == "running")
    assert not Buffer.attach(name).hold(LEADER)


def test_a_flood_of_idle_connections_leaves_the_server_as_it_was(serve, monkeypatch):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 2048:
        pytest.skip("too few descriptors for the flood itself")
    resource.setrlimit(resource.RLIMIT_NOFILE, (2048, hard))
    monkeypatch.setenv("CLT_TEST_NOFILE", "300")  # see Server: ulimit -n for it and its workers
    server = serve("server.workers=2")
    client = ActivationClient(server.url, patience=60)
    idle = []
    try:
        for _ in range(1100):
            with contextlib.suppress(OSError):
                idle.append(socket.create_connection(("127.0.0.1", server.port), timeout=1))
        eventually(lambda: leader(server) in workers(server))
        victim = leader(server)
        assert victim
        os.kill(victim, signal.SIGKILL)
        eventually(lambda: leader(server) not in (0, victim))
    finally:
        for connection in idle:
            connection.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert len(list(client.stream_activations(20, 20))) == 20
    eventually(lambda: client.stats()["clients"] == 0)
    log = server.log.read_text()
    assert "Traceback" not in log, log[-3000:]
    assert {ask(server, "/stats")[0] for _ in range(20)} == {200}


def test_failed_requests_give_their_place_back(serve):
    server = serve("server.max_streams=2")
    for _ in range(10):
        assert ask(server, "/activations/tensor?batch_size=0")[0] == 422
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            connection.sendall(b"GET /activations/stream HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n")
            connection.recv(10)
    client = ActivationClient(server.url)
    eventually(lambda: client.stats()["clients"] == 0)
    assert len(next(client.stream_activations(5)).row) == 5


def test_many_slow_readers_cost_bounded_memory(serve):
    """Three blocks a client at most, whatever they ask for; here blocks are small, so the bound is generous."""
    server = serve("server.max_streams=64", "server.idle_seconds=600")
    client = ActivationClient(server.url)
    list(client.stream_activations(64, 20))

    def rss() -> int:
        return int(Path(f"/proc/{server.process.pid}/status").read_text().split("RssAnon:")[1].split()[0])

    before = rss()
    with contextlib.ExitStack() as stack:
        for _ in range(60):
            connection = stack.enter_context(socket.create_connection(("127.0.0.1", server.port)))
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.sendall(b"GET /activations/stream?batch_size=8192 HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n")
        eventually(lambda: client.stats()["clients"] == 60)
        time.sleep(2)
        assert rss() - before < 32 * 1024
        assert len(next(client.stream_activations(64)).row) == 64, "others are served beside them"
    eventually(lambda: client.stats()["clients"] == 0)


def test_rows_of_the_server_are_a_fair_sample_of_the_stores(serve):
    """Blocks are random samples of the last fills: over an epoch each row comes about equally often."""
    server = serve()
    batches = ActivationClient(server.url).stream_activations(32, 200)
    count = Counter(identity for batch in batches for identity in identities(batch))
    often = [count[row] / times for row, times in stored(server.store).items()]
    assert 4 <= min(often) <= max(often) <= 9
