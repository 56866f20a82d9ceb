"""What lies between a server and those who use it: TLS, IPv6, and a person's browser."""

import contextlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from clt.config import Config
from clt.parsing import to_yaml
from clt.server.client import ActivationClient, ServerError
from tests.server.conftest import Server

ROOT = Path(__file__).parents[2]


@contextlib.contextmanager
def command(config: Config, path: Path, url: str, *options: str) -> Iterator[ActivationClient]:
    """`clt serve` as a person types it, with a client of `url` (formatted with the port) once it serves."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    (path / "config.yaml").write_text(to_yaml(config))
    with open(path / "log", "w") as log:
        parts = [sys.executable, "-m", "clt.cli", "serve", str(path / "config.yaml"), f"server.port={port}", *options]
        process = subprocess.Popen(parts, cwd=ROOT, stdout=log, stderr=log)
    try:
        client = ActivationClient(url.format(port=port), patience=120)
        client.stats()
        yield client
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(60)
        print((path / "log").read_text())


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl, which makes the certificate")
def test_tls(own_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    make = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    make += ["-addext", "subjectAltName=DNS:localhost", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run(make, check=True, capture_output=True)
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    options = ["--ssl-certfile", str(certificate), "--ssl-keyfile", str(key)]
    with command(own_config, tmp_path, "https://localhost:{port}", *options) as client:
        batches = list(client.stream_activations(100, 20))
        assert len({row for batch in batches for row in batch.row.tolist()}) == 2000
        assert len(client.get_activations_tensor(10)) == 10
        plain = ActivationClient(client.url.replace("https", "http"), patience=0.5)
        with pytest.raises(ServerError):
            plain.stats()
        monkeypatch.delenv("SSL_CERT_FILE")
        with pytest.raises(ServerError, match="CERTIFICATE_VERIFY_FAILED"):
            ActivationClient(client.url, patience=0.5).stats()


@pytest.mark.skipif(shutil.which("ss") is None, reason="needs ss, which knows the congestion control of connections")
def test_connections_of_the_machine_itself_are_not_paced(own_config: Config, tmp_path: Path) -> None:
    with command(own_config, tmp_path, "http://127.0.0.1:{port}") as client:
        batches = client.stream_activations(100)
        next(batches)
        port = client.url.rpartition(":")[2]
        told = subprocess.run(["ss", "-tiH", f"sport = :{port}"], capture_output=True, text=True, check=True).stdout
        assert len(told.split("\n\t")) > 1, told
        assert all(connection.split()[0] == "reno" for connection in told.split("\n\t")[1:]), told
        batches.close()


def _has_ipv6() -> bool:
    with contextlib.suppress(OSError), socket.create_server(("::1", 0), family=socket.AF_INET6):
        return True
    return False


@pytest.mark.skipif(not _has_ipv6(), reason="needs IPv6")
def test_ipv6(own_config: Config, tmp_path: Path) -> None:
    with command(own_config, tmp_path, "http://[::1]:{port}", "server.host=::1") as client:
        assert len(client.get_activations_tensor(10)) == 10
        assert [len(batch.row) for batch in client.stream_activations(50, 3)] == [50] * 3


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")
def test_the_status_page_in_a_browser(serve, tmp_path: Path) -> None:
    server: Server = serve()
    client = ActivationClient(server.url)
    list(client.stream_activations(100, 10))
    while len(client.stats()["history"]["seconds"]) < 2:  # a line takes two points, and they come every two seconds
        time.sleep(0.1)

    def page(path: str = "/") -> str:
        browser = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'browser'}"]
        browser += ["--virtual-time-budget=6000", "--dump-dom", server.url + path]
        return subprocess.run(browser, check=True, capture_output=True, text=True, timeout=120).stdout

    dom = page()
    assert "Generator <b>running</b>" in dom
    figures = dict(re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", dom))
    assert figures["Rows served"] == "1,000"
    assert figures["Rows in the buffer"].endswith("/ 512")
    assert figures["Fill"] == "100.0 %"
    charts = re.findall(r'<polyline points="([0-9., ]+)"', dom)
    assert len(charts) == 2, "rows/s and fill over time"
    assert "rows (2, 3, 16)" in dom
