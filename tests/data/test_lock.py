"""Two processes at one store."""

import errno
import fcntl
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from clt.config import Config
from clt.data import lock
from clt.data.describe import verify
from clt.data.extract import extract
from clt.data.lock import locked
from clt.errors import UserError

HOLDER = """
import sys; from pathlib import Path; from clt.data.lock import locked
with locked(Path(sys.argv[1])):
    print("locked", flush=True)
    sys.stdin.read()
"""


def test_a_second_extraction_names_the_process_of_the_first(config: Callable[..., Config], tmp_path: Path) -> None:
    store = tmp_path / "stores" / "train"
    store.mkdir(parents=True)
    command = [sys.executable, "-c", HOLDER, str(store)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout is not None
        assert first.stdout.readline() == "locked\n"
        with pytest.raises(UserError, match=rf"{store} is being extracted by process {first.pid} on .*: wait"):
            extract(config(), "train", progress=False)
        assert [file.name for file in store.iterdir()] == ["lock"]
        first.kill()
    extract(config(), "train", progress=False)
    verify(store)
    assert not (store / "lock").exists()


def test_waiting_for_the_lock_of_another_process_is_told_and_bounded(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout is not None
        assert first.stdin is not None
        assert first.stdout.readline() == "locked\n"
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(_hold, tmp_path)
            holder = f"{tmp_path} is being extracted by process {first.pid} on "
            with pytest.raises(UserError, match=holder), locked(tmp_path, wait=0.3):
                pass
            assert capsys.readouterr().err.count(f"waiting: {holder}") == 2
            assert not waiting.done()
            first.stdin.close()
            assert waiting.result() == f"process {os.getpid()}"
    assert not list(tmp_path.iterdir())


def _hold(path: Path) -> str:
    with locked(path, wait=60):
        return (path / "lock").read_text().partition(" on ")[0]


def test_a_lock_is_free_after_an_error_and_after_a_killed_process(tmp_path: Path) -> None:
    with pytest.raises(KeyError), locked(tmp_path):
        raise KeyError
    assert not list(tmp_path.iterdir())
    (tmp_path / "lock").write_text("process 1 on a node that lost its power, with a long name")
    with locked(tmp_path):
        holder = (tmp_path / "lock").read_text()
        assert holder.startswith(f"process {os.getpid()} on ")
        assert "power" not in holder
        with pytest.raises(UserError, match=holder), locked(tmp_path):
            pass
    assert not list(tmp_path.iterdir())


@pytest.fixture
def no_flock(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """no_flock(number): flock answers with this errno, as a file system does that has none; less waiting."""

    def refuse(number: int) -> None:
        def flock(*_: object) -> None:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(fcntl, "flock", flock)

    for name, seconds in (("_BEAT", 0.05), ("_STALE", 2.0), ("_SETTLE", 0.05)):
        monkeypatch.setattr(lock, name, seconds)
    lock._warn_without_flock.cache_clear()
    return refuse


@pytest.mark.parametrize("number", [37, 95])
def test_extraction_on_a_file_system_without_flock(
    config: Callable[..., Config], no_flock: Callable[[int], None], capsys: pytest.CaptureFixture, number: int
) -> None:
    assert number in (errno.ENOLCK, errno.EOPNOTSUPP)
    no_flock(number)
    store = Path(config().data.store) / "train"
    for _ in range(2):
        extract(config(), "train", progress=False)
        verify(store)
        (store / "index.json").unlink()
        for file in store.iterdir():
            file.unlink()
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert len(warnings) == 1
    assert f"the file system of {store} has no file locks" in warnings[0]


def test_any_other_error_of_flock_is_raised(no_flock: Callable[[int], None], tmp_path: Path) -> None:
    no_flock(errno.EIO)
    with pytest.raises(OSError, match="Input/output error"), locked(tmp_path):
        pass


def test_without_flock_a_second_holder_is_told_of_the_first(no_flock: Callable[[int], None], tmp_path: Path) -> None:
    no_flock(errno.ENOLCK)
    with locked(tmp_path):
        name = f"process {os.getpid()} on {socket.gethostname()} since "
        with pytest.raises(UserError, match=f"is being extracted by {name}"), locked(tmp_path):
            pass
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(_hold, tmp_path)
            time.sleep(0.2)
            assert not waiting.done()
            (tmp_path / "lock").unlink()  # as the end of the first does
            assert waiting.result() == f"process {os.getpid()}"
    assert not list(tmp_path.iterdir())


def test_without_flock_a_dead_holder_blocks_nobody_for_long(no_flock: Callable[[int], None], tmp_path: Path) -> None:
    no_flock(errno.EOPNOTSUPP)
    (tmp_path / "lock").write_text("process 1 on a node that lost its power since 1970")
    with locked(tmp_path):
        assert f"process {os.getpid()} on " in (tmp_path / "lock").read_text()
    assert not list(tmp_path.iterdir())
