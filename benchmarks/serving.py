"""The activation server under load: throughput, training from it, killed clients, bad requests. Exits 1 below a bar.

    python benchmarks/serving.py --json benchmarks/results/serving.json [--seconds 600] [--against CHECKOUT]

Servers are `clt serve` with two uvicorn workers. The rows are of GPT-2 small's size, (2, 12, 768) float16 or 36,864
bytes, from a store in which every row can be recomputed from its document number; the generator refills the buffer all
the while. --seconds is how long the memory is watched; the other parts take their share (killed clients: a fifth).
--against measures the throughput of another checkout's server and client, too, by turns with this one's.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import json
import multiprocessing
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402
import yaml  # noqa: E402

from benchmarks.bad_requests import send_all  # noqa: E402
from benchmarks.machine import where  # noqa: E402
from clt.config import Config, load_config  # noqa: E402
from clt.data.writer import write_store  # noqa: E402
from clt.server.client import ActivationClient  # noqa: E402

L, D, BATCH, ROWS = 12, 768, 256, 16384
WIDTH = 2 * L * D
FORK = multiprocessing.get_context("fork")
AT_LEAST = {"stream_share_of_loopback": 0.6, "clients16_share": 0.6, "stream_against": 0.9, "clients16_against": 0.9,
            "training_share_of_store": 0.9, "stats_add_up": 1}  # fmt: skip
AT_MOST = {"fve_difference": 0.01, "rows_twice": 0, "rows_corrupt": 0, "worker_crashes": 0, "server_errors": 0,
           "hangs": 0, "clients_failed": 0, "faults_rss_growth_mb": 32, "rss_growth_mb": 16}  # fmt: skip


def expected(document: np.ndarray) -> np.ndarray:
    """The bits (n, WIDTH) int16 of the rows with these document numbers: finite float16 that no two rows share."""
    bits = document.astype(np.uint16)[:, None] * np.uint16(7919) + np.arange(WIDTH, dtype=np.uint16)  # modulo 2^16
    return (bits & np.uint16(0x3BFF)).view(np.int16)


def make_store(path: Path, rows: int) -> Config:
    """Stores of `rows` known rows, and the config that serves them."""
    keys = ["server.source=store", f"server.rows={ROWS}", "server.workers=2", "server.max_streams=80",
            f"data.store={path}", f"data.train_tokens={rows}", "data.heldout_tokens=64", "lm.context=64"]  # fmt: skip
    config = load_config(None, keys)
    for part, n in (("train", rows), ("heldout", 64)):
        document = np.arange(n)
        tensor = torch.from_numpy(expected(document)).view(torch.float16).view(n, 2, L, D)
        columns = {"token": document.astype("i4"), "position": document.astype("i4"), "document": document}
        text = {"part": part, **dataclasses.asdict(config.text)}
        write_store(path / part, tensor, columns=columns, model=config.lm.model, text=text, context=64)
    return config


class Server:
    """`clt serve` of a checkout, started by a command like nice, and what can be seen of its processes from outside."""

    def __init__(self, config: Config, directory: Path, by: Sequence[str] = (), root: Path = ROOT) -> None:
        tree = dataclasses.asdict(config)
        if root != ROOT:  # an older checkout knows other fields, and gets those that it has
            wanted = {"data": ("store", "train_tokens", "heldout_tokens"), "lm": ("context",),
                      "server": ("source", "rows", "workers", "max_streams", "name")}  # fmt: skip
            tree = {section: {name: tree[section][name] for name in names} for section, names in wanted.items()}
        (directory / "config.yaml").write_text(yaml.safe_dump(tree))
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self.port = probe.getsockname()[1]
        self.root, self.log = root, directory / "log"
        self.environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
        command = [*by, sys.executable, "-m", "clt.cli", "serve", str(directory / "config.yaml")]
        command.append(f"server.port={self.port}")
        with open(self.log, "w") as log:
            environment = os.environ | {"PYTHONPATH": str(root)}
            self.process = subprocess.Popen(command, cwd=root, env=environment, stdout=log, stderr=log)
        self.client = ActivationClient(f"http://127.0.0.1:{self.port}", patience=120)

    def __enter__(self) -> Server:
        try:
            while self.client.stats()["fill"] < 1:
                time.sleep(0.1)
        except Exception:
            print(self.log.read_text(), file=sys.stderr)
            self.process.kill()
            raise
        self.workers = self.processes()
        return self

    def __exit__(self, *_: object) -> None:
        self.process.send_signal(signal.SIGINT)
        self.process.wait(60)

    def processes(self) -> set[int]:
        """The pids of the serving processes."""
        children = _children(self.process.pid)
        return {pid for pid in children if b"resource_tracker" not in Path(f"/proc/{pid}/cmdline").read_bytes()}

    def rss_mb(self) -> float:
        """Memory of its own that the server has, generator included, without the shared buffer."""
        pids = [self.process.pid]
        for pid in pids:
            pids += _children(pid)
        status = [Path(f"/proc/{pid}/status").read_text() for pid in pids]
        return sum(int(text.split("RssAnon:")[1].split()[0]) for text in status) / 1024

    def start_clients(self, count: int, seconds: float) -> subprocess.Popen[str]:
        """So many clients, of the server's own checkout, that have begun to read, for some seconds from soon on."""
        command = [sys.executable, "-c", READ, self.client.url, str(BATCH), str(count), str(seconds)]
        clients = subprocess.Popen(command, cwd=self.root, env=self.environment, stdout=subprocess.PIPE, text=True)
        assert clients.stdout is not None
        clients.stdout.readline()
        return clients


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def bare_server(listener: socket.socket, rows: bytes, congestion: str | None) -> None:
    """An asyncio server that writes the same rows again and again, by this congestion control or the machine's own."""

    async def handle(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if congestion is not None:
            connection = writer.get_extra_info("socket")
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, congestion.encode())
        view = memoryview(rows)
        with contextlib.suppress(ConnectionError):
            while True:
                for start in range(0, len(view), 1 << 20):
                    writer.write(view[start : start + (1 << 20)])
                    await writer.drain()

    async def main() -> None:
        server = await asyncio.start_server(handle, sock=listener)
        await server.serve_forever()

    asyncio.run(main())


