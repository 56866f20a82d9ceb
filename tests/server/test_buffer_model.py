"""The shared buffer against a naive model: hypothesis chooses what happens, including deaths, in any order."""

import contextlib
import secrets

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from clt.server.buffer import SharedBuffer
from tests.server.conftest import D, L, known_rows

ROWS, MIN_FILL = 12, 3


class Machine(RuleBasedStateMachine):
    """Three processes of which one can die: `owner`, `other` and `victim`, whose pid does not exist."""

    def __init__(self) -> None:
        super().__init__()
        name = f"test-{secrets.token_hex(4)}"
        self.owner = SharedBuffer.create(name, ROWS, L, D, "float16", MIN_FILL)
        self.other, self.victim = SharedBuffer.attach(name), SharedBuffer.attach(name)
        self.victim._me = (2**22 + 1, 12345)  # above the kernel's largest pid
        self.valid: set[int] = set()
        self.generated = self.drawn = self.lost = self.dropped = 0
        self.held: list[tuple[SharedBuffer, np.ndarray, bool]] = []

    def teardown(self) -> None:
        self.owner.unlink()
        for buffer in (self.owner, self.other, self.victim):
            buffer.close()

    def taken(self) -> int:
        return len(self.valid) + sum(len(slots) for _, slots, _ in self.held)

    def by(self, who: str) -> SharedBuffer:
        return {"owner": self.owner, "other": self.other, "victim": self.victim}[who]

    @rule(n=st.integers(0, ROWS + 3))
    def put(self, n: int) -> None:
        room = ROWS - self.taken()
        assert self.other.put(known_rows(n, self.generated)) == min(n, room)
        self.valid |= set(range(self.generated, self.generated + min(n, room)))
        self.generated += min(n, room)

    @rule(n=st.integers(1, ROWS))
    def draw(self, n: int) -> None:
        batch = self.other.draw(n)
        if len(self.valid) < max(n, MIN_FILL):
            assert batch is None
            return
        assert batch is not None
        rows = set(batch.row.tolist())
        assert len(rows) == n
        assert rows <= self.valid
        np.testing.assert_array_equal(batch.activations[:, 0, 0, 0].numpy(), batch.document % 1024)
        self.valid -= rows
        self.drawn += n

    @rule(n=st.integers(1, 4), who=st.sampled_from(["owner", "victim"]))
    def claim(self, n: int, who: str) -> None:
        slots = self.by(who).claim(n)
        assert (slots is None) == (len(self.valid) < max(n, MIN_FILL))
        if slots is not None:
            rows = set(self.owner._columns["row"][slots].tolist())
            assert rows <= self.valid
            self.valid -= rows
            self.held.append((self.by(who), slots, True))

    @rule(n=st.integers(1, 4), who=st.sampled_from(["owner", "victim"]))
    def reserve(self, n: int, who: str) -> None:
        room = ROWS - self.taken()
        slots = self.by(who).reserve(n)
        assert len(slots) == min(n, room)
        self.generated += len(slots)
        self.held.append((self.by(who), slots, False))

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        """The end of a draw or of a write."""
        buffer, slots, reading = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
        if reading:
            buffer.release(slots)
            self.drawn += len(slots)
        else:
            rows = self.owner._columns["row"][slots]
            self.owner._payload[slots] = np.repeat((rows % 1024).astype("f2")[:, None], 2 * L * D, 1).view("u1")
            self.owner._columns["document"][slots] = rows
            buffer.publish(slots)
            self.valid |= set(rows.tolist())

    @rule()
    def refresh(self) -> None:
        assert self.owner.refresh() == len(self.valid)
        self.dropped += len(self.valid)
        self.valid.clear()

    @rule()
    def the_victim_is_found_dead(self) -> None:
        dead = [item for item in self.held if item[0] is self.victim]
        self.held = [item for item in self.held if item[0] is not self.victim]
        assert self.owner.reclaim() == sum(len(slots) for _, slots, _ in dead)
        self.lost += sum(len(slots) for _, slots, _ in dead)

    @rule(seed=st.integers(0, 99), n=st.integers(0, ROWS))
    def somebody_dies_with_the_lock(self, seed: int, n: int) -> None:
        """The lists are left in any state; the states of the rows stay the truth."""
        random = np.random.default_rng(seed)
        with contextlib.suppress(ZeroDivisionError), self.victim._locked() as header:
            self.victim._valid[:] = random.integers(-5, ROWS, ROWS)
            self.victim._free[:] = random.integers(-5, ROWS, ROWS)
            header["n_valid"], header["n_free"] = n, ROWS - n
            raise ZeroDivisionError

    @invariant()
    def the_numbers_are_right(self) -> None:
        stats = self.owner.stats()
        held = sum(len(slots) for _, slots, _ in self.held)
        found = (stats["valid"], stats["in_flight"], stats["rows_generated"], stats["rows_drawn"])
        assert found == (len(self.valid), held, self.generated, self.drawn)
        assert (stats["rows_lost"], stats["rows_dropped"]) == (self.lost, self.dropped)


TestBuffer = Machine.TestCase
TestBuffer.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
