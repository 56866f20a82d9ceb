"""The shared buffer under real processes, some of which are killed where it hurts."""

import contextlib
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch

from clt.errors import UserError
from clt.server import segment
from clt.server.buffer import FREE, READING, VALID, WRITING, Batch, SharedBuffer
from clt.server.layout import buffer_bytes
from clt.server.segment import start_time
from tests.server.conftest import ROWS, D, L, eventually, kill, known_rows

Spawn = Callable[..., BaseProcess]


def check(batch: Batch) -> None:
    """Every row is whole: its values and columns are those that its document tells."""
    wanted = torch.from_numpy(batch.document % 1024).to(batch.activations.dtype).view(-1, 1, 1, 1)
    assert torch.equal(batch.activations, wanted.expand_as(batch.activations))
    np.testing.assert_array_equal(batch.token, batch.document * 3)
    np.testing.assert_array_equal(batch.position, batch.document % 7)


def check_whole(buffer: SharedBuffer) -> None:
    """The lists are what the states say, and nothing is counted twice."""
    with buffer._locked() as header:
        for slots, count, state in ((buffer._valid, header["n_valid"], VALID), (buffer._free, header["n_free"], FREE)):
            assert sorted(slots[: int(count)]) == np.flatnonzero(buffer._state == state).tolist()
    stats = buffer.stats()
    assert stats["in_flight"] == np.isin(buffer._state, (WRITING, READING)).sum()
    assert min(stats["rows_lost"], stats["rows_drawn"], stats["rows_dropped"]) >= 0


def fill_up(buffer: SharedBuffer, first: int = 0) -> int:
    """Put rows until there is no room; returns how many."""
    done = 0
    while count := buffer.put(known_rows(ROWS, first + done)):
        done += count
    return done


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_rows_come_back_as_they_were(name: str, dtype: str) -> None:
    buffer = SharedBuffer.create(name, 10, L, D, dtype, min_fill=0)
    rows = known_rows(10, dtype=dtype)
    bits = torch.randint(0, 256, rows.activations.shape + (rows.activations.element_size(),), dtype=torch.uint8)
    rows.activations[:] = bits.view(rows.activations.dtype).squeeze(-1)  # any bits, also NaN
    assert buffer.put(rows) == 10
    reader = SharedBuffer.attach(name)
    batch = reader.draw(10)
    assert batch is not None
    assert sorted(batch.row) == list(range(10))
    order = torch.from_numpy(batch.row)
    assert batch.activations.dtype == rows.activations.dtype
    assert torch.equal(batch.activations.view(torch.uint8), rows.activations[order].view(torch.uint8))
    for column in ("token", "position", "document"):
        found = getattr(batch, column)
        assert found.dtype == getattr(rows, column).dtype
        np.testing.assert_array_equal(found, getattr(rows, column)[order])
    buffer.unlink()
    reader.close()
    buffer.close()


def test_rows_are_drawn_once_and_their_slots_used_again(buffer: SharedBuffer) -> None:
    seen, first = [], 0
    for n in (7, 64, 30, 1, 50):
        first += fill_up(buffer, first)
        batch = buffer.draw(n)
        assert batch is not None
        check(batch)
        seen += batch.row.tolist()
    assert len(seen) == len(set(seen)) == 152
    assert buffer.stats()["rows_lost"] == 0
    check_whole(buffer)


def test_readers_wait_for_min_fill_until_nothing_more_comes(name: str) -> None:
    buffer = SharedBuffer.create(name, ROWS, L, D, "float16", min_fill=20)
    buffer.put(known_rows(19))
    assert buffer.draw(1) is None
    buffer.put(known_rows(1, 19))
    assert buffer.draw(21) is None
    assert buffer.draw(1) is not None
    assert buffer.draw(1) is None
    buffer.set_generator("failed", "for now")
    assert buffer.draw(1) is None
    buffer.set_generator("stopped")
    assert buffer.draw(19) is not None
    assert buffer.draw(1) is None
    for n in (0, -1, ROWS + 1):
        with pytest.raises(ValueError, match=f"a batch of {n} rows of a buffer of 64; wanted 1 to 64"):
            buffer.draw(n)
    buffer.unlink()
    buffer.close()


