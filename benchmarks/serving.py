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
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import torch

from benchmarks.bad_requests import send_all
from benchmarks.machine import ROOT, where
from clt.arguments import read_config
from clt.data.writer import write_store
from clt.server.client import ActivationClient

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


def make_store(path: Path, rows: int) -> list[str]:
    """Stores of `rows` known rows, and the arguments of the `clt serve` that serves them."""
    words = ["server.source=store", f"server.rows={ROWS}", "server.workers=2", "server.max_streams=80",
             f"data.store={path}", f"data.train_tokens={rows}", "data.heldout_tokens=64", "data.block_rows=64",
             "lm.context=64"]  # fmt: skip
    config = read_config(words)
    for part, n in (("train", rows), ("heldout", 64)):
        document = np.arange(n)
        tensor = torch.from_numpy(expected(document)).view(torch.float16).view(n, 2, L, D)
        columns = {"token": document.astype("i4"), "position": document.astype("i4"), "document": document}
        about = {"model": config.lm.model, "text": {"part": part, **dataclasses.asdict(config.text)}, "context": 64}
        write_store(path / part, tensor, columns=columns, **about)
    return words


class Server:
    """`clt serve` of a checkout, started by a command like nice, and what can be seen of its processes from outside."""

    def __init__(self, words: Sequence[str], log: Path, by: Sequence[str] = (), root: Path = ROOT) -> None:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self.port = probe.getsockname()[1]
        self.log, self.environment = log, os.environ | {"PYTHONPATH": str(root)}
        command = [*by, sys.executable, "-m", "clt.cli", "serve", *words, f"server.port={self.port}"]
        with open(log, "w") as out:
            self.process = subprocess.Popen(command, cwd=root, env=self.environment, stdout=out, stderr=out)
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
        arguments = [self.client.url, str(BATCH), str(count), str(seconds)]
        command = [sys.executable, str(ROOT / "benchmarks/serving_clients.py"), *arguments]
        clients = subprocess.Popen(command, env=self.environment, stdout=subprocess.PIPE, text=True)
        assert clients.stdout is not None
        clients.stdout.readline()
        return clients

    def read(self, clients: int) -> float:
        """GB/s that so many clients read together for two seconds."""
        return float(self.start_clients(clients, 2.0).communicate()[0])


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@contextlib.contextmanager
def bare_server(rows: bytes, congestion: bytes | None = None) -> Iterator[int]:
    """The port of an asyncio server that writes the same rows for ever, by this congestion control or the machine's."""

    async def handle(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        view = memoryview(rows)
        with contextlib.suppress(ConnectionError):
            while True:
                for start in range(0, len(view), 1 << 20):
                    writer.write(view[start : start + (1 << 20)])
                    await writer.drain()

    async def serve(listener: socket.socket) -> None:
        server = await asyncio.start_server(handle, sock=listener)
        await server.serve_forever()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        if congestion is not None:  # connections inherit it
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, congestion)
        process = FORK.Process(target=lambda: asyncio.run(serve(listener)), daemon=True)
        process.start()
        try:
            yield listener.getsockname()[1]
        finally:
            process.kill()


def read_bare(port: int) -> float:
    """GB/s that one client reads from a bare server in a second."""
    memory, total = torch.empty(BATCH * WIDTH * 2, dtype=torch.uint8).numpy().data, 0
    with socket.create_connection(("127.0.0.1", port)) as connection:
        began = time.perf_counter()
        while time.perf_counter() - began < 1:
            total += connection.recv_into(memory[total % len(memory) :])
        return total / (time.perf_counter() - began) / 1e9


def throughput(server: Server, rounds: int, against: Server | None) -> dict[str, float]:
    """Rounds of a bare server, the same with reno as ours, one client, sixteen (`against` another server's, by turns).

    Medians over the rounds, also of the shares within each: a shared machine changes its speed from one to the next.
    """
    rows = expected(np.arange(ROWS)).tobytes()  # as much memory as ours reads: less would stay in the caches
    rates: dict[str, list[float]] = defaultdict(list)
    with bare_server(rows) as loopback, bare_server(rows, b"reno") as reno:
        for _ in range(rounds):
            rates["loopback"].append(read_bare(loopback))
            rates["loopback_reno"].append(read_bare(reno))
            for name, count in (("stream", 1), ("clients16", 16)):
                rates[name].append(server.read(count))
                if against is not None:
                    rates[f"{name}_other"].append(against.read(count))

    def share(name: str, other: str) -> float:
        return statistics.median(ours / theirs for ours, theirs in zip(rates[name], rates[other]))

    result = {f"{name}_gb_per_s": statistics.median(values) for name, values in rates.items()}
    result |= {f"stream_share_of_{name}": share("stream", name) for name in ("loopback", "loopback_reno")}
    result["clients16_share"] = share("clients16", "loopback")
    if against is not None:
        result |= {f"{name}_against": share(name, f"{name}_other") for name in ("stream", "clients16")}
    return result


