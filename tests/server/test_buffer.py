"""Blocks in shared memory: each row once, whoever is killed, and nothing but our own file behind the name."""

import multiprocessing
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clt.data.index import RowShape
from clt.data.raw_rows import RawRows, tensor_of
from clt.errors import UserError
from clt.lm.forward import Rows
from clt.server.buffer import FULL, OPEN, Buffer

BLOCKS, BLOCK_ROWS, OPEN_BLOCKS = 8, 8, 3
SHAPE = RowShape(2, 3, "float16")


@pytest.fixture
def name() -> Iterator[str]:
    """The name of a buffer that does not outlive the test."""
    name = f"test-{secrets.token_hex(4)}"
    yield name
    Path(f"/dev/shm/clt-{name}").unlink(missing_ok=True)


@pytest.fixture
def buffer(name: str) -> Buffer:
    """An empty buffer of 8 blocks of 8 rows (2, 2, 3) float16, 3 of them open at a time; joined."""
    buffer = Buffer.create(name, (BLOCKS, BLOCK_ROWS, OPEN_BLOCKS), SHAPE)
    buffer.join()
    return buffer


def known_rows(n: int, first: int = 0) -> Rows:
    """n rows of which document tells the content: every value is document % 1024."""
    document = np.arange(first, first + n)
    tensor = torch.from_numpy(document % 1024).half().view(n, 1, 1, 1).expand(n, 2, *SHAPE[:2]).contiguous()
    return Rows(tensor, (document * 3).astype(np.int32), (document % 7).astype(np.int32), document)


def fill(buffer: Buffer, first: int = 0, rows: int = 10**9) -> int:
    """Put known rows until there is no room, or as many; returns the number of the next."""
    while rows and (n := buffer.put(known_rows(min(rows, BLOCK_ROWS), first), (0, 0, first))):
        first, rows = first + n, rows - n
    return first


def check(parts: list[RawRows]) -> list[int]:
    """Each value of a row is its document's number; returns the rows."""
    for part in parts:
        assert (tensor_of(part, SHAPE).flatten(1).numpy() == (part["document"] % 1024)[:, None]).all()
        assert np.array_equal(part["token"], part["document"] * 3)
    return np.concatenate([part["row"] for part in parts]).tolist()


def drain(buffer: Buffer, n: int = BLOCK_ROWS) -> list[int]:
    """The rows of all full blocks, drawn n at a time."""
    rows = []
    while (parts := buffer.draw(n)) is not None:
        rows += check(parts)
    return rows


def adds_up(found: dict) -> bool:
    names = ("valid", "open", "in_flight", "rows_drawn", "rows_dropped", "rows_lost")
    return found["rows_generated"] == sum(found[name] for name in names)


@pytest.mark.parametrize("open_blocks", [1, 3, 7])
def test_it_waits_for_as_many_open_blocks_as_asked_for_and_a_drained_buffer_is_all_room(name, open_blocks: int) -> None:
    """However many are open, there must be some room at the end, which the generator waits for."""
    buffer = Buffer.create(name, (BLOCKS, BLOCK_ROWS, open_blocks), SHAPE)
    end = fill(buffer)
    assert buffer.room() == 0
    assert buffer.put(known_rows(1), (0, 0, 0)) == 0, "though some blocks may have room"
    while buffer.put(known_rows(1, end), (0, 0, 0)) == 0:
        assert buffer.draw(BLOCK_ROWS) is not None
    assert (buffer.state == OPEN).sum() >= open_blocks - 1, "one may be full by now"
    drain(buffer)
    assert buffer.room() >= BLOCKS - open_blocks


def test_blocks_do_not_fill_at_the_same_time(name: str) -> None:
    """Else there would be none and then all, again and again."""
    buffer = Buffer.create(name, (64, 64, 32), SHAPE)
    while not (buffer.state == FULL).any():
        buffer.put(known_rows(4096), (0, 0, 0))
    levels = buffer.progress["filled"][buffer.state == OPEN]
    assert levels.min() < 40
    assert np.ptp(levels) > 20, "of 64; random alone would make it about 10"


def test_generators_that_are_killed_at_any_time_lose_no_row_and_repeat_none(buffer: Buffer, name: str) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["clt.server.buffer", "tests.server.test_buffer"])
    rows: list[int] = []
    for _ in range(6):
        child, wanted = context.Process(target=generate, args=(name,)), len(rows) + 2000
        child.start()
        while len(rows) < wanted:
            rows += drain(buffer)
        child.kill()
        child.join()
    for _ in range(50):  # until the first blocks have had their turn
        fill(buffer, int(buffer.progress["mark"][2]))
        rows += drain(buffer)
    assert sorted(rows)[:10_000] == list(range(10_000))
    assert len(rows) == len(set(rows))
    assert buffer.stats()["rows_lost"] == 0


def generate(name: str) -> None:
    """In the order of the text: the number of a row is its document's, from where the last generator stopped."""
    buffer = Buffer(name)
    while True:
        fill(buffer, int(buffer.progress["mark"][2]))


def test_a_removed_buffer_is_not_taken_for_another_and_keeps_no_memory(name: str) -> None:
    buffer, before = Buffer.create(name, (BLOCKS, BLOCK_ROWS, OPEN_BLOCKS), SHAPE), len(os.listdir("/proc/self/fd"))
    assert not buffer.removed()
    buffer.path.unlink()
    other = Buffer.create(name, (BLOCKS, BLOCK_ROWS, OPEN_BLOCKS), SHAPE)
    assert (buffer.removed(), other.removed()) == (True, False)
    del buffer
    assert len(os.listdir("/proc/self/fd")) == before


@given(st.lists(st.tuples(st.sampled_from(["put", "draw", "refresh"]), st.integers(1, BLOCK_ROWS)), max_size=60))
@settings(max_examples=30, deadline=None)
def test_any_order_of_calls_keeps_the_count_and_refresh_drops_all(calls: list[tuple[str, int]]) -> None:
    name = f"test-{os.getpid()}-model"
    buffer, end, oldest, seen = Buffer.create(name, (BLOCKS, BLOCK_ROWS, OPEN_BLOCKS), SHAPE), 0, 0, []
    try:
        buffer.join()
        for call, n in calls:
            if call == "put":
                end += buffer.put(known_rows(n, end), (0, 0, end))
            elif call == "refresh":
                buffer.refresh()
                oldest = end
            elif (parts := buffer.draw(n)) is not None:
                seen += (rows := check(parts))
                assert len(rows) == n
                assert min(rows) >= oldest
            assert adds_up(buffer.stats())
            assert buffer.stats()["rows_lost"] == 0
        assert len(seen) == len(set(seen))
    finally:
        buffer.path.unlink()


@pytest.mark.parametrize("size", [10, 100_000])
def test_a_file_that_is_no_buffer_is_told(name: str, size: int) -> None:
    path = Path(f"/dev/shm/clt-{name}")
    path.write_bytes(b"x" * size)
    path.chmod(0o600)
    with pytest.raises(UserError, match="not a shuffle buffer of this version"):
        Buffer(name)
