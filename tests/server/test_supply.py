"""Rows that are held while they are sent: for a moment in the shared buffer, then in memory of their own."""

import asyncio
import contextlib
from collections.abc import Callable, Coroutine

import numpy as np
import pytest

from clt.config import Config, load_config
from clt.server import app, supply
from clt.server.buffer import SharedBuffer
from clt.server.responses import ClientGone
from clt.server.supply import Drawn, Supply, Unavailable
from tests.server.conftest import known_rows

N = 10


def hold(buffer: SharedBuffer, work: Callable[[Drawn, dict[object, int]], Coroutine[object, object, None]]) -> None:
    """Run `work` with ten rows drawn from a buffer of known ones."""
    buffer.put(known_rows(60))

    async def main() -> None:
        held: dict[object, int] = {}
        slots = buffer.claim(N)
        assert slots is not None
        await work(Drawn(buffer, slots, held, 0, 60), held)

    asyncio.run(main())


def check(drawn: Drawn, rows: slice) -> None:
    """Each value of a row is its document's number."""
    out = bytearray((rows.stop - rows.start) * drawn.buffer.row_bytes)
    drawn.copy(rows, memoryview(out))
    values = np.frombuffer(out, np.float16).reshape(rows.stop - rows.start, -1)
    assert (values == drawn.columns["document"][rows, None]).all()


def test_rows_are_copied_in_parts_and_freed_once(buffer: SharedBuffer) -> None:
    async def work(drawn: Drawn, held: dict[object, int]) -> None:
        assert len(drawn) == N
        for first in range(0, N, 3):
            check(drawn, slice(first, min(first + 3, N)))
        assert buffer.stats()["in_flight"] == N
        for _ in range(2):
            drawn.release()
            assert (buffer.stats()["in_flight"], buffer.stats()["rows_drawn"]) == (0, N)
        assert not held

    hold(buffer, work)


def test_who_reads_slowly_does_not_keep_the_slots(buffer: SharedBuffer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supply, "_HOLD_SECONDS", 0.05)

    async def work(drawn: Drawn, held: dict[object, int]) -> None:
        check(drawn, slice(0, 4))
        await asyncio.sleep(0.5)
        assert (buffer.stats()["in_flight"], buffer.stats()["rows_drawn"]) == (0, N)
        while buffer.put(known_rows(60, first=500)):  # others have the slots now
            pass
        check(drawn, slice(4, N))
        drawn.release()
        assert buffer.stats()["rows_drawn"] == N

    hold(buffer, work)


