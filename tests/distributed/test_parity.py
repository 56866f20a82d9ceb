"""The benchmarks of exactness, at the lengths that a test run has time for."""

import json
import os
import sys
import time
from types import ModuleType
from typing import Any

import pytest

from benchmarks import chaos, parity, ranks


@pytest.fixture
def run(tmp_path, monkeypatch):
    """run(benchmark, *arguments) -> what it wrote; in this process, whose ranks start at once."""

    def call(benchmark: ModuleType, *arguments: str) -> Any:
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
    "topk": "clt.activation=topk clt.k=6 loss.sparsity=0 loss.target_l0=null",
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
def test_killed_ranks_do_not_change_the_result(run):
    """The first rank is killed at a random moment, the second while a checkpoint is written."""
    report = run(chaos, "--kills", "2")
    assert report["kills"] == 2
    assert report["kills_during_checkpoint"] >= 1
    assert report["differences"] == report["unreadable_checkpoints"] == 0


def fail_on_rank_one(status: int) -> None:
    if os.environ["RANK"] == "0":
        time.sleep(1000)
    print("what rank 1 says", flush=True)
    sys.exit(status)


def test_a_rank_that_fails_ends_the_others_and_what_it_said_is_shown():
    with pytest.raises(RuntimeError, match=r"the ranks ended with status \[-9, 3\]:\nwhat rank 1 says"):
        ranks.run(fail_on_rank_one, 3, processes=2)