def read_bare(port: int, size: int, seconds: float = 1.0) -> float:
    """GB/s that one client reads from a bare server."""
    memory, total = torch.empty(size, dtype=torch.uint8).numpy().data, 0
    with socket.create_connection(("127.0.0.1", port)) as connection:
        began = time.perf_counter()
        while time.perf_counter() - began < seconds:
            total += connection.recv_into(memory[total % size :])
        return total / (time.perf_counter() - began) / 1e9


READ = """
import multiprocessing, sys, time
from clt.server.client import ActivationClient

url, size, count, seconds = sys.argv[1], *map(float, sys.argv[2:])
fork = multiprocessing.get_context("fork")  # one process imports torch for all of them
ready = fork.Barrier(int(count) + 1, timeout=300)

def read(_):
    batches = ActivationClient(url, patience=300).stream_activations(int(size))
    next(batches)
    ready.wait()
    begin, total = time.monotonic() + 0.5, 0
    for batch in batches:
        now = time.monotonic()
        if now > begin + seconds:
            return total
        total += batch.activations.nbytes if now > begin else 0

with fork.Pool(int(count)) as pool:
    totals = pool.map_async(read, range(int(count)), chunksize=1)
    ready.wait()
    print("ready", flush=True)
    print(sum(totals.get()) / seconds / 1e9)
"""
"""Clients that verify checksums, each a process; prints the GB/s that they read together."""


def read_streams(server: Server, count: int, seconds: float = 2.0) -> float:
    """GB/s that so many clients read together for some seconds."""
    return float(server.start_clients(count, seconds).communicate()[0])


def throughput(server: Server, rounds: int, against: Server | None) -> dict[str, float]:
    """Rounds of a bare server, the same with reno as ours, one client, sixteen (`against` another server's, by turns).

    Medians over the rounds. A share is the median of its shares within the rounds: a shared machine changes its speed
    from one to the next.
    """
    rows = expected(np.arange(ROWS)).tobytes()  # as much memory as ours reads: less would stay in the caches
    bare = {name: _start_bare(rows, control) for name, control in (("loopback", None), ("loopback_reno", "reno"))}
    rates: dict[str, list[float]] = defaultdict(list)
    for _ in range(rounds):
        for name, (_, port) in bare.items():
            rates[name].append(read_bare(port, BATCH * WIDTH * 2))
        for name, count in (("stream", 1), ("clients16", 16)):
            rates[name].append(read_streams(server, count))
            if against is not None:
                rates[f"{name}_other"].append(read_streams(against, count))
    for process, _ in bare.values():
        process.kill()

    def share(name: str, other: str) -> float:
        return statistics.median(ours / theirs for ours, theirs in zip(rates[name], rates[other]))

    result = {f"{name}_gb_per_s": statistics.median(values) for name, values in rates.items()}
    result |= {f"stream_share_of_{name}": share("stream", name) for name in bare}
    result["clients16_share"] = share("clients16", "loopback")
    if against is not None:
        result |= {f"{name}_against": share(name, f"{name}_other") for name in ("stream", "clients16")}
    return result


