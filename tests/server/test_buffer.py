"""Blocks in shared memory: each row once, whoever is killed, and nothing but our own file behind the name."""

import os
import signal
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clt.errors import UserError
from clt.server.buffer import FREE, FULL, GENERATOR, OPEN, TAKEN, Buffer
from tests.server.conftest import BLOCK_ROWS, BLOCKS, OPEN_BLOCKS, D, L, eventually, kill, known_rows

SHAPE = (L, D, "float16")


def fill(buffer: Buffer, first: int = 0, rows: int = 10**9) -> int:
    """Put known rows until there is no room, or as many; returns the number of the next."""
    while rows and (n := buffer.put(known_rows(min(rows, BLOCK_ROWS), first), (0, 0, first))):
        first, rows = first + n, rows - n
    return first


def columns(body: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """document, row (n,) and activations (n, values) of a block's body."""
    n = BLOCK_ROWS
    return body[: 8 * n].view("<i8"), body[8 * n : 16 * n].view("<i8"), body[24 * n :].view("<f2").reshape(n, -1)


def check(body: np.ndarray) -> list[int]:
    """Each value of a row is its document's number; returns the rows."""
    document, row, values = columns(body)
    assert (values == (document % 1024)[:, None]).all()
    return row.tolist()


def adds_up(buffer: Buffer) -> bool:
    found = buffer.stats()
    parts = ("valid", "open", "in_flight", "rows_drawn", "rows_dropped", "rows_lost")
    return found["rows_generated"] == sum(found[part] for part in parts)


def test_rows_come_whole_and_once_and_are_scattered(buffer: Buffer) -> None:
    buffer.join()
    end, rows = 0, []
    for _ in range(20):
        end = fill(buffer, end)
        assert buffer.stats()["fill"] == 1
        assert (buffer.state == FREE).sum() < OPEN_BLOCKS
        while (body := buffer.take()) is not None:
            rows += check(body)
    assert len(rows) == len(set(rows)) > 500
    assert max(rows) < end
    assert adds_up(buffer)
    spans = [max(rows[i : i + BLOCK_ROWS]) - min(rows[i : i + BLOCK_ROWS]) for i in range(0, len(rows), BLOCK_ROWS)]
    assert np.mean(spans) > 1.5 * BLOCK_ROWS, "a block is a sample of several blocks' rows"


def test_there_are_always_as_many_open_blocks_as_asked_for(buffer: Buffer) -> None:
    fill(buffer)
    assert (buffer.state == OPEN).sum() < OPEN_BLOCKS
    assert buffer.put(known_rows(1), (0, 0, 0)) == 0, "it waits, though some blocks have room"
    while not (buffer.state == FREE).sum() + (buffer.state == OPEN).sum() >= OPEN_BLOCKS:
        buffer.take()
    assert buffer.put(known_rows(1), (0, 0, 0)) == 1
    assert (buffer.state == OPEN).sum() >= OPEN_BLOCKS - 1, "one may be full by now"


def test_the_first_blocks_do_not_fill_at_the_same_time(name: str) -> None:
    """Else there would be none and then all, again and again."""
    buffer = Buffer.create(name, 64, BLOCK_ROWS, 32, SHAPE)
    while not buffer.ready:
        buffer.put(known_rows(1), (0, 0, 0))
    levels = buffer.filled[buffer.state == OPEN]
    assert levels.min() <= 2
    assert np.ptp(levels) >= BLOCK_ROWS - 3


def test_a_refresh_drops_everything_and_open_blocks_too(buffer: Buffer) -> None:
    buffer.join()
    end = fill(buffer)
    assert buffer.refresh() == end
    assert not buffer.ready
    fill(buffer, end)
    while (body := buffer.take()) is not None:
        assert min(check(body)) >= end
    assert adds_up(buffer)
    assert buffer.stats()["rows_dropped"] == end


def test_another_generator_goes_on_with_the_open_blocks(buffer: Buffer, name: str) -> None:
    end, rows = fill(buffer, rows=5), []
    other = Buffer.attach(name)
    assert other.header["mark"].tolist() == [0, 0, 5]
    fill(other, end)
    while (body := other.take()) is not None:
        rows += check(body)
    assert sorted(rows)[:3] == [0, 1, 2]
    assert len(rows) == len(set(rows))


def test_a_block_that_another_has_locked_is_left_to_it(buffer: Buffer, name: str) -> None:
    fill(buffer)
    other, full = Buffer.attach(name), np.flatnonzero(buffer.state == FULL)
    for block in full[1:].tolist():
        assert other.hold(block)
    assert buffer.take() is not None
    assert buffer.take() is None, "and nobody waits"
    other.drop(int(full[1]))
    assert buffer.take() is not None


def _take_and_die(name: str) -> None:
    buffer = Buffer.attach(name)
    buffer.join()
    block = buffer._claim()
    assert block is not None
    buffer.state[block] = TAKEN
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_block_of_a_process_that_died_is_freed_and_counted(buffer: Buffer, name: str, spawn) -> None:
    end = fill(buffer)
    child = spawn(_take_and_die, name)
    child.join()
    assert (buffer.state == TAKEN).sum() == 1
    end = fill(buffer, end)
    assert (buffer.state == TAKEN).sum() == 0
    assert buffer.stats()["rows_lost"] == BLOCK_ROWS
    assert adds_up(buffer)


def _work(name: str, file: str) -> None:
    buffer = Buffer.attach(name)
    buffer.join()
    with open(file, "ab", buffering=0) as out:
        while True:
            if (body := buffer.take()) is not None:
                document, row, values = columns(body)
                buffer.line["held"] -= BLOCK_ROWS
                buffer.line["drawn"] += BLOCK_ROWS
                out.write(np.stack([row, (values == (document % 1024)[:, None]).all(1)], 1).astype(np.int64).tobytes())


def _generate(name: str) -> None:
    buffer = Buffer.attach(name)
    while not buffer.hold(GENERATOR):
        time.sleep(0.01)
    buffer.reclaim()
    first = int(buffer.header["mark"][2])
    while True:
        first += buffer.put(known_rows(BLOCK_ROWS, first), (0, 0, first))


def test_killed_takers_and_generators_cost_a_block_each_and_no_row_twice(name: str, spawn, tmp_path: Path) -> None:
    buffer = Buffer.create(name, BLOCKS, BLOCK_ROWS, OPEN_BLOCKS, SHAPE)
    kills, files = 12, []

    def take() -> object:
        files.append(str(tmp_path / str(len(files))))
        return spawn(_work, name, files[-1])

    workers, generator = [take(), take()], spawn(_generate, name)
    for number in range(kills):
        before = int(buffer.header["generated"])
        eventually(lambda before=before: int(buffer.header["generated"]) > before + 200)
        if number % 3 == 2:
            kill(generator)
            generator = spawn(_generate, name)
        else:
            kill(workers.pop(0))
            workers.append(take())
    for child in (*workers, generator):
        kill(child)
    written = [file for file in files if os.path.exists(file)]  # a worker may be killed before it began
    records = np.concatenate([np.fromfile(file, np.int64).reshape(-1, 2) for file in written])
    assert len(records) > 1000
    assert Counter(records[:, 0].tolist()).most_common(1)[0][1] == 1
    assert records[:, 1].all()
    buffer.reclaim()
    assert adds_up(buffer)
    assert buffer.stats()["rows_lost"] <= (kills + 3) * BLOCK_ROWS


@given(st.lists(st.tuples(st.sampled_from(["put", "take", "refresh"]), st.integers(1, 20)), max_size=60))
@settings(max_examples=30, deadline=None)
def test_any_order_of_calls_keeps_the_count(calls: list[tuple[str, int]]) -> None:
    name = f"test-{os.getpid()}-model"
    buffer, end, seen = Buffer.create(name, BLOCKS, BLOCK_ROWS, OPEN_BLOCKS, SHAPE), 0, []
    try:
        buffer.join()
        for call, n in calls:
            if call == "put":
                end += buffer.put(known_rows(n, end), (0, 0, end))
            elif call == "refresh":
                buffer.refresh()
            elif (body := buffer.take()) is not None:
                seen += check(body)
            assert adds_up(buffer)
            assert buffer.stats()["rows_lost"] == 0
        assert len(seen) == len(set(seen))
    finally:
        buffer.path.unlink()


@pytest.mark.parametrize("kind", ["others", "directory", "link", "fifo", "short", "readable", "another's"])
def test_what_is_not_our_own_file_is_told(name: str, kind: str, tmp_path: Path) -> None:
    path = Path(f"/dev/shm/clt-{name}")
    if kind == "directory":
        path.mkdir()
    elif kind == "link":
        path.symlink_to(tmp_path / "elsewhere")
    elif kind == "fifo":
        os.mkfifo(path, 0o600)
    else:
        path.write_bytes(b"x" * (10 if kind == "short" else 100_000))
        path.chmod(0o644 if kind == "readable" else 0o600)
        if kind == "another's":
            if os.geteuid() != 0:
                pytest.skip("only root can give a file away")
            os.chown(path, 12345, 12345)
    try:
        with pytest.raises(UserError, match=r"wanted a regular file of this user with mode 600|not a shuffle buffer"):
            Buffer.attach(name)
        if kind not in ("others", "short"):
            with pytest.raises(UserError, match="wanted a regular file of this user with mode 600"):
                Buffer.create(name, BLOCKS, BLOCK_ROWS, OPEN_BLOCKS, SHAPE)
    finally:
        path.rmdir() if kind == "directory" else path.unlink()
    assert not list(tmp_path.iterdir())


def test_too_little_memory_is_told(name: str) -> None:
    with pytest.raises(UserError, match=r"the shared buffer needs .* GB but .*lower server\.rows"):
        Buffer.create(name, 1 << 20, 1 << 10, 5, (12, 768, "float32"))
