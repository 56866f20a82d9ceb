"""Two processes at one store."""

import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from clt.config import Config
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


def test_waiting_for_the_lock_of_another_process(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout is not None
        assert first.stdin is not None
        assert first.stdout.readline() == "locked\n"
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(_hold, tmp_path)
            assert not waiting.done()
            first.stdin.close()
            assert waiting.result() == f"process {os.getpid()}"
    assert not list(tmp_path.iterdir())


def _hold(path: Path) -> str:
    with locked(path, wait=True):
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
