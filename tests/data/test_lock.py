"""Two processes at one store."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from clt.data.describe import verify
from clt.data.extract import extract
from clt.data.lock import locked
from clt.errors import UserError
from clt.parsing import to_yaml


def test_the_second_extraction_is_told_who_does_the_first(config, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(to_yaml(config()))
    command = [sys.executable, "-m", "clt.cli", "extract", str(tmp_path / "config.yaml")]
    store = tmp_path / "stores" / "train"
    with subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE) as first:
        try:
            while not any((store / name).exists() for name in ("shard_00000.h5", "shard_00000.h5.partial")):
                assert first.poll() is None
                time.sleep(0.001)
            os.kill(first.pid, signal.SIGSTOP)  # it holds the lock for as long as it is wanted here
            os.waitid(os.P_PID, first.pid, os.WSTOPPED)
            before = {file.name: file.stat().st_mtime_ns for file in store.iterdir()}
            assert "index.json" not in before, "it was stopped too late"
            with pytest.raises(UserError, match=rf"{store} is being extracted by process {first.pid} on .*: wait"):
                extract(config(), "train", progress=False)
            assert {file.name: file.stat().st_mtime_ns for file in store.iterdir()} == before
            os.kill(first.pid, signal.SIGCONT)
            assert first.wait(timeout=120) == 0
        finally:
            first.kill()
    extract(config(), "train", progress=False)
    verify(store)
    assert not (store / "lock").exists()


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