def test_slow_readers_share_a_bounded_memory(buffer: SharedBuffer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A quarter of the buffer's 64 rows: one client's copies fit, a second's stay in the buffer until there is room."""
    monkeypatch.setattr(supply, "_HOLD_SECONDS", 0.05)

    async def work(drawn: Drawn, held: dict[object, int]) -> None:
        slots = buffer.claim(N)
        assert slots is not None
        other = Drawn(buffer, slots, held, 0, 60)
        await asyncio.sleep(0.5)
        assert (drawn.slow, other.slow) == (True, True)
        assert buffer.stats()["in_flight"] == N
        check(drawn, slice(0, N))
        check(other, slice(0, 3))
        drawn.release()
        await asyncio.sleep(0.5)
        assert buffer.stats()["in_flight"] == 0
        check(other, slice(3, N))
        other.release()
        assert not held
        assert buffer.stats()["rows_drawn"] == 2 * N

    hold(buffer, work)


def test_who_reads_slowly_holds_up_nobody(buffer: SharedBuffer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supply, "_HOLD_SECONDS", 0.05)

    async def work(drawn: Drawn, held: dict[object, int]) -> None:
        held[object()] = buffer.rows * buffer.row_bytes  # no room
        buffer._header["min_fill"] = 55
        await asyncio.sleep(0.3)
        assert buffer.stats()["in_flight"] == N, "the generator has room to help the others"
        while buffer.put(known_rows(60, first=500)):
            pass
        await asyncio.sleep(0.3)
        assert buffer.stats()["in_flight"] == 0
        with pytest.raises(ClientGone):
            check(drawn, slice(0, 1))

    hold(buffer, work)


def test_a_batch_larger_than_min_fill_is_held_up_by_what_it_lacks(
    buffer: SharedBuffer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supply, "_HOLD_SECONDS", 0.05)

    async def work(drawn: Drawn, held: dict[object, int]) -> None:
        held[object()] = buffer.rows * buffer.row_bytes  # no room
        buffer._header["min_fill"] = 1
        others = buffer.claim(buffer.stats()["valid"] - N + 1)
        while buffer.put(known_rows(60, first=500)):
            pass
        rest = buffer.claim(buffer.stats()["valid"] - N + 1)
        assert others is not None
        assert rest is not None
        assert buffer.draw(N) is None, "one row too few, and the generator has no room"
        await asyncio.sleep(0.3)
        with pytest.raises(ClientGone):
            check(drawn, slice(0, 1))
        assert buffer.put(known_rows(N)) == N
        assert buffer.draw(N) is not None

    hold(buffer, work)


def test_who_reads_too_slowly_for_too_long_is_given_up(buffer: SharedBuffer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supply, "_HOLD_SECONDS", 0.05)

    async def work(drawn: Drawn, held: dict[object, int]) -> None:
        slots = buffer.claim(N)
        assert slots is not None
        other = Drawn(buffer, slots, held, 0, 0.2)
        await asyncio.sleep(0.5)
        assert buffer.stats()["in_flight"] == 0
        check(drawn, slice(0, N))
        with pytest.raises(ClientGone, match="it reads too slowly for its 10 rows"):
            check(other, slice(0, 1))

    hold(buffer, work)


def test_a_slow_client_waits_for_room_before_it_is_given_rows(
    buffer: SharedBuffer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supply, "_HOLD_SECONDS", 0.05)
    buffer.put(known_rows(60))
    found = Supply(load_config(None, ["server.wait_seconds=0.2"]))
    found.buffer = buffer

    async def main() -> None:
        first = await found.draw(N)
        await asyncio.sleep(0.3)  # it is copied
        with pytest.raises(Unavailable, match=r"read slowly had all the memory for batches for 0\.2 seconds"):
            await found.draw(N, slow=True)
        assert buffer.stats()["in_flight"] == 0, "nothing was drawn in vain"
        second = await found.draw(N)  # who has not been slow does not wait
        asyncio.get_running_loop().call_later(0.05, first.release)
        third = await found.draw(N, slow=True)
        await asyncio.sleep(0.3)
        assert buffer.stats()["in_flight"] == N, "the third was copied to where there was room for it"
        check(third, slice(0, N))
        for each in (second, third):
            each.release()
        assert not found._held

    asyncio.run(main())
    assert buffer.stats()["in_flight"] == 0


def test_a_stream_whose_client_was_slow_waits_for_room_and_is_ended_with_the_reason(
    buffer: SharedBuffer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(supply, "_HOLD_SECONDS", 0.05)
    buffer.put(known_rows(60))
    monkeypatch.setattr("clt.server.wire.PIECE", 64)
    found = Supply(load_config(None, ["server.wait_seconds=0.2"]))
    found.buffer = buffer

    async def main() -> list[bytes]:
        found._held[object()] = buffer.rows * buffer.row_bytes  # no room
        frames = []
        async with contextlib.aclosing(app._frames(found, 2, await found.draw(N))) as pieces:
            async for piece in pieces:
                frames.append(bytes(piece))
                await asyncio.sleep(0.2)
        return frames

    told = "clients that read slowly had all the memory for batches for 0.2 seconds"
    assert told.encode() in asyncio.run(main())[-1]
    assert caplog.messages == [f"a stream was ended: {told}"]
    assert buffer.stats()["rows_drawn"] == N


def test_rows_outlive_the_buffer_that_is_left(buffer: SharedBuffer) -> None:
    """Also where there is no room."""

    async def work(drawn: Drawn, held: dict[object, int]) -> None:
        held[object()] = buffer.rows * buffer.row_bytes
        drawn.detach()
        assert buffer.stats()["in_flight"] == N
        drawn.detach(at_once=True)
        assert buffer.stats()["in_flight"] == 0
        check(drawn, slice(0, N))
        drawn.detach()

    hold(buffer, work)


def test_a_buffer_that_cannot_be_replaced_yet_is_kept(
    buffer: SharedBuffer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The disk is full or gone, or there is no memory for two: it is tried again."""

    def ensure(config: Config) -> SharedBuffer:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(supply, "ensure", ensure)
    found = Supply(load_config(None, []))
    found.buffer = buffer
    buffer.put(known_rows(10))
    asyncio.run(found._replace())
    assert found.buffer is buffer
    assert "No space left on device" in caplog.text
    assert buffer.stats()["rows_dropped"] == 10, "they may be what takes the memory"


def test_batches_share_the_same_memory(buffer: SharedBuffer) -> None:
    """Sixteen of the buffer's 64 rows: a second batch of ten waits for the first one's end, or in vain."""
    buffer.put(known_rows(60))
    found = Supply(load_config(None, ["server.wait_seconds=0.2"]))
    found.buffer = buffer

    async def main() -> None:
        first = await found.batch(N, N * buffer.row_bytes)
        assert (first.batch.activations[:, 0, 0, 0].numpy() == first.batch.document).all()
        small = await found.batch(6, 6 * buffer.row_bytes)
        with pytest.raises(Unavailable, match=r"read slowly had all the memory for batches for 0\.2 seconds"):
            await found.batch(1, N * buffer.row_bytes)  # also what takes more than its rows, as JSON
        asyncio.get_running_loop().call_later(0.05, first.release)
        again = await found.batch(N, N * buffer.row_bytes)
        for each in (small, again, again):
            each.release()
        with pytest.raises(Unavailable, match="the buffer had no 60 rows"):  # more than a quarter, but alone
            await found.batch(60, 60 * buffer.row_bytes)
        assert len((await found.batch(20, 20 * buffer.row_bytes)).batch.row) == 20

    asyncio.run(main())
    assert buffer.stats()["in_flight"] == 0
