"""Training data from a server: what the loader gets, and what happens when the server goes away."""

import contextlib
import dataclasses
import http.server
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from clt.config import Config, load_config
from clt.data.describe import verify
from clt.data.loader import Loader
from clt.data.statistics import Statistics
from clt.data.store import DiscBuffer
from clt.errors import UserError
from clt.parsing import to_yaml
from clt.server.client import ActivationClient, ServerError, _Again, _Waiting
from clt.server.remote import ServerStore, fetch_heldout, open_server
from clt.server.wire import Shape, body_of, frame, frame_bytes
from clt.train.watch import PREEMPTED
from tests.server.conftest import Server, eventually

TOKEN = "a-token-of-the-tests-0123456789"


@pytest.fixture(scope="module")
def server(serve) -> Server:
    return serve("server.max_batch=100", CLT_SERVER_TOKEN=TOKEN)  # less than some of the reader's batches


@pytest.fixture
def reader(server, lm_overrides, tmp_path, monkeypatch):
    """reader(*overrides): the config of a run that reads from the server."""
    monkeypatch.delenv("CLT_SERVER_TOKEN", raising=False)
    (tmp_path / "token").write_text(TOKEN)
    (tmp_path / "token").chmod(0o600)

    def make(*overrides: str) -> Config:
        keys = ["data.source=server", f"data.url={server.url}", f"data.token_file={tmp_path / 'token'}"]
        return load_config(None, [*lm_overrides, f"data.store={tmp_path / 'here'}", *keys, *overrides])

    return make


def test_a_loader_reads_rows_of_the_store_from_the_server(server, reader):
    store, train = open_server(reader()), DiscBuffer(server.store / "train")
    known = {row.numpy().tobytes() for row in train[:]}
    sizes = [60, 59, 60, 1, 200]
    with Loader(store, map(np.arange, sizes), prefetch=2) as loader:
        batches = [batch.clone() for batch in loader]
    assert [len(batch) for batch in batches] == sizes
    assert all(row.numpy().tobytes() in known for row in torch.cat(batches))
    assert len({row.numpy().tobytes() for row in torch.cat(batches)}) > 200
    assert torch.equal(store.statistics.input_mean, train.statistics.input_mean)
    assert (len(store), store.index.n_layers) == (1000, 3)
    assert list(store.consumed) == [store.client.stats()["segment"]]
    assert sum(store.consumed.values()) >= sum(sizes)


def test_heldout_rows_become_a_store(server, reader):
    config = reader()
    fetch_heldout(config)
    here, there = DiscBuffer(f"{config.data.store}/heldout"), DiscBuffer(server.store / "heldout")
    assert torch.equal(here[:], there[:])
    assert np.array_equal(here.documents(slice(None)), there.documents(slice(None)))
    verify(here.path)
    fetch_heldout(config)  # is content with it


def test_runs_that_start_at_once_share_one_copy(server, reader):
    config = reader()
    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(fetch_heldout, config) for _ in range(4)]:
            done.result()
    verify(f"{config.data.store}/heldout")
    assert Statistics.load(f"{config.data.store}/train/stats.safetensors").rows > 0


def test_another_config_is_refused(reader):
    with pytest.raises(UserError, match=r"the server http.* has other rows than the config asks for: .*lm\.layers"):
        open_server(reader("lm.layers=[0]"))


def test_the_token_file_and_the_url_are_used(reader, tmp_path):
    (tmp_path / "other").write_text("another-token-0123456789")
    (tmp_path / "other").chmod(0o600)
    with pytest.raises(ServerError, match="answered 401: the token is not this server's"):
        open_server(reader(f"data.token_file={tmp_path / 'other'}"))
    with pytest.raises(UserError, match="is not of the form"):
        open_server(reader("data.url=localhost"))
    with pytest.raises(UserError, match=r"data\.url is null"):
        load_config(None, ["data.source=server"])


