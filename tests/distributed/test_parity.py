"""The benchmarks of exactness, at the lengths that a test run has time for."""

import json
import subprocess
import sys

import pytest

from tests.distributed.test_torchrun import ROOT


def run(script, *arguments):
    command = [sys.executable, f"benchmarks/{script}.py", *map(str, arguments)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.timeout(600)
def test_every_layout_computes_the_same(tmp_path):
    run("parity", "--json", tmp_path / "parity.json", "--bytes", "1x2")
    rows = json.loads((tmp_path / "parity.json").read_text())
    assert [row["layout"] for row in rows] == ["1x1", "2x1", "1x2", "4x1", "2x2", "1x4"]
    assert all(row["max_rel_weight"] < 1e-5 for row in rows)
    assert 0 < rows[0]["dead_fraction"] < 1, "the comparison of dead features says something"
    (measured,) = [row for row in rows if "bytes_per_step" in row]
    if measured["bytes_per_step"] is not None:  # without root there is no network namespace to measure in
        assert abs(measured["bytes_per_step"] / measured["bytes_formula"] - 1) < 0.05


@pytest.mark.timeout(600)
def test_killed_ranks_leave_no_trace(tmp_path):
    run("chaos", "--kills", 5, "--json", tmp_path / "chaos.json")
    report = json.loads((tmp_path / "chaos.json").read_text())
    assert report["kills"] == 5
    assert report["kills_during_checkpoint"] >= 1
    assert report["differences"] == report["unreadable_checkpoints"] == 0
