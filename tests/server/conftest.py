"""Small shared buffers of known rows, and processes to kill."""

import contextlib
import http.client
import multiprocessing
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from importlib.util import find_spec
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import pytest
import torch

from clt.config import Config, load_config
from clt.lm.forward import Rows
from clt.parsing import to_yaml
from clt.server.buffer import Buffer
from clt.server.client import ActivationClient, ServerError

if any(find_spec(package) is None for package in ("starlette", "uvicorn")):
    collect_ignore_glob = ["test_*.py"]  # they are the `serve` extra's

BLOCKS, BLOCK_ROWS, OPEN_BLOCKS, L, D = 8, 8, 3, 2, 3


def known_rows(n: int, first: int = 0, dtype: str = "float16", shape: tuple[int, int] = (L, D)) -> Rows:
    """n rows of which document tells the content: every value is document % 1024."""
    document = np.arange(first, first + n)
    values = torch.from_numpy(document % 1024).to(getattr(torch, dtype))
    tensor = values.view(n, 1, 1, 1).expand(n, 2, *shape).contiguous()
    return Rows(tensor, (document * 3).astype(np.int32), (document % 7).astype(np.int32), document)


def eventually(holds: Callable[[], object], seconds: float = 60.0) -> None:
    """Wait until `holds()` is true."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it did not come true in time"
        time.sleep(0.01)


def pause_generator(client: ActivationClient, token: str | None = None) -> int:
    """Stop it (SIGSTOP) at a moment when it does not hold the buffer's lock; returns its pid."""
    eventually(lambda: client.stats()["generator"]["pid"])
    pid = client.stats()["generator"]["pid"]
    quick = ActivationClient(client.url, token, timeout=3, patience=0)
    while True:
        os.kill(pid, signal.SIGSTOP)
        with contextlib.suppress(ServerError):
            quick.stats()
            return pid
        os.kill(pid, signal.SIGCONT)


@pytest.fixture
def name() -> Iterator[str]:
    """The name of a buffer that does not outlive the test."""
    name = f"test-{secrets.token_hex(4)}"
    yield name
    Path(f"/dev/shm/clt-{name}").unlink(missing_ok=True)


@pytest.fixture
def buffer(name: str) -> Buffer:
    """An empty buffer of 8 blocks of 8 rows (2, 2, 3) float16, 3 of them open at a time."""
    return Buffer.create(name, BLOCKS, BLOCK_ROWS, OPEN_BLOCKS, (L, D, "float16"))


@pytest.fixture
def spawn() -> Iterator[Callable[..., BaseProcess]]:
    """spawn(function, *arguments): a started process of its own, from a server that has imported torch; ended after."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["clt.server.buffer", "tests.server.conftest"])
    children: list[BaseProcess] = []

    def start(function: Callable[..., object], *arguments: object) -> BaseProcess:
        child = context.Process(target=function, args=arguments)
        child.start()
        children.append(child)
        return child

    yield start
    for child in children:
        child.kill()
        child.join()


def kill(child: BaseProcess) -> None:
    """SIGKILL, and wait for the end."""
    assert child.pid is not None
    os.kill(child.pid, signal.SIGKILL)
    child.join()


class Server:
    """A running server: `url`, `log` (a file), `process`; the store that it serves from is at `store`."""

    def __init__(self, command: list[str], environment: dict[str, str], store: Path, log: Path) -> None:
        self.store, self.log, self._environment = store, log, os.environ | {"OMP_NUM_THREADS": "1"} | environment
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self.port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._command = [sys.executable, "-m", *(part.format(port=self.port) for part in command)]
        self.start()

    def start(self, *overrides: str) -> None:
        """Start the process, again if it has ended, and wait until it serves. `overrides` are for `clt serve`."""
        root = Path(__file__).parents[2]
        with open(self.log, "a") as file:
            limit = ["prlimit", f"--nofile={os.environ['CLT_TEST_NOFILE']}"] if "CLT_TEST_NOFILE" in os.environ else []
            command = [*limit, *self._command, *overrides]
            self.process = subprocess.Popen(command, env=self._environment, cwd=root, stdout=file, stderr=file)
        try:
            eventually(self._answers, 120)
        except AssertionError:
            self.process.kill()
            raise AssertionError(self.log.read_text()) from None

    def _answers(self) -> bool:
        assert self.process.poll() is None, self.log.read_text()
        return self.status("/healthz") == 200

    def status(self, path: str) -> int | None:
        """The status of a GET, or None when nobody answers."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            connection.request("GET", path)
            return connection.getresponse().status
        except OSError:
            return None
        finally:
            connection.close()

    def stop(self) -> None:
        """Ctrl-C, and wait for the end of all its processes."""
        self.process.send_signal(signal.SIGINT)
        self.process.wait(60)


@pytest.fixture(scope="session")
def serve(
    stores: Path, lm_overrides: list[str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[..., Server]]:
    """serve(*overrides, by="clt"|"uvicorn"|"plain uvicorn", **environment): a server of a copy of the stores."""
    servers = []

    def start(*overrides: str, by: str = "clt", **environment: str) -> Server:
        path = tmp_path_factory.mktemp("server")
        config = _config(stores, lm_overrides, path, overrides)
        (path / "config.yaml").write_text(to_yaml(config))
        if by == "clt":
            command = ["clt.cli", "serve", str(path / "config.yaml"), "server.port={port}"]
        else:
            command = ["uvicorn", "clt.server.app:app", "--port", "{port}", "--workers", str(config.server.workers)]
            command += ["--timeout-graceful-shutdown", "1"]
            if by == "uvicorn":
                command += ["--http", "clt.server.protocol:Protocol", "--ws", "none"]
            environment["CLT_CONFIG"] = str(path / "config.yaml")
        servers.append(Server(command, environment, path / "store", path / "log"))
        return servers[-1]

    yield start
    for server in servers:
        server.stop()


@pytest.fixture
def own_config(stores: Path, lm_overrides: list[str], tmp_path: Path) -> Config:
    """The config of a server of a copy of the extracted stores."""
    return _config(stores, lm_overrides, tmp_path, ())


def _config(stores: Path, lm_overrides: list[str], path: Path, overrides: Iterable[str]) -> Config:
    shutil.copytree(stores, path / "store")
    return load_config(
        None, [*lm_overrides, f"data.store={path / 'store'}", "server.source=store", "server.rows=512", *overrides]
    )