def test_a_server_that_is_killed_and_started_again_is_waited_out(serve):
    """Its rows stay distinct over both lives, and the reader notices nothing but the time."""
    first = serve()
    client = ActivationClient(first.url, patience=120)
    got: list[tuple[str, int]] = []
    broken = threading.Event()

    def read() -> None:
        for batch in itertools.takewhile(lambda _: len(got) < 4000, client.stream_activations(50)):
            got.extend((batch.segment, row) for row in batch.row.tolist())
            if len(got) == 1000:
                broken.wait(60)

    reader = threading.Thread(target=read)
    reader.start()
    eventually(lambda: len(got) >= 1000)
    first.process.kill()
    first.process.wait()
    broken.set()
    first.start()
    reader.join(120)
    assert len(got) == len(set(got)) == 4000


def test_patience_has_an_end_and_says_that_it_waits(caplog):
    with pytest.raises(ServerError, match=r"127.0.0.1:9/stats: .*refused.*\(tried for"):
        ActivationClient("http://127.0.0.1:9", patience=0.3).stats()
    (waits,) = [record.message for record in caplog.records]
    assert "refused; trying again for 0 s. Does the server run (clt serve)?" in waits
    with pytest.raises(ServerError, match="refused"):
        next(ActivationClient("http://127.0.0.1:9", patience=0.3).stream_activations())


def test_patience_counts_from_the_first_failure():
    """Not from the last batch, after which the consumer may have been busy for long."""
    waiting = _Waiting(0.5)
    time.sleep(0.6)
    waiting.after(_Again("cut off"))
    time.sleep(0.6)
    with pytest.raises(ServerError, match="cut off"):
        waiting.after(_Again("cut off"))


def test_two_ranks_train_from_the_server_and_their_run_is_evaluated_again(server, reader, tmp_path):
    """Each rank has its own stream, no row is read twice, and the rows of both are counted."""
    config = tmp_path / "config.yaml"
    config.write_text(to_yaml(reader("clt.d_features=24", "train.steps=20", "train.batch_tokens=60",
        "train.compile=false", "eval.replacement_tokens=0", f"run.dir={tmp_path / 'run'}")))  # fmt: skip
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "train_ddp.py"]
    before, root = ActivationClient(server.url, TOKEN).stats()["rows_drawn"], Path(__file__).parents[2]
    subprocess.run([*command, str(config)], cwd=root, check=True, timeout=240)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    (read,) = summary["rows_by_segment"].values()
    assert 20 * 60 <= read <= ActivationClient(server.url, TOKEN).stats()["rows_drawn"] - before
    state = json.loads((tmp_path / "run" / "checkpoints" / "step_00000020" / "state.json").read_text())
    assert 20 * 60 <= sum(state["rows_by_segment"].values()) <= read
    subprocess.run([sys.executable, "-m", "clt.cli", "eval", str(tmp_path / "run")], cwd=root, check=True, timeout=120)
    again = json.loads((tmp_path / "run" / "report_step_00000020" / "evaluation.json").read_text())
    assert again["fve"] == pytest.approx(summary["fve"], abs=1e-6)


