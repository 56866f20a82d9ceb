"""The command itself, on a tiny shape: the figures that others read from its JSON."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from benchmarks import data_path, report, step, throughput
from clt.costs import Job

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
    assert ours["over_textbook"] == pytest.approx(ours["share_of_peak"] / textbook["share_of_peak"])
    report.compare(result, result)
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("step 3 4 16 64 fp32 ours seconds") for line in lines) == 1


@pytest.mark.parametrize(("quick", "count"), [(True, 4), (False, 7)])
def test_the_default_steps_of_a_gpu_fit_into_80_gb(quick: bool, count: int) -> None:
    """By the formula; of the textbook, which has the square decoder: its state, product with the mask, features."""
    arguments = SimpleNamespace(shapes=None, quick=quick, precision="bf16", variants=throughput.VARIANTS)
    found = throughput.cases(cast(Any, arguments), torch.device("cuda"))
    assert len(found) == count, "each takes half a minute, of ten"
    for case in found:
        L, D, F, B = (case[key] for key in "LDFB")
        wanted = step.formula_memory(Job(L, D, F, B))
        if "textbook" in case["variant"]:
            wanted = (16 + 3 * 4) * L * L * F * D + 6 * 4 * B * L * F
        assert wanted < 76e9, case


def test_the_comparison_shows_every_part(capsys: pytest.CaptureFixture[str]) -> None:
    def result(factor: float) -> dict[str, Any]:
        extraction = {"model": "small", "rows": 7, "us_per_row": {"writing": 3.0 * factor}, "tokens_per_s": 9.0}
        parts = {"reader": {"shapes": []}, "stream": {"stream_gb_per_s": 2.0}, "startup": {"help_s": 0.1 * factor}}
        return {"commit": "c", "device": "d", "matmul_peak_tflops": {}, "copy_gb_per_s": 1.0, "step": [],
                "extraction": [extraction], **parts}  # fmt: skip

    report.compare(result(1.0), result(2.0))
    found = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["extraction", "small", "7", "us_per_row", "writing", "3", "6", "2.000"] in found
    assert ["extraction", "small", "7", "tokens_per_s", "9", "9", "1.000"] in found
    assert ["startup", "help_s", "0.1", "0.2", "2.000"] in found
    assert ["stream", "stream_gb_per_s", "2", "2", "1.000"] in found


def test_an_extraction_and_its_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "short.yaml").write_text("lm: {context: 64, batch_windows: 8}")
    monkeypatch.setitem(data_path.CONFIGS, "embedded", str(tmp_path / "short.yaml"))
    row = data_path.extraction("embedded", 1, torch.device("cpu"))
    assert row["rows"] == 2 * 8 * 63, "two batches of windows, without their first tokens"
    assert row["share_of_forward"] > 0
    parts = row["us_per_row"]
    assert parts.keys() == {"extraction", "stock_forward", "forward", "capture", "statistics", "writing", "tokens"}
    assert min(parts.values()) > 0
    assert max(parts.values()) < 1e5


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_the_reader(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(data_path.SHAPES, "quickstart", (2, 8, 64, 16))
    row = data_path.reader("quickstart", 1, 30, torch.device("cpu"), "ours")
    assert row["share_of_raw"] > 0
    assert row["gb_per_s"] > 0
    assert 0 <= row["stall_share"] < 1
