"""The benchmarks of exactness, at the lengths that a test run has time for."""

import json
import os
import subprocess
import sys

import pytest

from benchmarks import parity
from tests.distributed.test_torchrun import ROOT


def run(script, *arguments):
    command = [sys.executable, f"benchmarks/{script}.py", *map(str, arguments)]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.timeout(600)
def test_layouts_compute_the_same(tmp_path, monkeypatch):
    """One that splits the batch and the features at once, and one that splits the features alone.

    test_torchrun.py splits the batch alone.
    """
    arguments = ["--layouts", "1x2", "2x2", "--bytes", "1x2"]
    monkeypatch.setattr(sys, "argv", ["parity.py", "--json", str(tmp_path / "parity.json"), *arguments])
    parity.main()  # in this process, whose ranks start at once
    rows = json.loads((tmp_path / "parity.json").read_text())
    assert [row["layout"] for row in rows] == ["1x1", "1x2", "2x2"]
    assert all(row["max_rel_weight"] < 1e-5 for row in rows)
    assert 0 < rows[0]["dead_fraction"] < 1, "the comparison of dead features says something"
    (measured,) = [row for row in rows if "bytes_per_step" in row]
    if measured["bytes_per_step"] is not None:  # without root there is no network namespace to measure in
        assert abs(measured["bytes_per_step"] / measured["bytes_formula"] - 1) < 0.05


@pytest.mark.timeout(600)
def test_killed_ranks_do_not_change_the_result(tmp_path):
    """The first rank is killed at a random moment, the second while a checkpoint is written."""
    run("chaos", "--kills", 2, "--json", tmp_path / "chaos.json")
    report = json.loads((tmp_path / "chaos.json").read_text())
    assert report["kills"] == 2
    assert report["kills_during_checkpoint"] >= 1
    assert report["differences"] == report["unreadable_checkpoints"] == 0
