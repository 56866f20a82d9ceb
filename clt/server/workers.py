"""The serving processes of a shared buffer, whose lives keep it."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager

import numpy as np

from clt.errors import UserError
from clt.server.layout import WORKERS
from clt.server.segment import start_time

_STAYS = -1  # in the place of a process's clients: it serves none


class Workers:
    """The table of a buffer's serving processes, as one of them, or the supervisor, sees it.

    `header` is the buffer's, which `locked()` gives alone. Who lives is asked of /proc, and so never under the lock.
    """

    def __init__(
        self, table: np.ndarray, header: np.ndarray, locked: Callable[[], AbstractContextManager[object]]
    ) -> None:
        self._table, self._header, self._locked = table, header, locked
        self._own: int | None = None

    def join(self) -> bool:
        """Enter this process among those that keep the buffer alive; False when it is about to be removed."""
        me = (os.getpid(), start_time(os.getpid()))
        while True:
            entries = self._table.tolist()
            free = next((i for i, (pid, start, _) in enumerate(entries) if not pid or start_time(pid) != start), None)
            if free is None:
                raise UserError(f"the shared buffer serves {WORKERS} processes already: lower server.workers")
            with self._locked():
                if self._header["closing"]:
                    return False
                if self._table[free].item() == entries[free]:  # nobody else has taken it
                    self._own = free
                    self._table[free] = (*me, 0)
                    self._header["joined"] += 1
                    return True

    def leave(self, stay: bool = False) -> None:
        """The opposite, if it has joined; or `stay` without serving anybody, for as long as this process lives."""
        if self._own is not None:
            with self._locked():
                if stay:
                    self._table[self._own]["clients"] = _STAYS
                else:
                    self._table[self._own] = (0, 0, 0)

    def add_clients(self, delta: int) -> int:
        """Change the number of this process's clients; returns that of all (those of dead ones do not count)."""
        assert self._own is not None, "join first"
        with self._locked():
            self._table[self._own]["clients"] += delta
        return sum(self.clients())

    def clients(self) -> list[int]:
        """How many clients each process has that runs and serves."""
        return [count for count in self._living() if count != _STAYS]

    def close_if_unused(self, waited: bool) -> bool:
        """Refuse all further ones if the last has left, or none came and it was `waited` long enough for it."""
        joined, living = int(self._header["joined"]), self._living()
        with self._locked():
            if (waited or joined) and not living and self._header["joined"] == joined:  # nobody has come since
                self._header["closing"] = 1
            return bool(self._header["closing"])

    @property
    def wanted(self) -> bool:
        """Whether one is there, or the first is still to come."""
        with self._locked():
            closing, joined = bool(self._header["closing"]), bool(self._header["joined"])
        return not closing and (not joined or bool(self._living()))

    def _living(self) -> list[int]:
        """The clients of all that run, _STAYS for those who do no more than that."""
        return [count for pid, start, count in self._table.tolist() if pid and start_time(pid) == start]
