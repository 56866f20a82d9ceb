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

import pytest

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


@pytest.fixture(scope="module")
def two(serve) -> Server:
    """A server of two workers with few descriptors, which the tests below break one after the other."""
    return serve("server.workers=2", "server.idle_seconds=2", before=["prlimit", "--nofile=300"])


def test_a_process_that_is_frozen_with_a_block_stops_nobody_and_loses_nothing_when_it_dies(two, own_config) -> None:
    own_config.data.store = str(two.store)
    name, client = buffer_name(own_config), ActivationClient(two.url)
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
        assert two.ask("/stats")[0] == two.ask("/refresh", "POST")[0] == 200
        frozen.kill()
    assert client.refresh() > 0
    eventually(lambda: client.stats()["fill"] == 1)
    assert client.stats()["rows_lost"] == 0


def test_whoever_is_killed_no_row_comes_twice_and_the_lost_are_counted(two) -> None:
    """Generator, workers, at last all of it: by number and by place in the text, which goes on where it was."""
    readers, client = [Reader(two, n) for n in (8, 50)], ActivationClient(two.url, patience=120)

    def work() -> None:
        eventually(lambda: len(workers(two)) == 2 and client.stats()["workers"] == 2)
        eventually(lambda: client.stats()["generator"]["state"] == "running" and leader(two) in workers(two))
        before = sum(len(reader.rows) for reader in readers)
        eventually(lambda: sum(len(reader.rows) for reader in readers) > before + 1000)

    victims = [generator, lambda it: next(pid for pid in workers(it) if pid != leader(it)), leader]
    for victim in victims:
        work()
        pid = victim(two)
        assert pid, "0 would be this process and all of its group"
        os.kill(pid, signal.SIGKILL)
    work()
    for pid in filter(None, (two.process.pid, *workers(two), generator(two))):
        os.kill(pid, signal.SIGKILL)
    two.process.wait()
    eventually(lambda: two.ask("/healthz")[0] == 0)
    two.start()
    work()
    for reader in readers:
        reader.stop = True
    for reader in readers:
        reader.join(60)
    seen = [row for reader in readers for row in reader.rows]
    assert len({segment for segment, _, _ in seen}) == 1, "one buffer outlived them all"
    assert len(seen) == len({row for _, row, _ in seen}) > 5000
    known, epochs = stored(two.store), Counter((row // 1000, identity) for _, row, identity in seen)
    assert all(times <= known[identity] for (_, identity), times in epochs.items()), "each place once an epoch"
    eventually(lambda: client.stats()["fill"] == 1 and client.stats()["clients"] == 0)
    stats = client.stats()
    assert stats["rows_lost"] <= (len(victims) + 1) * stats["block_rows"], "of each worker a block, of generators none"
    assert adds_up(stats)


def test_a_flood_of_idle_connections_leaves_the_server_as_it_was(two) -> None:
    """More of them than both workers have descriptors; meanwhile the generator's owner is killed and replaced."""
    client = ActivationClient(two.url, patience=60)
    with contextlib.ExitStack() as idle:
        for _ in range(700):
            with contextlib.suppress(OSError):
                idle.enter_context(socket.create_connection(("127.0.0.1", two.port), timeout=1))
        eventually(lambda: leader(two) in workers(two))
        victim = leader(two)
        os.kill(victim, signal.SIGKILL)
        eventually(lambda: leader(two) not in (0, victim))
    assert len(list(client.stream_activations(20, 20))) == 20
    eventually(lambda: client.stats()["clients"] == 0)
    assert "Traceback" not in two.log.read_text()
    assert {two.ask("/stats")[0] for _ in range(20)} == {200}


def test_two_workers_that_send_end_on_sigterm_and_leave_nothing(two, own_config) -> None:
    own_config.data.store = str(two.store)
    stream = ActivationClient(two.url, patience=60).stream_activations(8)
    next(stream)
    pids = [*workers(two), generator(two)]
    two.process.terminate()
    assert two.process.wait(60) == 0, two.log.read_text()
    stream.close()
    assert not Path(f"/dev/shm/clt-{buffer_name(own_config)}").exists()
    eventually(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids))


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
