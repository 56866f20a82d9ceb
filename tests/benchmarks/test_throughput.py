"""The command itself, on a tiny shape: the figures that others read from its JSON."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import data_path, report

ROOT = Path(__file__).parents[2]


def test_the_command_writes_every_figure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "results" / "out.json"
    command = [sys.executable, "benchmarks/throughput.py", "--quick", "--step-only", "--json", str(out)]
    command += ["--shapes", "3x4x16x64", "--variants", "ours", "textbook", "--precision", "fp32"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    assert {"device", "versions", "commit", "command", "copy_gb_per_s", "step"} <= result.keys()
    assert {"bf16", "fp32"} <= result["matmul_peak_tflops"].keys()
    ours, textbook = result["step"]
    keys = "L D F B precision variant tokens_per_s tflops share_of_peak roofline_share peak_memory_gb"
    assert set(keys.split()) <= ours.keys() & textbook.keys()
    assert ours["formula_memory_gb"] > 0
    assert (ours["timed_steps"], textbook["timed_steps"]) == (10, 5)
    assert ours["over_textbook"] == pytest.approx(textbook["seconds"] / ours["seconds"])
    report.compare(result, result)
    assert (
        sum(line.startswith("step 3 4 16 64 fp32 ours seconds") for line in capsys.readouterr().out.splitlines()) == 1
    )


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_the_reader(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(data_path.SHAPES, "small", (2, 8, 64, 16))
    row = data_path.reader("small", 1, 30, torch.device("cpu"))
    assert row["share_of_raw"] > 0
    assert row["gb_per_s"] > 0
    assert 0 <= row["stall_share"] < 1