def memory(server: Server, seconds: float) -> dict[str, float]:
    """Growth of the serving processes' memory while one client streams: last quarter against the second."""
    samples = []
    with server.start_clients(1, seconds) as client:
        while client.poll() is None:
            samples.append(server.rss_mb())
            time.sleep(seconds / 40)
    _, second, _, last = np.array_split(samples, 4)
    return {"rss_growth_mb": float(last.mean() - second.mean())}


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
    records = np.concatenate([np.fromfile(file, np.int64).reshape(-1, 3) for file in files])
    end = time.monotonic() + 60
    while (stats := server.client.stats())["clients"] or stats["fill"] < 0.8:
        assert time.monotonic() < end, f"clients or rows did not come back: {stats}"
        time.sleep(0.1)
    parts = ("valid", "open", "in_flight", "rows_drawn", "rows_dropped", "rows_lost")
    adds_up = stats["rows_generated"] == sum(stats[part] for part in parts) and stats["rows_lost"] == failed == 0
    return {
        "rows_delivered": len(records),
        "rows_twice": len(records) - len(np.unique(records[:, :2], axis=0)),
        "rows_corrupt": int((records[:, 2] == 0).sum()),
        "clients_killed": len(victims),
        "clients_failed": failed,
        "faults_rss_growth_mb": statistics.mean(samples[-5:]) - statistics.mean(samples[5:10]),
        "stats_add_up": int(adds_up and len(records) <= stats["rows_drawn"] - before["rows_drawn"]),
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
    steps = max(20, min(1150, round(1150 * seconds / 600)))
    words = ["configs/quickstart.yaml", f"data.store={directory / 'quickstart'}", f"train.steps={steps}",
             "eval.replacement_tokens=0"]  # fmt: skip
    if seconds < 600:
        words += ["data.train_tokens=25000", "data.heldout_tokens=2000"]
    by = ["nice", "-n", "19"] if seconds >= 600 else []  # a test beside others would leave it no time to start

    def train(name: str, *overrides: str) -> dict[str, Any]:
        command = [sys.executable, "train_ddp.py", *words, *overrides, f"run.dir={directory / name}"]
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        return json.loads((directory / name / "summary.json").read_text())

    by_store = train("by-store")
    with Server([*words, "server.source=store", f"server.rows={ROWS}"], directory / "training.log", by) as server:
        source = ["data.source=server", f"data.url={server.client.url}", f"data.store={directory / 'copy'}"]
        by_server = train("by-server", *source)
    return {
        "training_share_of_store": by_server["tokens_per_second"] / by_store["tokens_per_second"],
        "store_tokens_per_s": by_store["tokens_per_second"],
        "fve_difference": abs(by_server["fve"] - by_store["fve"]),
        "store_fve": by_store["fve"],
        "server_fve": by_server["fve"],
    }


def measure(seconds: float, against: Path | None) -> Iterator[dict[str, float]]:
    """The figures of each part, one after the other, on one server (and one for the training)."""
    with tempfile.TemporaryDirectory(prefix="clt-serving-") as name:
        directory = Path(name)
        words = make_store(directory / "store", 8192)
        with Server(words, directory / "log") as server:
            other = contextlib.nullcontext()
            if against is not None:
                store = str(directory / "other")  # written by that checkout: an index has other fields there
                make = f"from benchmarks.serving import *; make_store(Path({store!r}), 8192)"
                subprocess.run([sys.executable, "-c", make], cwd=against, check=True)
                other = Server([*words, f"data.store={store}"], directory / "other.log", root=against.resolve())
            with other as their_server:
                yield throughput(server, max(1, min(9, round(seconds / 12))), their_server)
            yield faults(server, max(1, seconds / 5), directory)
            yield memory(server, seconds)
            yield bad(server, max(420, min(5000, round(5000 * seconds / 60))))
            died = len(server.workers - server.processes())
            yield {"worker_crashes": died + server.log.read_text().count("Traceback")}
        yield training(seconds, directory)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, help="where to write the figures")
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--against", type=Path, help="a checkout of another commit, to compare the throughput with")
    arguments = parser.parse_args()
    result: dict[str, float] = {}
    for figures in measure(arguments.seconds, arguments.against):
        result |= figures
        print(json.dumps(figures, allow_nan=False), flush=True)
    missed = [name for name, bar in AT_LEAST.items() if name in result and result[name] < bar]
    missed += [name for name, bar in AT_MOST.items() if result[name] > bar]
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps({**where(), **result, "missed": missed}, indent=2, allow_nan=False) + "\n")
    if missed:
        sys.exit(f"below the bar: {', '.join(missed)}")


if __name__ == "__main__":
    main()
