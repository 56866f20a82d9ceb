"""Watches a running rank from a thread: pre-emption signals, and ranks that hang.

Exit statuses: PREEMPTED after a signal, with a checkpoint; TOO_SLOW when the checkpoint was not written within the
grace time; HUNG when a rank has made no progress for the timeout.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import threading
import time
from types import TracebackType

from clt.errors import tell
from clt.train.distributed import World, shared_store

PREEMPTED, TOO_SLOW, HUNG = 75, 76, 77
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
TICK = 1.0  # seconds between heartbeats


class Watch(threading.Thread):
    """While it is entered, SIGTERM and SIGUSR1 set `stopping` instead of ending the process.

    The signal reaches the thread even while the main thread waits inside a collective, so the grace time is kept.
    What comes after the last checkpoint, with `saved` set, has no deadline.
    `progress(step)` must be called at least every `hang_seconds`, also within an evaluation; otherwise the process
    names the ranks that are behind (by heartbeats in torchrun's store) and exits, which ends the job.
    """

    def __init__(self, world: World, hang_seconds: float, grace_seconds: float) -> None:
        super().__init__(name="clt-watch", daemon=True)
        self.world, self.hang_seconds, self.grace_seconds = world, hang_seconds, grace_seconds
        self.stopping = self.saved = False
        self.step, self.since, self.ended = 0, time.monotonic(), threading.Event()
        self.deadline: float | None = None
        self.store = shared_store(world)

    def progress(self, step: int | None = None) -> None:
        """The main thread is alive and at this step; None: still at the one before."""
        self.step, self.since = self.step if step is None else step, time.monotonic()

    def __enter__(self) -> Watch:
        self.read_end, self.write_end = os.pipe()
        os.set_blocking(self.write_end, False)
        self.old_fd = signal.set_wakeup_fd(self.write_end)
        self.old_handlers = {number: signal.signal(number, lambda *_: None) for number in SIGNALS}
        self.since = time.monotonic()
        self.start()
        if self.store is not None:
            # A thread of its own: when the store's node is cut off, its calls do not come back.
            self.heartbeat = threading.Thread(target=self._beat_until_ended, name="clt-heartbeat", daemon=True)
            self.heartbeat.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        for number, handler in self.old_handlers.items():
            # A stopping process is about to end, and torchrun may ask it to once more.
            signal.signal(number, signal.SIG_IGN if self.stopping else handler)
        signal.set_wakeup_fd(self.old_fd)
        os.close(self.write_end)  # ends the thread
        self.ended.set()
        self.join()
        if self.store is not None:
            self.heartbeat.join(5)  # a thread inside the store would crash the interpreter's end
        os.close(self.read_end)

    def run(self) -> None:
        while True:
            ready, _, _ = select.select([self.read_end], [], [], TICK)
            received = os.read(self.read_end, 64) if ready else b""
            if ready and not received:
                return
            if any(number in received for number in SIGNALS) and not self.stopping:
                self.stopping, self.deadline = True, time.monotonic() + self.grace_seconds
            now = time.monotonic()
            if self.deadline is not None and now > self.deadline and not self.saved:
                self._exit(
                    TOO_SLOW,
                    f"no checkpoint could be written within checkpoint.grace_seconds={self.grace_seconds:g} of the "
                    "signal; the run goes on from the one before",
                )
            if now - self.since > self.hang_seconds:
                self._exit(HUNG, self._hang())

    def _beat_until_ended(self) -> None:
        assert self.store is not None
        name, beats = f"{socket.gethostname()}, pid {os.getpid()}", 0
        try:
            while beats == 0 or not self.ended.wait(TICK):
                beats += 1
                self.store.set(str(self.world.rank), json.dumps([beats, self.step, name]))
        except RuntimeError:
            return  # the store's node is gone: the main thread's collectives fail, or `hang_seconds` pass

    def _hang(self) -> str:
        """Which ranks hold up the others, from two looks at the heartbeats."""
        what = f"no progress since step {self.step} for parallel.timeout_seconds={self.hang_seconds:g}"
        if self.store is None:
            return what
        looks: list[dict[int, list]] = []
        looking = threading.Thread(target=self._look_twice, args=(looks,), daemon=True)
        looking.start()
        looking.join(20 * TICK)
        if len(looks) < 2:
            return f"{what}: the node of torchrun's store, where the ranks meet, cannot be reached"
        before, after = looks
        steps = {rank: beat[1] for rank, beat in after.items() if beat}
        silent = [rank for rank, beat in after.items() if beat == before[rank] and rank != self.world.rank]
        behind = [rank for rank, step in steps.items() if step < max(steps.values())]
        named = [f"rank {rank} ({after[rank][2] if after[rank] else 'never seen'})" for rank in silent or behind]
        if silent:
            return f"{what}: {', '.join(named)} stopped answering (stopped, or cut off from the network)"
        if behind:
            return f"{what}: {', '.join(named)} did not get beyond step {min(steps.values())}, others did"
        return f"{what}: all ranks answer and are at step {self.step}, so the hang is in a collective or on the device"

    def _look_twice(self, looks: list[dict[int, list]]) -> None:
        """Append every rank's heartbeat [count, step, name], and again after a few ticks."""
        store = shared_store(self.world)  # the heartbeats' own connection may be stuck
        assert store is not None
        for pause in (0, 3 * TICK):
            time.sleep(pause)
            keys = [str(rank) for rank in range(self.world.size)]
            looks.append({int(key): json.loads(store.get(key)) if store.check([key]) else [] for key in keys})

    def _exit(self, status: int, message: str) -> None:
        tell(f"\n[rank {self.world.rank}] error: {message}")
        os._exit(status)
