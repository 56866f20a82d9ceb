"""What fills the buffer: the right rows in the right order, whatever dies in between."""

import fcntl
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import pytest
import torch

from clt.config import PRESETS, Config, ServerConfig, load_config
from clt.data.extract import extract
from clt.data.index import read_index
from clt.data.statistics import Statistics
from clt.data.store import DiscBuffer
from clt.errors import UserError
from clt.lm.capture import capture
from clt.lm.load import load_language_model
from clt.lm.text import windows
from clt.parsing import to_yaml
from clt.server.buffer import SharedBuffer
from clt.server.generator import StoredRows, device_for, fill, from_model, from_store
from clt.server.prepare import folder, needs_model, prepare, rows_tag, segment_name, tag
from clt.server.segment import start_time
from clt.server.supervisor import _save_position, ensure
from tests.server.conftest import eventually, known_rows

MakeConfig = Callable[..., Config]
Spawn = Callable[..., BaseProcess]
Keys = list[tuple[bytes, int, int, int]]


def keys(tensor: torch.Tensor, token: np.ndarray, position: np.ndarray, document: np.ndarray) -> Keys:
    """Rows as (bits, token, position, document)."""
    data = tensor.reshape(len(tensor), -1).view(torch.uint8).numpy()
    return list(zip([row.tobytes() for row in data], token.tolist(), position.tolist(), document.tolist()))


def stored_keys(rows: StoredRows) -> list[tuple[bytes, int, int, int]]:
    return keys(rows.store[rows.number], rows.token, rows.position, rows.document)


@pytest.fixture(scope="module")
def text_rows(lm_overrides: list[str]) -> Keys:
    """Every row of one pass over the training text, in order, computed directly."""
    config = load_config(None, lm_overrides)
    lm = load_language_model(config.lm)
    found: Keys = []
    for window in windows(config.text, "train", lm, config.lm.context):
        values = capture(lm, torch.from_numpy(window.tokens).long()[None])[0]
        at = np.flatnonzero(window.keep)
        found += keys(values[torch.from_numpy(window.keep)].half(), window.tokens[at], at, window.documents[at])
    return found


def same_rows(found: Keys, wanted: Keys) -> bool:
    """Equal columns, and equal activations up to the last bits, which depend on the batch that a window is in."""
    if [row[1:] for row in found] != [row[1:] for row in wanted]:
        return False
    a, b = (np.stack([np.frombuffer(row[0], np.float16) for row in rows]).astype("f4") for rows in (found, wanted))
    return np.allclose(a, b, rtol=2e-3, atol=1e-3)


def test_the_model_gives_the_rows_of_the_text_over_and_over(config: MakeConfig, text_rows: Keys) -> None:
    made = config()
    lm, found, marks = load_language_model(made.lm), [], []
    for mark, rows in from_model(made, lm):
        marks.append(mark)
        found += keys(rows.activations, rows.token, rows.position, rows.document)
        if mark[0] == 2:
            break
    once = len(text_rows)
    assert same_rows(found[:once], text_rows)
    assert found[once : 2 * once] == found[:once]
    assert [windows for epoch, windows in marks if epoch == 0] == [windows for epoch, windows in marks if epoch == 1]
    # From the middle, and from the end, where the next pass begins.
    mark, rows = next(from_model(made, lm, *marks[3]))
    assert mark == marks[3]
    before = sum(len(rows) for _, rows in islice(from_model(made, lm), 3))
    assert same_rows(
        keys(rows.activations, rows.token, rows.position, rows.document), text_rows[before : before + len(rows)]
    )
    assert next(from_model(made, lm, 0, 10_000))[0] == (1, 0)


def test_the_store_gives_each_row_once_an_epoch_in_changing_order(config: MakeConfig, stores: Path) -> None:
    made = config(f"data.store={stores}", "data.block_rows=7")
    store = DiscBuffer(stores / "train")
    batches = list(islice(from_store(made), 3))
    orders = [stored_keys(rows) for _, rows in batches]
    assert [mark for mark, _ in batches] == [(0, 0), (1, 1), (2, 2)]
    everything = slice(None)
    wanted = keys(store[:], store.tokens(everything), store.positions(everything), store.documents(everything))
    assert sorted(orders[0]) == sorted(orders[1]) == sorted(wanted)
    assert orders[0] != orders[1]
    mark, rows = next(from_store(made, 2, 2))
    assert (mark, stored_keys(rows)) == ((2, 2), orders[2])


