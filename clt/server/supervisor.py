"""The process that owns the shared buffer: starts the generator, restarts it, frees what the dead left, and cleans up.

Serving processes call `ensure`. The first of them starts the supervisor, the others attach; when the last has left,
however it ended, the supervisor removes the segment and ends too.
"""

from __future__ import annotations

import fcntl
import json
import multiprocessing
import os
import select
import signal
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

from clt.config import Config, load_config
from clt.data.index import StoreIndex, write_json, write_whole
from clt.data.shards import row_bytes
from clt.errors import UserError
from clt.parsing import to_yaml
from clt.server.buffer import SLOW_SHARE, SharedBuffer
from clt.server.generator import run_generator
from clt.server.layout import buffer_bytes
from clt.server.prepare import needs_model, own_folder, prepare, rows_tag, segment_name, tag

_TICK = 0.2  # seconds between two looks at the workers and their claims
_FIRST_WORKER = 60.0  # seconds that the first worker may take to come
_DELAYS = (0.5, 60.0)  # seconds before the first and before the slowest restart of the generator
_STEADY = 60.0  # seconds after which a generator counts as having worked
_POSITION_SECONDS = 10.0  # between two records of the place in the text


def ensure(config: Config) -> SharedBuffer:
    """The config's shared buffer, joined; starts its supervisor when there is none. Close it to leave.

    Waits for what `prepare` has to make, the first time. Raises UserError for what is wrong with the config, for memory
    that is missing, and when a buffer of another config has this name.
    """
    directory = own_folder(config)
    directory.mkdir(parents=True, exist_ok=True)
    with open(directory / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for another process that starts the server of {directory}", file=sys.stderr, flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        while (buffer := _join(config)) is None:
            _start(config, directory, lock.fileno())
        return buffer


def _join(config: Config) -> SharedBuffer | None:
    try:
        buffer = SharedBuffer.attach(segment_name(config))
    except FileNotFoundError:
        return None
    same = buffer.tag == tag(config)
    if buffer.alive and not same and buffer.workers.wanted:
        buffer.close()
        raise UserError(
            f"a server with other settings runs on the buffer {segment_name(config)!r}: stop it first, or give this "
            "one another server.name"
        )
    if buffer.alive and same and buffer.workers.join():
        return buffer
    while buffer.alive:  # it is about to end
        time.sleep(_TICK / 4)
    buffer.close()
    return None


def _start(config: Config, directory: Path, lock: int) -> None:
    """Start the supervisor in a session of its own, where no Ctrl-C reaches it, and wait until its buffer is there.

    It holds the lock too: if this process is killed meanwhile, the next waits until the supervisor has given up.
    """
    write_whole(directory / "config.yaml", to_yaml(config).encode())
    reader, writer = os.pipe()
    command = [sys.executable, "-m", "clt.server.supervisor", str(directory / "config.yaml"), str(writer), str(lock)]
    for descriptor in (writer, lock):
        os.set_inheritable(descriptor, True)
    pid = os.posix_spawn(sys.executable, command, os.environ, setsid=True)
    os.set_inheritable(lock, False)
    os.close(writer)
    try:
        with open(reader) as answer:
            text = answer.readline()  # empty when the process ended without an answer
    except BaseException:  # Ctrl-C, SIGTERM: preparing may take hours more, for nobody
        os.killpg(pid, signal.SIGTERM)
        os.waitpid(pid, 0)
        raise
    error = json.loads(text)["error"] if text else "the supervisor ended before the buffer was ready; see its messages"
    if error:
        os.waitpid(pid, 0)  # it is tried again and again
        raise UserError(error)


def main(path: str, answer: int, lock: int) -> None:
    """The supervisor process of the config at `path`; {"error": text or null} goes to the descriptor `answer`.

    The lock on the descriptor `lock` is held until then.
    """
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(0))
    for descriptor in (answer, lock):
        os.set_inheritable(descriptor, False)
    answered = threading.Event()
    threading.Thread(target=_end_with_starter, args=(answer, answered), daemon=True, name="clt-starter").start()
    try:
        config = load_config(path)
        buffer = _create(config)
        answered.set()
    except BaseException as error:
        answered.set()
        cause = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        _answer(answer, cause)
        if isinstance(error, UserError):
            sys.exit(2)
        raise
    try:
        heard = _answer(answer, None)
        os.close(answer)
        os.close(lock)
        if heard:
            supervise(config, buffer)
    finally:
        try:
            buffer.set_generator("stopped")
            _save_position(config, buffer)
        finally:  # the segment must go, also when the data directory has gone before
            buffer.unlink()
            buffer.close()


def _end_with_starter(answer: int, answered: threading.Event) -> None:
    """When the process that started this one dies before it has its answer, end all that this one has started."""
    poll = select.poll()
    poll.register(answer, 0)  # of a pipe that nobody reads any more, only the error comes
    poll.poll()
    if not answered.is_set():
        os.killpg(0, signal.SIGTERM)