@pytest.mark.timeout(300)
def test_a_run_waits_out_a_server_that_is_killed_and_goes_on_after_a_signal(serve, lm_overrides, tmp_path):
    """Nothing is lost: neither the steps before, nor the count of the rows, which two servers gave to two processes."""
    server, run = serve(), tmp_path / "run"
    keys = [f"data.store={tmp_path / 'here'}", "data.source=server", f"data.url={server.url}", f"run.dir={run}",
            "clt.d_features=24", "train.steps=600", "train.batch_tokens=1000", "train.compile=false", "log.every=10",
            "checkpoint.every=0", "eval.every=0", "eval.replacement_tokens=0"]  # fmt: skip
    (tmp_path / "config.yaml").write_text(to_yaml(load_config(None, [*lm_overrides, *keys])))
    command, root = [sys.executable, "train_ddp.py", str(tmp_path / "config.yaml")], Path(__file__).parents[2]

    def step() -> int:
        lines = (run / "metrics.jsonl").read_text().splitlines() if (run / "metrics.jsonl").exists() else []
        return json.loads(lines[-1])["step"] if lines else 0

    with open(tmp_path / "log", "w") as log:
        training = subprocess.Popen(command, cwd=root, stdout=log, stderr=log)
        try:
            eventually(lambda: step() >= 20, 120)
            server.process.kill()
            server.process.wait()
            eventually(lambda: "; trying again for 600 s." in (tmp_path / "log").read_text())
            stood = step()
            server.start()
            eventually(lambda: step() >= stood + 20)
            training.send_signal(signal.SIGTERM)
            assert training.wait(60) == PREEMPTED, (tmp_path / "log").read_text()
        finally:
            training.kill()
    (checkpoint,) = (run / "checkpoints").iterdir()
    before = json.loads((checkpoint / "state.json").read_text())
    assert stood + 20 <= before["step"] < 600
    assert len(before["rows_by_segment"]) == 1, "the buffer outlives a kill"
    assert sum(before["rows_by_segment"].values()) >= 1000 * before["step"]
    subprocess.run(command, cwd=root, check=True, timeout=120)
    rows = json.loads((run / "summary.json").read_text())["rows_by_segment"]
    assert rows.keys() == before["rows_by_segment"].keys()
    assert sum(rows.values()) >= 1000 * (600 - before["step"]) + sum(before["rows_by_segment"].values())


def test_a_run_trains_from_the_server_and_records_what_it_read(server, train, monkeypatch):
    monkeypatch.setenv("CLT_SERVER_TOKEN", TOKEN)
    by_store, by_server = train(), train("data.source=server", f"data.url={server.url}")
    summary = by_server.summary
    assert summary["server"] == server.url
    assert sum(summary["rows_by_segment"].values()) >= 600
    assert summary["fve"] == pytest.approx(by_store.summary["fve"], abs=0.1)
    assert summary["fve"] != by_store.summary["fve"], "it read the store in the store's order"


def test_a_server_that_was_started_again_with_a_smaller_limit_is_read_on(serve):
    server = serve("server.max_batch=100")
    store, out = ServerStore(ActivationClient(server.url), 1000), torch.empty(400, 2, 3, 16, dtype=torch.float16)
    store.read(np.arange(400), out)
    server.stop()
    server.start("server.max_batch=30")
    while len(store.consumed) == 1:  # the kernel still has megabytes of the first
        store.read(np.arange(400), out)


@pytest.mark.parametrize(
    ("field", "value", "told"),
    [
        ("n_layers", 2, "n_layers: found 3, wanted 2"),
        ("dtype", "bfloat16", "dtype: found 'float16', wanted 'bfloat16'"),  # of the same size in bytes
        ("layers", [5, 6, 7], r"layers: found \[0, 1, 2\], wanted \[5, 6, 7\]"),
    ],
)
def test_rows_of_a_server_that_was_started_again_with_another_config_are_refused(server, field, value, told):
    store = ServerStore(ActivationClient(server.url, TOKEN), 100)
    store.index = dataclasses.replace(store.index, **{field: value})
    with pytest.raises(UserError, match=rf"now serves other rows \({told}\)"):
        store.read(np.arange(5), torch.empty(5, 2, 3, 16, dtype=torch.float16))
    assert not store.consumed


@pytest.mark.parametrize(
    "url", ["ftp://a", "a:1", "http://a:80000", "http://a:80a", "http://[::1", "http://u:hidden@a"]
)
def test_a_url_that_is_none_is_told(url):
    with pytest.raises(UserError, match=r"not of the form http://HOST:PORT|has a user's name or password") as caught:
        ActivationClient(url)
    assert "hidden" not in str(caught.value)


@pytest.mark.parametrize("token", ["secret\nsecret", "secret\u20ac"])
def test_a_token_that_no_header_carries_is_not_repeated(token):
    with pytest.raises(UserError, match="wanted printable ASCII") as caught:
        ActivationClient("http://127.0.0.1:1", token)
    assert "secret" not in str(caught.value)