def test_filling_goes_on_at_the_mark(buffer: SharedBuffer) -> None:
    batches = [((0, i), known_rows(10, 10 * i)) for i in range(6)]
    buffer.put(batches[0][1], (0, 0, 0))
    buffer.put(batches[1][1][:4], (0, 1, 0))  # and then the generator died
    assert buffer.mark == (0, 1, 4)
    fill(buffer, iter(batches[buffer.mark[1] :]))
    batch = buffer.draw(60)
    assert batch is not None
    np.testing.assert_array_equal(batch.document[np.argsort(batch.row)], np.arange(60))
    assert buffer.mark == (0, 5, 10)
    assert buffer.generator()["state"] == "running"


@pytest.mark.parametrize(
    ("device", "filled", "current", "gpu", "wanted"),
    [
        ("cpu", 0.0, "cpu", True, "cpu"),
        ("gpu", 1.0, "cpu", True, "cuda"),
        ("auto-low", 0.29, "cpu", True, "cuda"),
        ("auto-low", 0.31, "cpu", True, "cpu"),
        ("auto-low", 0.99, "cuda", True, "cuda"),
        ("auto-low", 1.0, "cuda", True, "cpu"),
        ("auto-low", 0.0, "cpu", False, "cpu"),
    ],
)
def test_device_policy(device: str, filled: float, current: str, gpu: bool, wanted: str) -> None:
    config = ServerConfig(device=device, low=0.3)  # type: ignore[arg-type]
    assert device_for(config, filled, current, gpu) == wanted


def test_statistics_are_those_of_the_first_rows_of_the_text(config: MakeConfig, text_rows: Keys) -> None:
    made = config("server.statistics_tokens=300")
    assert needs_model(made)
    index = prepare(made)
    assert (index.text["part"], index.rows, index.n_layers, index.d_acts) == ("train", 0, 3, 16)
    assert read_index(folder(made)) == index
    assert read_index(Path(made.data.store) / "heldout").rows == 150
    found = Statistics.load(folder(made) / "stats.safetensors")
    wide = np.stack([np.frombuffer(row[0], np.float16) for row in text_rows[:300]]).reshape(300, 2, 3, 16).astype("f8")
    assert found.rows == 300
    np.testing.assert_allclose(found.input_mean.numpy(), wide[:, 0].mean(0), rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(found.target_sd.numpy(), wide[:, 1].std(0), rtol=1e-3, atol=1e-4)
    # They are kept, until something else is asked for.
    assert not needs_model(made)
    file = folder(made) / "stats.safetensors"
    before = file.stat().st_mtime_ns
    assert prepare(made) == index
    assert file.stat().st_mtime_ns == before
    other = config("server.statistics_tokens=200")
    assert needs_model(other)
    prepare(other)
    assert Statistics.load(file).rows == 200
    more = config("server.statistics_tokens=1000000")
    prepare(more)
    assert Statistics.load(file).rows == len(text_rows)
    assert not needs_model(more), "there are no more rows"


def test_what_is_missing_or_of_another_config_is_said(config: MakeConfig, stores: Path) -> None:
    with pytest.raises(UserError, match=r"lm\.context: found 16, wanted 12"):
        prepare(config(f"data.store={stores}", "lm.context=12"))
    made = config("server.source=store")
    extract(made, "heldout", progress=False)
    assert not needs_model(made)
    with pytest.raises(UserError, match="train does not exist; run `clt extract CONFIG`"):
        prepare(made)
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match=r"server\.device=gpu but no CUDA device"):
            prepare(config("server.device=gpu"))


def test_too_little_memory_is_said_before_the_language_model_works(config: MakeConfig) -> None:
    made = config("server.source=model", "server.rows=2000000000")
    with pytest.raises(UserError, match=r"the shared buffer needs .* GB but"):
        prepare(made)
    assert not Path(made.data.store).exists()