def _start_bare(rows: bytes, congestion: str | None) -> tuple[BaseProcess, int]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        process = FORK.Process(target=bare_server, args=(listener, rows, congestion), daemon=True)
        process.start()
        return process, listener.getsockname()[1]


def memory(server: Server, seconds: float) -> dict[str, float]:
    """Growth of the serving processes' memory while one client streams: last quarter against the second."""
    client = server.start_clients(1, seconds)
    samples = []
    while client.poll() is None:
        samples.append(server.rss_mb())
        time.sleep(seconds / 40)
    client.communicate()
    quarter = len(samples) // 4
    return {"rss_growth_mb": statistics.mean(samples[-quarter:]) - statistics.mean(samples[quarter : 2 * quarter])}


def take_rows(url: str, file: Path, ended: Any) -> None:
    """A client of the fault test: appends (segment, row, intact) of every batch that it has received whole.

    Has no patience, as nobody kills the server: a damaged frame, an answer cut off or a refusal is a failure.
    """
    dice = random.Random(os.getpid())
    client = ActivationClient(url, patience=0)
    with open(file, "ab", buffering=0) as out:
        while not ended.value:
            for batch in client.stream_activations(dice.choice([16, 64, 100]), dice.randrange(1, 20)):
                rows = batch.activations.view(torch.int16).view(-1, WIDTH).numpy()
                intact = (rows == expected(batch.document)).all(1)
                record = np.stack([np.full(len(rows), int(batch.segment, 16) >> 1), batch.row, intact], 1)
                out.write(record.astype(np.int64).tobytes())
                if ended.value:
                    break


def faults(server: Server, seconds: float, directory: Path) -> dict[str, float]:
    """64 clients at once; when each has read a batch, a third of them are killed over `seconds`, replaced by none."""
    files, before = [directory / f"client{i}" for i in range(64)], server.client.stats()
    ended = FORK.RawValue("b", 0)  # without a lock, which a killed client could hold
    clients = [FORK.Process(target=take_rows, args=(server.client.url, file, ended)) for file in files]
    for client in clients:
        client.start()
    end = time.monotonic() + 120
    while not all(file.exists() and file.stat().st_size for file in files):
        assert time.monotonic() < end, "a client read no batch within 120 s"
        time.sleep(0.1)
    samples, victims = [], random.Random(0).sample(clients, 21)
    for victim in victims:
        time.sleep(seconds * 0.9 / len(victims))
        victim.kill()
        samples.append(server.rss_mb())
    ended.value = 1
    for client in clients:
        client.join(120)
    failed = sum(client.exitcode != 0 for client in clients if client not in victims)
    records = np.concatenate([np.fromfile(file, np.int64).reshape(-1, 3) for file in files if file.exists()])
    end = time.monotonic() + 60
    while (stats := server.client.stats())["clients"] or stats["fill"] < 0.8:
        assert time.monotonic() < end, f"clients or rows did not come back: {stats}"
        time.sleep(0.1)
    drawn = stats["rows_drawn"] - before["rows_drawn"]
    parts = ("valid", "open", "in_flight", "rows_drawn", "rows_dropped", "rows_lost")
    whole = stats["rows_generated"] == sum(stats[part] for part in parts)
    adds_up = whole and stats["rows_lost"] == 0 and len(records) <= drawn
    return {
        "rows_delivered": len(records),
        "rows_twice": len(records) - len(np.unique(records[:, :2], axis=0)),
        "rows_corrupt": int((records[:, 2] == 0).sum()),
        "clients_killed": len(victims),
        "clients_failed": failed,
        "faults_rss_growth_mb": statistics.mean(samples[-5:]) - statistics.mean(samples[5:10]),
        "stats_add_up": int(adds_up and failed == 0),
    }