class _Notebook(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b'{"a": 1}' if self.path == "/index" else b"<html>a notebook</html>")

    def log_message(self, format: str, *args: object) -> None:
        pass


def test_another_kind_of_server_is_told():
    """At once: asking again does not help."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Notebook) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        client = ActivationClient(f"http://127.0.0.1:{server.server_port}", patience=600)
        with pytest.raises(ServerError, match="found b'<html>a notebook</html>' where an activation server answers"):
            client.stats()
        with pytest.raises(ServerError, match="/index is not of this version's activation server"):
            client.index()
        server.shutdown()


class _Replay(http.server.BaseHTTPRequestHandler):
    """A server that gives the rows of a store in order: a batch of 60 to one stream, or half of it to each of two."""

    store: DiscBuffer
    streams = 1
    given = 0
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        path, store = self.path.partition("?")[0], self.store
        shape = Shape(store.index.n_layers, store.index.d_acts, store.index.dtype)
        if path == "/activations/stream":
            own, kind = type(self).given % self.streams, type(self)
            kind.given += 1
            n, per = 60 // self.streams, len(store) // 60
            batch = int(self.path.partition("batch_size=")[2].partition("&")[0])
            assert batch == n, "see max_batch"
            self._head(frame_bytes(n, shape, "replay") << 20)
            with contextlib.suppress(ConnectionError):
                for sequence in itertools.count():
                    rows = np.arange(n) + sequence % per * 60 + own * n
                    columns = {"document": rows, "row": rows, "token": rows, "position": rows}
                    self.wfile.write(b"".join(frame([body_of(store.read(rows), columns)], sequence, shape, "replay")))
            return
        answers = {
            "/index": json.dumps({**dataclasses.asdict(store.index), "rows": 0, "shards": []}).encode(),
            "/stats": json.dumps({"max_batch": 60 // self.streams}).encode(),
            "/statistics": (store.path / "stats.safetensors").read_bytes(),
        }
        self._head(len(answers[path]))
        self.wfile.write(answers[path])

    def _head(self, size: int) -> None:
        self.send_response(200)
        self.send_header("content-length", str(size))
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("processes", "feature_shards"), [(2, 2), (4, 2)])
def test_every_layout_learns_the_same_from_the_same_rows(
    processes, feature_shards, stores, train, train_overrides, tmp_path
):
    """Feature shards, too: one rank of a feature group reads and broadcasts. Against one process reading the same."""

    def run(streams: int, directory: Path, start: Callable[[str, list[str]], object]) -> None:
        handler = type("Replay", (_Replay,), {"store": DiscBuffer(stores / "train"), "streams": streams})
        shutil.copytree(stores / "heldout", directory / "heldout")
        with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            start(f"http://127.0.0.1:{server.server_port}", [f"data.store={directory}", "data.source=server"])
            assert handler.given == streams
            server.shutdown()

    found = []
    run(1, tmp_path / "one", lambda url, keys: found.append(train(*keys, f"data.url={url}")))

    def torchrun(url: str, keys: list[str]) -> None:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        keys += [f"data.url={url}", f"run.dir={tmp_path / 'run'}", f"parallel.feature_shards={feature_shards}"]
        root, env = Path(__file__).parents[2], os.environ | {"OMP_NUM_THREADS": "1"}
        subprocess.run([*command, "train_ddp.py", *train_overrides, *keys], cwd=root, env=env, check=True, timeout=200)

    run(processes // feature_shards, tmp_path / "many", torchrun)
    (path,) = (tmp_path / "run" / "checkpoints").glob("step_*")
    weights = load_file(path / "model.safetensors")
    for name, wanted in found[0].weights.items():
        torch.testing.assert_close(weights[name], wanted, rtol=1e-4, atol=1e-6)
    state = json.loads((path / "state.json").read_text())
    assert state["rows_by_segment"]["replay"] >= 600
