"""Servers under SIGKILL, floods and frozen processes: no row twice, none damaged, the lost ones counted."""

import asyncio
import contextlib
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

from clt.server.buffer import LEADER, Buffer
from clt.server.client import ActivationClient
from clt.server.generator import lead
from clt.server.run import buffer_name, close_buffer, open_buffer
from tests.server.conftest import Server, eventually
from tests.server.test_app import identities, stored
from tests.server.test_buffer import adds_up


def workers(server: Server) -> list[int]:
    """The serving processes of a server with several."""
    children = Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children").read_text().split()
    return [int(pid) for pid in children if b"resource_tracker" not in Path(f"/proc/{pid}/cmdline").read_bytes()]


def generator(server: Server) -> int:
    return ActivationClient(server.url, patience=120).stats()["generator"]["pid"]


def leader(server: Server) -> int:
    """The serving process that has the generator as its child; 0 while there is none."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return int(Path(f"/proc/{generator(server)}/stat").read_text().rpartition(")")[2].split()[1])
    return 0


class Reader(threading.Thread):
    """Streams until it is told to stop; `rows` are (segment, row, identity)."""

    def __init__(self, server: Server, n: int) -> None:
        super().__init__(daemon=True)
        self.client, self.n, self.rows, self.stop = ActivationClient(server.url, timeout=20, patience=120), n, [], False
        self.start()

    def run(self) -> None:
        for batch in self.client.stream_activations(self.n):
            self.rows += [(batch.segment, *row) for row in zip(batch.row.tolist(), identities(batch))]
            if self.stop:
                return


def test_whoever_is_killed_no_row_comes_twice_and_the_lost_are_counted(serve) -> None:
    """Generator, workers, at last all of it: by number and by place in the text, which goes on where it was."""
    server = serve("server.workers=2")
    readers, client = [Reader(server, n) for n in (8, 50)], ActivationClient(server.url, patience=120)

    def work() -> None:
        eventually(lambda: len(workers(server)) == 2 and client.stats()["workers"] == 2)
        eventually(lambda: client.stats()["generator"]["state"] == "running" and leader(server) in workers(server))
        before = sum(len(reader.rows) for reader in readers)
        eventually(lambda: sum(len(reader.rows) for reader in readers) > before + 1000)

    victims = [generator, lambda server: next(pid for pid in workers(server) if pid != leader(server)), leader]
    for victim in victims:
        work()
        pid = victim(server)
        assert pid, "0 would be this process and all of its group"
        os.kill(pid, signal.SIGKILL)
    work()
    for pid in filter(None, (server.process.pid, *workers(server), generator(server))):
        os.kill(pid, signal.SIGKILL)
    server.process.wait()
    eventually(lambda: server.ask("/healthz")[0] == 0)
    server.start()
    work()
    for reader in readers:
        reader.stop = True
    for reader in readers:
        reader.join(60)
    seen = [row for reader in readers for row in reader.rows]
    assert len({segment for segment, _, _ in seen}) == 1, "one buffer outlived them all"
    assert len(seen) == len({row for _, row, _ in seen}) > 5000
    known, epochs = stored(server.store), Counter((row // 1000, identity) for _, row, identity in seen)
    assert all(times <= known[identity] for (_, identity), times in epochs.items()), "each place once an epoch"
    eventually(lambda: client.stats()["fill"] == 1 and client.stats()["clients"] == 0)
    stats = client.stats()
    assert stats["rows_lost"] <= (len(victims) + 1) * stats["block_rows"], "of each worker a block, of generators none"
    assert adds_up(stats)


def test_a_process_that_is_frozen_with_a_block_stops_nobody_and_loses_nothing_when_it_dies(shared, own_config) -> None:
    own_config.data.store = str(shared.store)
    name, client = buffer_name(own_config), ActivationClient(shared.url)
    code = (
        "import sys, time; from clt.server.buffer import *; b = Buffer(sys.argv[1])\n"
        "while b._claim() is None: pass\nprint('held', flush=True); time.sleep(600)"
    )
    assert not Buffer(name).locks.hold(LEADER), "the lock tells who leads: a pid means little to others"
    with subprocess.Popen([sys.executable, "-c", code, name], stdout=subprocess.PIPE) as frozen:
        assert frozen.stdout is not None
        frozen.stdout.readline()
        frozen.send_signal(signal.SIGSTOP)
        assert len(list(client.stream_activations(64, 40))) == 40
        assert shared.ask("/stats")[0] == shared.ask("/refresh", "POST")[0] == 200
        frozen.kill()
    assert client.refresh() > 0
    eventually(lambda: client.stats()["fill"] == 1)
    assert client.stats()["rows_lost"] == 0


def test_a_flood_of_idle_connections_leaves_the_server_as_it_was(serve) -> None:
    """More of them than both workers have descriptors; meanwhile the generator's owner is killed and replaced."""
    server = serve("server.workers=2", "server.idle_seconds=2", before=["prlimit", "--nofile=300"])
    client = ActivationClient(server.url, patience=60)
    with contextlib.ExitStack() as idle:
        for _ in range(700):
            with contextlib.suppress(OSError):
                idle.enter_context(socket.create_connection(("127.0.0.1", server.port), timeout=1))
        eventually(lambda: leader(server) in workers(server))
        victim = leader(server)
        os.kill(victim, signal.SIGKILL)
        eventually(lambda: leader(server) not in (0, victim))
    assert len(list(client.stream_activations(20, 20))) == 20
    eventually(lambda: client.stats()["clients"] == 0)
    assert "Traceback" not in server.log.read_text()
    assert {server.ask("/stats")[0] for _ in range(20)} == {200}


def test_many_slow_readers_cost_bounded_memory(shared: Server) -> None:
    """Three blocks a client at most, whatever they ask for; here blocks are small, so the bound is generous."""
    client = ActivationClient(shared.url)
    list(client.stream_activations(64, 20))

    def rss() -> int:
        return int(Path(f"/proc/{shared.process.pid}/status").read_text().split("RssAnon:")[1].split()[0])

    before = rss()
    with contextlib.ExitStack() as stack:
        for _ in range(60):
            stack.enter_context(shared.connect("/activations/stream?batch_size=8192", 4096))
        eventually(lambda: client.stats()["clients"] == 60)
        drawn = -1
        while drawn != (drawn := client.stats()["rows_drawn"]):  # until all that the sockets hold is sent
            assert len(next(client.stream_activations(64, 1)).row) == 64, "others are served beside them"
            drawn += 64
        assert rss() - before < 32 * 1024
    eventually(lambda: client.stats()["clients"] == 0)


def test_a_leader_that_fails_or_cannot_start_its_generator_tells_it_and_goes_on(own_config, caplog) -> None:
    buffer, (soft, hard) = open_buffer(own_config), resource.getrlimit(resource.RLIMIT_NOFILE)

    async def main() -> None:
        descriptor, buffer.locks.descriptor = buffer.locks.descriptor, -1
        leading = asyncio.create_task(lead(own_config, buffer))
        await asyncio.to_thread(eventually, lambda: "failed, and begins again" in caplog.text)
        resource.setrlimit(resource.RLIMIT_NOFILE, (4, hard))
        buffer.locks.descriptor = descriptor
        await asyncio.to_thread(eventually, lambda: buffer.generator()["state"] == "failed")
        assert "it was not started: [Errno 24] Too many open files" in buffer.generator()["cause"]
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        await asyncio.to_thread(eventually, lambda: buffer.generator()["state"] == "running")
        leading.cancel()
        await asyncio.wait([leading])

    try:
        asyncio.run(main())
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        close_buffer(own_config, buffer)
