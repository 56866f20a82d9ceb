"""Servers of small stores: real processes, to be asked, killed and started again."""

import contextlib
import http.client
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from urllib.request import urlopen

import pytest

from clt.config import Config, load_config
from clt.parsing import to_yaml
from clt.server.client import ActivationClient

if any(find_spec(package) is None for package in ("starlette", "uvicorn")):
    collect_ignore_glob = ["test_*.py"]  # they are the `serve` extra's
ROOT = Path(__file__).parents[2]
BACKGROUND = ["sh", "-c", "trap '' INT; exec \"$@\"", "sh"]  # begins as a shell's background job does: without SIGINT


def eventually(holds: Callable[[], object], seconds: float = 60.0) -> None:
    """Wait until `holds()` is true, looking ever more seldom: what is waited for needs the processor."""
    end, pause = time.monotonic() + seconds, 0.01
    while not holds():
        assert time.monotonic() < end, "it did not come true in time"
        time.sleep(pause)
        pause = min(1.5 * pause, 0.1)


def pause_generator(client: ActivationClient) -> int:
    """Stop it (SIGSTOP); returns its pid."""
    eventually(lambda: client.stats()["generator"]["state"] == "running")
    pid = client.stats()["generator"]["pid"]
    os.kill(pid, signal.SIGSTOP)
    return pid


class Server:
    """A running server: `url`, `log` (a file), `process`; the store that it serves from is at `store`."""

    def __init__(self, command: list[str], environment: dict[str, str], url: str, path: Path) -> None:
        self.store, self.log = path / "store", path / "log"
        self._environment = os.environ | environment
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self.port = probe.getsockname()[1]
        self.url = url.format(port=self.port)
        self._command = [part.format(port=self.port) for part in command]
        self.start()

    def start(self, *overrides: str) -> None:
        """Start the process, again if it has ended, and wait until it serves. `overrides` are for `clt serve`."""
        with open(self.log, "a") as file:
            command = [*self._command, *overrides]
            self.process = subprocess.Popen(command, env=self._environment, cwd=ROOT, stdout=file, stderr=file)
        try:
            eventually(self._answers, 120)
        except AssertionError:
            self.process.kill()
            raise AssertionError(self.log.read_text()) from None

    def _answers(self) -> bool:
        assert self.process.poll() is None, self.log.read_text()
        with contextlib.suppress(OSError), urlopen(self.url + "/healthz", timeout=60) as response:
            return response.status == 200
        return False

    def ask(self, path: str, method: str = "GET", **headers: str) -> tuple[int, http.client.HTTPMessage, bytes]:
        """Status, headers and body of the answer to a request; status 0 when nobody answers."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        with contextlib.closing(connection):
            try:
                connection.request(method, path, headers={name.replace("_", "-"): headers[name] for name in headers})
                response = connection.getresponse()
                return response.status, response.headers, response.read()
            except OSError:
                return 0, http.client.HTTPMessage(), b""

    def connect(self, path: str, receive_buffer: int = 1 << 16, token: str = "") -> socket.socket:
        """A connection on which a request was sent and nothing read."""
        connection = socket.socket()
        connection.settimeout(60)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        connection.connect(("127.0.0.1", self.port))
        head = f"GET {path} HTTP/1.1\r\nhost: 127.0.0.1\r\nauthorization: Bearer {token}\r\n\r\n"
        connection.sendall(head.encode())
        return connection

    def stop(self) -> None:
        """Ctrl-C, and wait for the end of all its processes."""
        self.process.send_signal(signal.SIGINT)  # which a process that has ended does not get
        self.process.wait(60)


@pytest.fixture(scope="module")
def serve(
    stores: Path, lm_overrides: list[str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[..., Server]]:
    """serve(*overrides, by="clt"|"uvicorn"|"plain uvicorn", **environment): a server of a copy of the stores.

    `before` are the words of a command that starts it, `options` are further ones of its own.
    """
    servers = []

    def start(
        *overrides: str, by: str = "clt", before: Sequence[str] = (), options: Sequence[str] = (),
        url: str = "http://127.0.0.1:{port}", **environment: str,
    ) -> Server:  # fmt: skip
        path = tmp_path_factory.mktemp("server")
        config = _config(stores, lm_overrides, path, overrides)
        (path / "config.yaml").write_text(to_yaml(config))
        command = [*before, sys.executable, "-m", "clt.cli", "serve", str(path / "config.yaml"), "server.port={port}"]
        if by != "clt":
            command[-4:] = ["uvicorn", "clt.server.app:app", "--port", "{port}", "--timeout-graceful-shutdown", "1"]
            command += ["--workers", str(config.server.workers)]
            command += ["--http", "clt.server.protocol:Protocol", "--ws", "none"] if by == "uvicorn" else []
            environment["CLT_CONFIG"] = str(path / "config.yaml")
        servers.append(Server([*command, *options], environment, url, path))
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
    keys = [f"data.store={path / 'store'}", "server.source=store", "server.rows=512"]
    return load_config(None, [*lm_overrides, *keys, *overrides])