def test_presets_and_their_mistakes(tmp_path: Path) -> None:
    sizes = [load_config(None, [], preset).server.rows for preset in PRESETS]
    assert list(PRESETS) == ["test", "production", "large-scale"]
    assert sizes == sorted(sizes)
    (tmp_path / "mine.yaml").write_text("server: {rows: 77}\nlm: {context: 99}\n")
    (tmp_path / "base.yaml").write_text("server: {rows: 1, workers: 3}\n")
    made = load_config(tmp_path / "base.yaml", ["lm.context=98"], tmp_path / "mine.yaml")
    assert (made.server.rows, made.server.workers, made.lm.context) == (77, 3, 98)
    with pytest.raises(UserError, match=r"larg is neither a preset \(test, production, large-scale\) nor an existing"):
        load_config(None, [], "larg")
    for text, message in {
        "min_fill=1.5": "wanted a share of the buffer between 0 and 1",
        "name=a/b": "wanted letters, digits, dots and dashes",
        "port=0": "wanted a port number",
        "device=tpu": "wanted cpu or gpu or auto-low",
    }.items():
        with pytest.raises(UserError, match=message):
            load_config(None, [f"server.{text}"])


# The supervisor


@contextmanager
def served(config: Config) -> Iterator[SharedBuffer]:
    """The joined buffer of a config; on leaving, waits until its supervisor has ended and nothing is left."""
    buffer = ensure(config)
    file, owner = buffer._segment.path, buffer._segment.owner
    try:
        yield buffer
    finally:
        buffer.close()
        eventually(lambda: start_time(owner) is None)
        assert not file.exists()


def take(buffer: SharedBuffer, seen: dict[int, tuple[bytes, int, int, int]]) -> int:
    """Add up to 20 rows to what was seen, by serial number; returns how many that are now."""
    batch = buffer.draw(max(min(20, buffer.stats()["valid"]), 1))
    if batch is not None:
        rows = keys(batch.activations, batch.token, batch.position, batch.document)
        seen.update(zip(batch.row.tolist(), rows))
    return len(seen)