def bad(server: Server, count: int) -> dict[str, float]:
    """`count` generated bad requests, and whether the server still serves."""
    verdicts = send_all(server.port, count)
    next(server.client.stream_activations(10))
    total, closed, hangs = verdicts.total(), verdicts["closed"], verdicts["hang"]
    errors = total - closed - hangs - verdicts["fine"]
    if errors:
        print(dict(verdicts), file=sys.stderr)
    return {"bad_requests": total, "closed_unanswered": closed, "hangs": hangs, "server_errors": errors}


def training(seconds: float, directory: Path) -> dict[str, float]:
    """The quickstart trained from a store and from a server of the same text: tokens/s and held-out FVE.

    The server gives way to the training, as the README has it for one machine.
    """
    common = [f"data.store={directory / 'quickstart'}", "eval.replacement_tokens=0"]
    if seconds < 600:
        common += ["data.train_tokens=25000", "data.heldout_tokens=2000", "train.compile=false"]

    def train(*overrides: str) -> dict[str, Any]:
        run, steps = Path(tempfile.mkdtemp(dir=directory)), max(20, min(1150, round(1150 * seconds / 600)))
        command = [sys.executable, "train_ddp.py", "configs/quickstart.yaml", *common, *overrides]
        command += [f"train.steps={steps}", f"run.dir={run}"]
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        return json.loads((run / "summary.json").read_text())

    by_store = train()
    served = load_config(ROOT / "configs/quickstart.yaml", [*common, "server.source=store", f"server.rows={ROWS}"])
    by = ["nice", "-n", "19"] if seconds >= 600 else []  # a test beside others would leave it no time to start
    with Server(served, Path(tempfile.mkdtemp(dir=directory)), by=by) as server:
        by_server = train("data.source=server", f"data.url={server.client.url}", f"data.store={directory / 'copy'}")
    return {
        "training_share_of_store": by_server["tokens_per_second"] / by_store["tokens_per_second"],
        "store_tokens_per_s": by_store["tokens_per_second"],
        "fve_difference": abs(by_server["fve"] - by_store["fve"]),
        "store_fve": by_store["fve"],
        "server_fve": by_server["fve"],
    }


def measure(seconds: float, against: Path | None) -> dict[str, float]:
    """Everything, one after the other, on one server (and one for the training)."""
    result: dict[str, float] = {}

    def add(found: dict[str, float]) -> None:
        result.update(found)
        print(json.dumps(result, allow_nan=False), file=sys.stderr, flush=True)

    with tempfile.TemporaryDirectory(prefix="clt-serving-") as name:
        directory = Path(name)
        config = make_store(directory / "store", 8192)
        with Server(config, directory) as server:
            with contextlib.ExitStack() as stack:
                other = None
                if against is not None:
                    (directory / "other").mkdir()
                    store = str(directory / "other/store")  # written by that checkout: an index has other fields there
                    make = f"from benchmarks.serving import *; make_store(Path({store!r}), 8192)"
                    subprocess.run([sys.executable, "-c", make], cwd=against, check=True)
                    theirs = dataclasses.replace(config, data=dataclasses.replace(config.data, store=store))
                    other = stack.enter_context(Server(theirs, directory / "other", root=against.resolve()))
                add(throughput(server, max(1, min(9, round(seconds / 12))), other))
            add(faults(server, max(1, seconds / 5), directory))
            add(memory(server, seconds))
            add(bad(server, max(420, min(5000, round(5000 * seconds / 60)))))
            died = len(server.workers - server.processes())
            add({"worker_crashes": died + server.log.read_text().count("Traceback")})
        add(training(seconds, directory))
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, help="where to write the figures")
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--against", type=Path, help="a checkout of another commit, to compare the throughput with")
    arguments = parser.parse_args()
    result = measure(arguments.seconds, arguments.against)
    missed = [name for name, bar in AT_LEAST.items() if name in result and result[name] < bar]
    missed += [name for name, bar in AT_MOST.items() if result[name] > bar]
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps({**where(), **result, "missed": missed}, indent=2, allow_nan=False) + "\n")
    print(json.dumps(result, indent=2, allow_nan=False))
    if missed:
        print(f"below the bar: {', '.join(missed)}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
