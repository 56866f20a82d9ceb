"""The benchmarks of exactness, at the lengths that a test run has time for."""

import contextlib
import dataclasses
import itertools
import json
import os
import shutil
import socket
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file

from benchmarks import chaos, job, parity, ranks
from clt.data.raw_rows import COLUMNS, raw_rows
from clt.data.store import DiscBuffer
from clt.server.wire import frame, frame_bytes
from clt.train.logger import read_metrics
from tests.server.test_lies import answer, liar


@pytest.fixture(scope="module")
def small_job(tmp_path_factory) -> list[str]:
    """The arguments of `benchmarks.job.small_job`, whose store is extracted once."""
    return job.small_job(tmp_path_factory.mktemp("job"))


@pytest.fixture
def run(small_job, tmp_path, monkeypatch):
    """run(benchmark, *arguments) -> what it wrote; in this process, whose ranks start at once."""

    def call(benchmark: ModuleType, *arguments: str) -> Any:
        monkeypatch.setattr(benchmark, "small_job", lambda _: small_job)
        monkeypatch.setattr(sys, "argv", ["benchmark", "--json", str(tmp_path / "out.json"), *arguments])
        benchmark.main()
        return json.loads((tmp_path / "out.json").read_text())

    return call


@pytest.mark.timeout(600)
def test_layouts_compute_the_same(run):
    """One that splits the batch and the features at once, and one that splits the features alone.

    test_torchrun.py splits the batch alone.
    """
    rows = run(parity, "--layouts", "1x2", "2x2", "--bytes", "1x2")
    assert [row["layout"] for row in rows] == ["1x1", "1x2", "2x2"]
    assert all(row["max_rel_weight"] < 1e-5 for row in rows)
    assert 0 < rows[0]["dead_fraction"] < 1, "the comparison of dead features says something"
    (measured,) = [row for row in rows if "bytes_per_step" in row]
    if measured["bytes_per_step"] is not None:  # without root there is no network namespace to measure in
        assert abs(measured["bytes_per_step"] / measured["bytes_formula"] - 1) < 0.05


RULES = {
    "topk": "clt.activation=topk clt.k=6 clt.window=2 loss.sparsity=0 loss.target_l0=null",
    "batchtopk": "clt.activation=batchtopk clt.k=20 clt.by_norm=true loss.sparsity=0 "
    "loss.target_l0=null loss.aux=0.1 loss.dead_window=254",
    "target_l0": "loss.target_l0=20 loss.sparsity_ramp=0.2 loss.pre_activation=0.01 loss.pre_activation_kind=dead "
    "loss.dead_window=254",
}


@pytest.mark.parametrize(("rule", "layout"), [("topk", "1x2"), ("batchtopk", "2x2"), ("target_l0", "2x1")])
def test_rules_that_look_at_all_features_or_tokens_are_the_same_in_every_layout(run, rule, layout):
    """The k largest are those of all shards, or of the tokens of all ranks; so are dead features and the wanted L0."""
    rows = run(parity, "--layouts", layout, "--bytes", "--set", *RULES[rule].split())
    assert [row["layout"] for row in rows] == ["1x1", layout]
    assert all(max(row["max_rel_loss"], row["max_rel_grad"], row["max_rel_weight"]) < 1e-5 for row in rows)


@pytest.mark.timeout(600)
def test_a_rank_killed_in_a_checkpoint_does_not_change_the_result(run):
    """test_nodes.py kills one between two checkpoints."""
    report = run(chaos, "--kills", "1")
    assert report["kills"] == report["kills_during_checkpoint"] == 1
    assert report["differences"] == report["unreadable_checkpoints"] == 0


def fail_on_rank_one(status: int) -> None:
    if os.environ["RANK"] == "0":
        time.sleep(1000)
    print("what rank 1 says", flush=True)
    sys.exit(status)


def test_a_rank_that_fails_ends_the_others_and_what_it_said_is_shown():
    with pytest.raises(RuntimeError, match=r"the ranks ended with status \[-15, 3\]:\nwhat rank 1 says"):
        ranks.run(fail_on_rank_one, 3, processes=2)


@contextlib.contextmanager
def replay(stores: Path, directory: Path, streams: int) -> Iterator[list[str]]:
    """The keys of a run that gets the rows of a store in order: batches of 60 in one stream, or half in each of two."""
    store, n = DiscBuffer(stores / "train"), 60 // streams
    shape = store.index.shape

    def share(own: int, connection: socket.socket) -> None:
        size = frame_bytes(n, shape, "replay") << 20
        connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\nx-clt-segment: replay\r\n\r\n" % size)
        for sequence in itertools.count():
            rows = np.arange(n) + sequence % (len(store) // 60) * 60 + own * n
            part = raw_rows(store.read(rows), dict.fromkeys(COLUMNS, rows))
            connection.sendall(b"".join(frame([part], sequence, shape, "replay")))

    shutil.copytree(stores / "heldout", directory / "heldout")
    index = json.dumps(dataclasses.asdict(store.index) | {"rows": 0, "shards": []}).encode()
    statistics, stats = (store.path / "stats.safetensors").read_bytes(), b'{"max_batch": %d}' % n
    shares = iter([partial(share, own) for own in range(streams)])
    with liar(stream=shares, index=answer(index), stats=answer(stats), statistics=answer(statistics)) as client:
        yield [f"data.store={directory}", "data.source=server", f"data.url={client.url}"]
    assert next(shares, None) is None, "each was asked for"


@pytest.mark.parametrize(("processes", "feature_shards"), [(4, 2), (4, 4)])
def test_every_layout_learns_the_same_from_a_server(
    processes, feature_shards, stores, train, train_overrides, tmp_path
):
    """Feature shards, too: one rank of a feature group reads and broadcasts. Against one process reading the same."""
    with replay(stores, tmp_path / "one", 1) as keys:
        wanted = train(*keys)
    with replay(stores, tmp_path / "many", processes // feature_shards) as keys:
        keys = [*keys, f"parallel.feature_shards={feature_shards}", f"run.dir={tmp_path / 'run'}"]
        ranks.train(*train_overrides, *keys, "eval.replacement_tokens=0", processes=processes)
    (path,) = (tmp_path / "run" / "checkpoints").glob("step_*")
    weights = load_file(path / "model.safetensors")
    assert parity.difference(weights, wanted.weights) < 1e-5
    losses = [
        [line["train_loss"] for line in lines if "train_loss" in line]
        for lines in (read_metrics(tmp_path / "run"), wanted.metrics)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert len(losses[0]) == 2
    assert json.loads((path / "state.json").read_text())["rows_by_segment"]["replay"] >= 600