def test_a_killed_generator_is_reported_at_once_and_goes_on_where_the_text_was(
    config: MakeConfig, text_rows: Keys
) -> None:
    made = config("server.rows=150", "server.min_fill=0", "server.device=cpu", "server.statistics_tokens=100")
    seen: dict[int, tuple[bytes, int, int, int]] = {}
    prepare(made)
    with served(made) as buffer:
        eventually(lambda: take(buffer, seen) > len(text_rows) // 2)
        pid = buffer.generator()["pid"]
        os.kill(pid, signal.SIGKILL)
        start = time.monotonic()
        eventually(lambda: buffer.generator()["state"] == "failed")
        assert time.monotonic() - start < 2  # milliseconds on a machine that does nothing else
        assert "the generator was killed by SIGKILL" in buffer.generator()["cause"]
        eventually(lambda: buffer.generator()["state"] == "running")
        assert buffer.generator()["pid"] != pid
        assert buffer.generator()["restarts"] == 1
        eventually(lambda: take(buffer, seen) > len(text_rows) * 1.3)
        assert buffer.stats()["epoch"] == 1
        # Then take all there is, so that no row in the middle is missing; a new generator takes longer to come.
        os.kill(buffer.generator()["pid"], signal.SIGKILL)
        while buffer.stats()["valid"]:
            take(buffer, seen)
    found = [seen[row] for row in sorted(seen)]
    assert same_rows(found, (text_rows * 3)[: len(found)])


def store_config(config: MakeConfig, stores: Path, tmp_path: Path, *overrides: str) -> Config:
    """A server from copies of the stores: it starts quickly, as no language model is loaded."""
    import shutil

    if not (tmp_path / "stores").exists():
        shutil.copytree(stores, tmp_path / "stores", ignore=shutil.ignore_patterns("server"))
    return config("server.source=store", "server.rows=200", "server.min_fill=0.5", *overrides)


def test_a_failing_generator_says_why_and_recovers(config: MakeConfig, stores: Path, tmp_path: Path) -> None:
    made = store_config(config, stores, tmp_path)
    shard = next((tmp_path / "stores" / "train").glob("shard_*.h5"))
    with served(made) as buffer:
        eventually(lambda: buffer.stats()["valid"] == 200)
        assert buffer.stats()["min_fill"] == 100
        shard.rename(tmp_path / "away")
        os.kill(buffer.generator()["pid"], signal.SIGKILL)
        eventually(lambda: f"shard {shard} is missing" in buffer.generator()["cause"])
        assert buffer.generator()["state"] == "failed"
        assert buffer.draw(10) is not None  # what is there is still served
        (tmp_path / "away").rename(shard)
        eventually(lambda: buffer.generator()["state"] == "running")
        assert buffer.generator()["cause"] == ""
        eventually(lambda: buffer.stats()["valid"] == 200)  # the drawn rows are replaced
        with pytest.raises(UserError, match="a server with other settings runs on the buffer"):
            ensure(store_config(config, stores, tmp_path, "server.rows=201"))
    # The place in the order was recorded; another server goes on behind it, also with a buffer of another size.
    seen: dict[int, tuple[bytes, int, int, int]] = {}
    with served(store_config(config, stores, tmp_path, "server.rows=220")) as buffer:
        position = json.loads((tmp_path / "stores" / "server" / "position.json").read_text())
        assert position["rows"] == rows_tag(made)
        assert position["mark"] == [0, 0, 210]
        eventually(lambda: take(buffer, seen) >= 100)
    rows = next(from_store(made))[1]
    order = stored_keys(rows)[210:]
    assert all(seen[row] == order[row] for row in seen)


def test_a_server_that_was_just_stopped_is_in_nobodys_way(config: MakeConfig, stores: Path, tmp_path: Path) -> None:
    """Its supervisor takes a moment to end."""
    ensure(store_config(config, stores, tmp_path)).close()
    with served(store_config(config, stores, tmp_path, "server.rows=201")) as buffer:
        assert buffer.rows == 201


def _ensure_and_hang(config: Config, out: Connection) -> None:
    out.send(ensure(config).segment)
    time.sleep(600)


def test_workers_share_one_supervisor_which_outlives_the_first_and_not_the_last(
    config: MakeConfig, stores: Path, tmp_path: Path, spawn: Spawn
) -> None:
    made = store_config(config, stores, tmp_path, f"server.name=test-{os.getpid()}")
    pipes = [multiprocessing.Pipe(duplex=False) for _ in range(3)]
    workers = [spawn(_ensure_and_hang, made, out) for _, out in pipes]
    segments = {into.recv() for into, _ in pipes}
    assert len(segments) == 1
    watcher = SharedBuffer.attach(segment_name(made))
    assert watcher._segment.path.name == f"clt-test-{os.getpid()}"
    eventually(lambda: watcher.generator()["state"] == "running")
    generator = watcher.generator()["pid"]
    for worker in workers[:2]:
        os.kill(worker.pid or 0, signal.SIGKILL)
        worker.join()
    time.sleep(0.5)
    assert watcher.alive
    assert watcher.stats()["workers"] == 1
    os.kill(workers[2].pid or 0, signal.SIGKILL)
    workers[2].join()
    eventually(lambda: not watcher.alive)
    assert not watcher._segment.path.exists()
    assert start_time(generator) is None
    watcher.close()


def test_the_next_takes_over_from_a_worker_that_was_killed_while_it_started_the_server(
    config: MakeConfig, spawn: Spawn
) -> None:
    """Nobody works on for the dead, and only one process at a time extracts: two would write the same shards."""
    made = config("server.rows=150", "server.statistics_tokens=100")
    into, out = multiprocessing.Pipe(duplex=False)
    worker, own = spawn(_ensure_and_hang, made, out), Path(made.data.store) / "server"
    eventually(lambda: (own / "config.yaml").exists())
    os.kill(worker.pid or 0, signal.SIGKILL)
    eventually(lambda: _is_free(own / "lock"))
    assert not (Path(made.data.store) / "heldout" / "index.json").exists(), "it was stopped too late"
    assert not into.poll()
    with served(made) as buffer:
        assert buffer.stats()["workers"] == 1


@pytest.mark.parametrize(
    ("by", "number", "status"),
    [
        ("clt serve", signal.SIGTERM, 0),
        ("clt serve", signal.SIGINT, 130),
        ("uvicorn", signal.SIGINT, -signal.SIGINT),
        ("uvicorn --workers 2", signal.SIGKILL, -signal.SIGKILL),
    ],
)
def test_a_server_that_is_stopped_while_it_prepares_leaves_nobody_at_work(
    config: MakeConfig, tmp_path: Path, by: str, number: int, status: int
) -> None:
    made = config("server.rows=150", "server.statistics_tokens=100")
    (tmp_path / "c.yaml").write_text(to_yaml(made))
    command = ["clt.cli", "serve", str(tmp_path / "c.yaml")]
    if by != "clt serve":
        command = ["uvicorn", "clt.server.app:app", "--port", "0", *by.split()[1:]]
    environment = os.environ | {"CLT_CONFIG": str(tmp_path / "c.yaml")}
    process = subprocess.Popen([sys.executable, "-m", *command], env=environment, stderr=subprocess.PIPE, text=True)
    own = Path(made.data.store) / "server"
    eventually(lambda: (own / "config.yaml").exists())
    time.sleep(1)
    process.send_signal(number)
    _, told = process.communicate(timeout=60)  # ends when nobody has its stderr any more
    assert process.returncode == status
    assert "Traceback" not in told
    assert _is_free(own / "lock")
    assert not (Path(made.data.store) / "heldout" / "index.json").exists(), "it was stopped too late"


def _is_free(lock: Path) -> bool:
    with open(lock) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True


def test_a_killed_supervisor_leaves_nothing_and_is_replaced(config: MakeConfig, stores: Path, tmp_path: Path) -> None:
    made = store_config(config, stores, tmp_path)
    old = ensure(made)
    eventually(lambda: old.generator()["state"] == "running")
    generator = old.generator()["pid"]
    os.kill(old._segment.owner, signal.SIGKILL)
    eventually(lambda: not old.alive)
    assert old.generator()["state"] == "failed"
    assert "the supervisor" in old.generator()["cause"]
    eventually(lambda: start_time(generator) is None)
    eventually(lambda: not old._segment.path.exists())
    with served(made) as new:
        assert new.segment != old.segment
        eventually(lambda: new.draw(1) is not None)
        old.close()
        assert new._segment.path.exists()


def test_mistakes_reach_the_one_who_asked(config: MakeConfig, stores: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"the shared buffer needs .* GB but .*lower server\.rows"):
        ensure(store_config(config, stores, tmp_path, "server.rows=1_000_000_000"))
    assert not Path(f"/dev/shm/clt-{segment_name(config())}").exists()
    with pytest.raises(UserError, match=r"the shared buffer needs .* GB but .*lower server\.rows"):
        ensure(config(f"data.store={tmp_path / 'fresh'}", "server.rows=1_000_000_000"))
    assert not (tmp_path / "fresh" / "heldout").exists(), "it was told before the language model ran for hours"


def test_a_damaged_place_in_the_text_is_told_before_memory_is_taken(
    config: MakeConfig, stores: Path, tmp_path: Path
) -> None:
    made = store_config(config, stores, tmp_path)
    file = Path(made.data.store) / "server" / "position.json"
    file.parent.mkdir()
    file.write_text("{")
    with pytest.raises(UserError, match=r"position\.json, the place in the text, is damaged .*; delete it to begin"):
        ensure(made)
    assert not Path(f"/dev/shm/clt-{segment_name(made)}").exists()


def test_settings_that_do_not_change_the_rows_may_differ(config: MakeConfig, tmp_path: Path) -> None:
    """Of two servers on one buffer, or of a server and the one before it."""
    (tmp_path / "link").symlink_to(tmp_path)
    made = config(f"data.store={tmp_path}/store")
    for same in (f"data.store={tmp_path}/link/../{tmp_path.name}/store", "data.prefetch=9", "server.max_batch=7"):
        other = config(f"data.store={tmp_path}/store", same)
        assert (tag(made), rows_tag(made)) == (tag(other), rows_tag(other)), same
    for other in ("data.store=/elsewhere", "server.rows=9"):
        assert tag(made) != tag(config(f"data.store={tmp_path}/store", other)), other
    for other in ("data.dtype=bfloat16", "text.source=moby.txt", "lm.context=7", "run.seed=3", "server.source=store"):
        assert rows_tag(made) != rows_tag(config(f"data.store={tmp_path}/store", other)), other


def test_a_disk_that_is_full_or_gone_does_not_end_the_server(
    config: MakeConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    buffer = SharedBuffer.create(f"test-{os.getpid()}-position", 4, 1, 2, "float32", 0)
    try:
        _save_position(config(f"data.store={tmp_path / 'file' / 'store'}"), buffer)
    finally:
        buffer.unlink()
        buffer.close()
    assert "the place in the text was not recorded: " in capsys.readouterr().err