def _answer(descriptor: int, error: str | None) -> bool:
    """Tell the process that started this one; False when it has gone."""
    try:
        os.write(descriptor, json.dumps({"error": error}).encode() + b"\n")
    except BrokenPipeError:
        return False
    return True


def _create(config: Config) -> SharedBuffer:
    index = _prepared(config)
    rows, sizes = config.server.rows, (index.n_layers, index.d_acts, index.dtype)
    size = buffer_bytes(rows, *sizes)
    slow = SLOW_SHARE * rows * row_bytes(*sizes)["tensor"]
    print(
        f"shared buffer: {rows} rows (2, L={sizes[0]}, D={sizes[1]}) {sizes[2]}, {size / 1e9:.2f} GB of memory; "
        f"besides, each serving process keeps at most {slow / 1e9:.2f} GB (or one batch) for its clients",
        file=sys.stderr,
        flush=True,
    )
    min_fill, position = round(config.server.min_fill * rows), _load_position(config)
    buffer = SharedBuffer.create(segment_name(config), rows, *sizes, min_fill, tag(config))
    buffer.mark = position
    return buffer


def _prepared(config: Config) -> StoreIndex:
    """`prepare`, where it loads a language model in a process of its own: the memory goes with it."""
    if not needs_model(config):
        return prepare(config)
    try:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            return pool.submit(prepare, config, sys.stderr.isatty()).result()
    except BrokenProcessPool as error:
        raise UserError(
            "the process that extracts the held-out rows and the statistics was killed: is there enough memory for the "
            "language model? Choose a smaller lm.batch_windows or lm.context"
        ) from error


def supervise(config: Config, buffer: SharedBuffer) -> None:
    """Keep a generator running, restarted with back-off, until the last worker has left."""
    context = multiprocessing.get_context("spawn")
    started, delay, restarts = time.monotonic(), _DELAYS[0], 0
    while True:
        child = context.Process(target=run_generator, args=(config, segment_name(config)), name="clt-generator")
        buffer.set_generator("starting", restarts=restarts)
        child.start()
        born = time.monotonic()
        try:
            if _watch(config, buffer, started, child):
                return
        finally:
            _end(child)
        buffer.set_generator("failed", _cause(buffer, child), child.pid or 0)
        buffer.reclaim()
        delay = _DELAYS[0] if time.monotonic() - born > _STEADY else delay
        if _watch(config, buffer, started, None, delay):
            return
        delay, restarts = min(2 * delay, _DELAYS[1]), restarts + 1


def _watch(
    config: Config, buffer: SharedBuffer, started: float, child: SpawnProcess | None, seconds: float = float("inf")
) -> bool:
    """Look after the buffer until the child has ended or `seconds` are over; True when the last worker has left."""
    end, saved = time.monotonic() + seconds, time.monotonic()
    while (now := time.monotonic()) < end:
        if child is None:
            time.sleep(min(_TICK, end - now))
        elif wait([child.sentinel], _TICK):
            return False
        buffer.reclaim()
        if buffer.workers.close_if_unused(waited=now - started > _FIRST_WORKER):
            return True
        if now - saved > _POSITION_SECONDS:
            _save_position(config, buffer)
            saved = now
    return False


def _end(child: SpawnProcess) -> None:
    child.terminate()
    child.join(5)
    if child.is_alive():
        child.kill()
        child.join()


def _cause(buffer: SharedBuffer, child: SpawnProcess) -> str:
    """Why the generator ended: what it said itself, else how it was ended."""
    found, status = buffer.generator(), child.exitcode or 0
    if found["state"] == "failed" and found["pid"] == child.pid:
        return found["cause"]
    if status < 0:
        hint = "; was there too little memory?" if -status == signal.SIGKILL else ""
        return f"the generator was killed by {signal.Signals(-status).name}{hint}"
    return f"the generator ended with status {status}"


def _position(config: Config) -> Path:
    return own_folder(config) / "position.json"


def _save_position(config: Config, buffer: SharedBuffer) -> None:
    """Record the place in the text: a server that is started again goes on behind the rows that were in the buffer.

    One that was killed repeats the rows of the seconds since the last record. A disk that is full or gone is no reason
    to stop serving.
    """
    try:
        write_json(_position(config), {"rows": rows_tag(config), "mark": buffer.mark})
    except OSError as error:
        print(f"the place in the text was not recorded: {error}", file=sys.stderr, flush=True)


def _load_position(config: Config) -> tuple[int, int, int]:
    file = _position(config)
    try:
        found: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    except ValueError as error:
        raise UserError(f"{file}, the place in the text, is damaged ({error}); delete it to begin anew") from error
    return tuple(found["mark"]) if found.get("rows") == rows_tag(config) else (0, 0, 0)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