def test_every_row_is_equally_likely_at_every_draw(buffer: SharedBuffer) -> None:
    """chi-square over (age of the row, number of the draw that took it), rows of two puts mixed in one buffer."""
    buffer.random = np.random.default_rng(0)
    trials, counts = 1000, np.zeros((12, 4))
    for _ in range(trials):
        buffer.put(known_rows(5))
        buffer.put(known_rows(7, 5))
        for number in range(4):
            batch = buffer.draw(3)
            assert batch is not None
            counts[batch.document, number] += 1
    expected = trials / 4
    chi2 = float(((counts - expected) ** 2 / expected).sum())
    # Each row is in one draw of each trial and each draw has 3 rows: 11 x 3 degrees of freedom, and the statistic is
    # 12/11 of a chi-square's by the exact covariance of sampling without replacement. Bounds: 0.1% on both sides.
    assert 13.4 * 12 / 11 < chi2 < 63.9 * 12 / 11, chi2


def test_rows_of_a_large_batch_are_claimed_in_parts(buffer: SharedBuffer, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the lock is held for a moment; each row is as likely in each place of the batch as any other."""
    buffer.random = np.random.default_rng(2)
    trials, counts = 600, np.zeros((12, 10))
    for _ in range(trials):
        buffer.put(known_rows(12))
        with monkeypatch.context() as patch:
            patch.setattr("clt.server.buffer.LOCKED_ROWS", 4)
            batch = buffer.draw(10)
        assert batch is not None
        assert len(set(batch.row.tolist())) == 10
        counts[batch.document, np.arange(10)] += 1
        assert buffer.draw(2) is not None
    expected = trials / 12
    chi2 = float(((counts - expected) ** 2 / expected).sum())
    # Ten columns of a random permutation of 12: 11 x 10 degrees of freedom times 12/11. Bounds: 0.1% on both sides.
    assert 69.7 * 12 / 11 < chi2 < 161.6 * 12 / 11, chi2
    assert buffer.stats()["rows_drawn"] == 12 * trials
    check_whole(buffer)
    taken, given = [], []
    claim, give_back = buffer._claim, buffer._give_back
    monkeypatch.setattr(buffer, "_claim", lambda slots, state: (taken.append(len(slots)), claim(slots, state)))
    monkeypatch.setattr(buffer, "_give_back", lambda slots: (given.append(len(slots)), give_back(slots)))
    buffer.put(known_rows(12))
    taken.clear()
    monkeypatch.setattr("clt.server.buffer.LOCKED_ROWS", 4)
    assert buffer.draw(10) is not None
    assert taken == given == [4, 4, 2], "each under the lock for itself"


def test_rows_that_are_drawn_while_a_draw_chooses_are_not_given_twice(buffer: SharedBuffer) -> None:
    buffer.put(known_rows(40))
    others: list[Batch | None] = []

    class Slow:
        """A choice during which others draw, three times."""

        def choice(self, valid: int, n: int, replace: bool) -> np.ndarray:
            if len(others) < 3:  # the fourth is under the lock: they would wait for ever
                buffer.random = dice
                others.append(buffer.draw(6))
                buffer.random = cast(np.random.Generator, self)
            return dice.choice(valid, n, replace=replace)

    dice = np.random.default_rng(3)
    buffer.random = cast(np.random.Generator, Slow())
    batch = buffer.draw(10)
    assert batch is not None
    rows = [row for each in (batch, *others) if each is not None for row in each.row.tolist()]
    assert len(set(rows)) == len(rows) == 28
    check(batch)


def test_a_large_batch_is_had_whole_or_not_at_all(buffer: SharedBuffer, monkeypatch: pytest.MonkeyPatch) -> None:
    buffer.put(known_rows(20))
    claim, others = buffer._claim_valid, []

    def claim_after_others(n: int, wanted: int, first: bool) -> np.ndarray | None:
        if wanted == 4:  # the last part; someone else comes before it
            others.append(buffer.draw(6))
        return claim(n, wanted, first)

    monkeypatch.setattr(buffer, "_claim_valid", claim_after_others)
    monkeypatch.setattr("clt.server.buffer.LOCKED_ROWS", 6)
    assert buffer.claim(16) is None
    stats = buffer.stats()
    assert (stats["valid"], stats["in_flight"], stats["rows_drawn"], stats["rows_lost"]) == (14, 0, 6, 0)
    batch = buffer.draw(14)
    assert batch is not None
    assert sorted([*batch.row.tolist(), *others[0].row.tolist()]) == list(range(20))
    check(batch)
    check_whole(buffer)


def test_the_order_within_a_batch_is_random(buffer: SharedBuffer) -> None:
    buffer.random = np.random.default_rng(1)
    first = np.zeros(8)
    for _ in range(800):
        buffer.put(known_rows(8))
        batch = buffer.draw(8)
        assert batch is not None
        first[batch.document[0]] += 1
    assert ((first - 100) ** 2 / 100).sum() < 24.3  # chi-square of 7 degrees of freedom, 0.1%


def test_refresh_drops_what_is_valid_and_only_that(buffer: SharedBuffer) -> None:
    fill_up(buffer)
    held = buffer.claim(10)
    assert held is not None
    assert buffer.refresh() == 54
    assert buffer.draw(1) is None
    assert buffer.stats()["in_flight"] == 10
    buffer.release(held)
    assert fill_up(buffer, 64) == ROWS
    batch = buffer.draw(ROWS)
    assert batch is not None
    assert batch.document.min() == 64
    check_whole(buffer)


def test_the_mark_moves_with_the_rows(buffer: SharedBuffer) -> None:
    assert buffer.mark == (0, 0, 0)
    assert buffer.put(known_rows(50), (1, 16, 100)) == 50
    assert buffer.mark == (1, 16, 150)
    assert buffer.put(known_rows(50), (1, 16, 150)) == 14
    assert SharedBuffer.attach(buffer._segment.path.name.removeprefix("clt-")).mark == (1, 16, 164)


# Processes


def _draw_all(name: str, out: Connection, total: int) -> None:
    """A reader: draws batches of random size until all `total` rows of the buffer's life are drawn by someone."""
    buffer, random, seen = SharedBuffer.attach(name), np.random.default_rng(), []
    while (stats := buffer.stats())["rows_drawn"] + stats["rows_lost"] < total:
        batch = buffer.draw(int(random.integers(1, 9)))
        if batch is None:
            batch = buffer.draw(1)
        if batch is None:
            time.sleep(0.001)
        else:
            check(batch)
            seen += batch.row.tolist()
    out.send(seen)


def _put_all(name: str, total: int) -> None:
    buffer, done = SharedBuffer.attach(name), 0
    while done < total:
        written = buffer.put(known_rows(min(20, total - done), done))
        done += written
        if written == 0:
            time.sleep(0.001)


def test_every_row_reaches_exactly_one_of_many_processes(buffer: SharedBuffer, name: str, spawn: Spawn) -> None:
    total, pipes = 5_000, [multiprocessing.Pipe(duplex=False) for _ in range(5)]
    readers = [spawn(_draw_all, name, out, total) for _, out in pipes]
    spawn(_put_all, name, total)
    seen = [row for into, _ in pipes for row in into.recv()]
    for reader in readers:
        reader.join()
        assert reader.exitcode == 0
    assert sorted(seen) == list(range(total))
    stats = buffer.stats()
    assert (stats["valid"], stats["in_flight"], stats["rows_lost"]) == (0, 0, 0)


def _claim_and_hang(name: str, n: int, out: Connection) -> None:
    out.send(SharedBuffer.attach(name).claim(n))
    time.sleep(600)


def test_a_reader_killed_in_mid_draw_costs_its_rows_and_no_slot(buffer: SharedBuffer, name: str, spawn: Spawn) -> None:
    fill_up(buffer)
    into, out = multiprocessing.Pipe(duplex=False)
    child = spawn(_claim_and_hang, name, 10, out)
    lost = set(into.recv().tolist())
    assert len(lost) == 10
    mine = buffer.claim(5)
    assert buffer.reclaim() == 0  # everybody lives
    kill(child)
    assert buffer.stats()["in_flight"] == 15
    assert buffer.reclaim() == 10
    assert buffer.reclaim() == 0
    assert buffer.stats()["rows_lost"] == 10
    assert mine is not None
    buffer.release(mine)
    check_whole(buffer)
    assert fill_up(buffer, 64) == 15
    batch = buffer.draw(ROWS)
    assert batch is not None
    check(batch)
    assert not lost & set(batch.row[batch.row < 64].tolist())


def _write_and_hang(name: str, n: int, out: Connection) -> None:
    buffer = SharedBuffer.attach(name)
    slots = buffer.reserve(n)
    buffer._payload[slots[: n // 2]] = 255  # half-written rows of NaN
    out.send(slots)
    time.sleep(600)


def test_rows_of_a_generator_killed_in_mid_write_are_never_drawn(buffer: SharedBuffer, name: str, spawn: Spawn) -> None:
    buffer.put(known_rows(20))
    into, out = multiprocessing.Pipe(duplex=False)
    child = spawn(_write_and_hang, name, 30, out)
    into.recv()
    kill(child)
    assert buffer.put(known_rows(ROWS, 20)) == 14
    assert buffer.reclaim() == 30
    assert buffer.put(known_rows(ROWS, 34)) == 30
    batch = buffer.draw(ROWS)
    assert batch is not None
    check(batch)
    assert sorted(batch.document) == list(range(64))
    assert len(set(batch.row.tolist())) == ROWS
    assert buffer.stats()["rows_lost"] == 30
    check_whole(buffer)


def _die_with_the_lock(name: str, out: Connection) -> None:
    buffer = SharedBuffer.attach(name)
    with buffer._locked() as header:  # in the middle of a claim: states half set, lists not yet
        slots = buffer._valid[:10].copy()
        buffer._claim(slots[:6], READING)
        buffer._valid[:4] = -1
        header["n_valid"] = 3
        out.send(None)
        time.sleep(600)


def test_a_process_killed_with_the_lock_leaves_a_usable_buffer(buffer: SharedBuffer, name: str, spawn: Spawn) -> None:
    fill_up(buffer)
    into, out = multiprocessing.Pipe(duplex=False)
    child = spawn(_die_with_the_lock, name, out)
    into.recv()
    kill(child)
    assert buffer.stats()["valid"] == ROWS - 6
    assert buffer.reclaim() == 6
    assert fill_up(buffer, 64) == 6
    batch = buffer.draw(ROWS)
    assert batch is not None
    check(batch)
    check_whole(buffer)


def _draw_for_ever(name: str, out: Connection) -> None:
    buffer, random = SharedBuffer.attach(name), np.random.default_rng()
    while True:
        batch = buffer.draw(int(random.integers(1, 9)))
        if batch is not None:
            check(batch)
            out.send(batch.row.tolist())


def test_readers_killed_at_any_time_leak_nothing(buffer: SharedBuffer, name: str, spawn: Spawn) -> None:
    random, seen, put = np.random.default_rng(0), [], 0
    for _ in range(25):
        into, out = multiprocessing.Pipe(duplex=False)
        child = spawn(_draw_for_ever, name, out)
        out.close()
        put += fill_up(buffer, put)
        seen += into.recv()
        end = time.monotonic() + random.uniform(0, 0.03)
        while time.monotonic() < end:
            put += buffer.put(known_rows(20, put))
        kill(child)
        with contextlib.suppress(EOFError):
            while True:
                seen += into.recv()
    buffer.reclaim()
    check_whole(buffer)
    stats = buffer.stats()
    assert stats["in_flight"] == 0
    assert len(seen) == len(set(seen)) <= stats["rows_drawn"] + stats["rows_lost"]
    assert stats["valid"] + fill_up(buffer, put) == ROWS


# The segment


def _own_and_hang(name: str, out: Connection, complete: bool) -> None:
    if complete:
        buffer = SharedBuffer.create(name, ROWS, L, D, "float16", 0)
        buffer.put(known_rows(9))
    else:
        Path(f"/dev/shm/clt-{name}").write_bytes(b"half")
    out.send(None)
    time.sleep(600)


@pytest.mark.parametrize("complete", [True, False])
def test_a_stale_segment_is_replaced_and_that_of_a_living_owner_refused(
    name: str, spawn: Spawn, complete: bool
) -> None:
    into, out = multiprocessing.Pipe(duplex=False)
    child = spawn(_own_and_hang, name, out, complete)
    into.recv()
    old = None
    if complete:
        with pytest.raises(UserError, match=f"clt-{name} belongs to the running process {child.pid}"):
            SharedBuffer.create(name, ROWS, L, D, "float16", 0)
        old = SharedBuffer.attach(name)
        assert old.alive
    else:
        with pytest.raises(FileNotFoundError):
            SharedBuffer.attach(name)
    kill(child)
    new = SharedBuffer.create(name, 10, L, D, "float16", 0)
    assert new.stats()["rows_generated"] == 0
    if old is not None:
        assert not old.alive
        assert old.generator()["state"] == "failed"
        assert str(child.pid) in old.generator()["cause"]
        assert old.segment != new.segment
        assert old.draw(9) is not None  # its memory lives as long as someone looks at it
        old.close()
    assert SharedBuffer.attach(name).segment == new.segment  # the old one's end did not remove the new one's name
    new.unlink()
    assert not Path(f"/dev/shm/clt-{name}").exists()
    new.close()


def test_the_last_to_see_a_dead_owner_removes_its_segment(name: str, spawn: Spawn) -> None:
    into, out = multiprocessing.Pipe(duplex=False)
    child = spawn(_own_and_hang, name, out, True)
    into.recv()
    buffer = SharedBuffer.attach(name)
    kill(child)
    buffer.close()
    assert not Path(f"/dev/shm/clt-{name}").exists()


def _create(name: str, out: Connection) -> None:
    try:
        buffer = SharedBuffer.create(name, ROWS, L, D, "float16", 0)
    except UserError as error:
        out.send(str(error))
    else:
        out.send(buffer.segment)
    time.sleep(600)


def test_one_of_many_creators_wins(name: str, spawn: Spawn) -> None:
    pipes = [multiprocessing.Pipe(duplex=False) for _ in range(6)]
    for _, out in pipes:
        spawn(_create, name, out)
    answers = [into.recv() for into, _ in pipes]
    assert sum("belongs to the running process" in answer for answer in answers) == 5
    assert SharedBuffer.attach(name).segment in answers


def test_too_little_memory_is_refused_and_leaves_nothing(name: str) -> None:
    with pytest.raises(UserError, match=r"the shared buffer needs \d+\.\d\d GB but .* GB free: lower server.rows"):
        SharedBuffer.create(name, 2**31 - 1, 12, 768, "float16", 0)
    assert not Path(f"/dev/shm/clt-{name}").exists()


def test_the_limit_of_a_container_counts_without_its_page_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(segment, "CGROUP", tmp_path)
    numbers = {
        "memory.max": "3000000",
        "memory.current": "2900000",
        "memory.stat": "anon 900000\ninactive_file 2000000",
    }
    for file, text in numbers.items():
        (tmp_path / file).write_text(text + "\n")
    segment.check_memory(2_000_000)
    with pytest.raises(UserError, match=r"the container's memory has 0\.00 GB free"):
        segment.check_memory(2_200_000)
    (tmp_path / "memory.max").write_text("max\n")
    segment.check_memory(2_200_000)


def test_all_its_memory_is_claimed_at_once(buffer: SharedBuffer) -> None:
    file = buffer._segment.path.stat()
    assert file.st_size == buffer_bytes(ROWS, L, D, "float16")
    assert file.st_blocks * 512 >= file.st_size
    assert file.st_mode & 0o777 == 0o600


def test_a_buffer_that_is_given_up_returns_its_memory_once_nobody_reads(buffer: SharedBuffer) -> None:
    file = buffer._segment.path
    size = file.stat().st_blocks * 512
    buffer.put(known_rows(60))
    slots = buffer.claim(10)
    assert slots is not None
    buffer.give_up()
    assert (buffer.stats()["valid"], buffer.stats()["rows_dropped"]) == (0, 50)
    assert file.stat().st_blocks * 512 == size
    buffer.release(slots)
    buffer.give_up()
    assert file.stat().st_blocks * 512 == size - 4096, "the page of the 64 rows"
    buffer.put(known_rows(60))  # it works, should there be a generator yet
    batch = buffer.draw(10)
    assert batch is not None
    assert (batch.activations.view(10, -1)[:, 0].numpy() == batch.document).all()


def test_what_is_no_buffer_in_its_place_is_told(name: str, tmp_path: Path) -> None:
    path = Path(f"/dev/shm/clt-{name}")
    (tmp_path / "precious").write_text("kept")
    for make, remove, cause in (
        (lambda: path.symlink_to(tmp_path / "precious"), path.unlink, "Too many levels of symbolic links"),
        (path.mkdir, path.rmdir, "Is a directory"),
    ):
        make()
        try:
            for work in (lambda: SharedBuffer.attach(name), lambda: SharedBuffer.create(name, 4, 1, 2, "float32", 0)):
                with pytest.raises(UserError, match=rf"{path} cannot be opened as a shared buffer \({cause}\): "):
                    work()
        finally:
            remove()
    assert (tmp_path / "precious").read_text() == "kept"


def test_who_stays_keeps_a_buffer_alive_that_it_has_unmapped(buffer: SharedBuffer, name: str, spawn: Spawn) -> None:
    child = spawn(_join_and_unmap, name)
    eventually(lambda: buffer._header["joined"] == 1)
    eventually(lambda: str(buffer._segment.path) not in Path(f"/proc/{child.pid}/maps").read_text())
    assert not buffer.workers.close_if_unused(waited=True)
    assert (buffer.stats()["workers"], buffer.stats()["clients"]) == (0, 0), "it serves nobody"
    kill(child)
    assert buffer.workers.close_if_unused(waited=True)


def _join_and_unmap(name: str) -> None:
    buffer = SharedBuffer.attach(name)
    buffer.workers.join()
    buffer.close(stay=True)
    time.sleep(600)


def test_start_time_knows_the_dead(spawn: Spawn) -> None:
    assert start_time(os.getpid()) == start_time(os.getpid()) is not None
    child = spawn(time.sleep, 600)
    assert child.pid is not None
    assert start_time(child.pid) is not None
    os.kill(child.pid, 9)
    eventually(lambda: start_time(child.pid or 0) is None)


# Workers


def _join_and_hang(name: str, out: Connection) -> None:
    buffer = SharedBuffer.attach(name)
    out.send((buffer.workers.join(), buffer.workers.add_clients(3)))
    time.sleep(600)


def test_clients_of_a_dead_worker_do_not_count(buffer: SharedBuffer, name: str, spawn: Spawn) -> None:
    assert not buffer.workers.close_if_unused(waited=False)
    into, out = multiprocessing.Pipe(duplex=False)
    child = spawn(_join_and_hang, name, out)
    assert into.recv() == (True, 3)
    worker = SharedBuffer.attach(name)
    assert worker.workers.join()
    assert worker.workers.add_clients(2) == 5
    assert buffer.stats()["workers"] == 2
    kill(child)
    assert worker.workers.add_clients(-1) == 1
    assert not buffer.workers.close_if_unused(waited=True)
    worker.add_served(10, 1000)
    worker.close()
    assert buffer.workers.close_if_unused(waited=False)
    late = SharedBuffer.attach(name)
    assert not late.workers.join()
    stats = buffer.stats()
    assert (stats["clients"], stats["workers"], stats["rows_served"], stats["bytes_served"]) == (0, 0, 10, 1000)


# The lock


class Timed(SharedBuffer):
    """Notes how long it holds the lock, in microseconds."""

    held: list[float] = []  # noqa: RUF012

    @contextlib.contextmanager
    def _locked(self) -> Iterator[np.ndarray]:
        with super()._locked() as header:
            start = time.perf_counter_ns()
            yield header
            self.held.append((time.perf_counter_ns() - start) / 1e3)


@pytest.mark.parametrize("n", [64, 1024])
def test_the_lock_is_held_for_microseconds(name: str, n: int, capsys: pytest.CaptureFixture[str]) -> None:
    buffer = Timed.create(name, 4096, 4, 128, "float16", 0)
    rows = known_rows(1024, shape=(4, 128))
    while buffer.put(rows):
        pass
    Timed.held.clear()
    for _ in range(50):
        batch = buffer.draw(n)
        assert batch is not None
        buffer.put(rows[:n])
    claim, release, reserve, publish = (statistics.median(Timed.held[i::4]) for i in range(4))
    with capsys.disabled():
        found = f"claim {claim:.0f}, release {release:.0f}, reserve {reserve:.0f}, publish {publish:.0f}"
        print(f"\nmicroseconds that the lock is held for {n} rows: {found}")
    assert max(claim, release, reserve, publish) < 1000
    buffer.unlink()
    buffer.close()
