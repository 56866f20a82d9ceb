"""The benchmark's figures of a step."""

from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import report, step
from clt.costs import Job, flops, moved_bytes

SIZES = {"L": 3, "D": 4, "F": 16, "B": 64}
JOB = Job(3, 4, 16, 64, width=4)


@pytest.mark.parametrize("variant", ["ours", "textbook"])
def test_a_measured_step(variant: str) -> None:
    row = step.measure({**SIZES, "precision": "fp32", "variant": variant}, 10.0, 3, torch.device("cpu"))
    assert row["tokens_per_s"] * row["seconds"] == pytest.approx(64)
    assert row["share_of_peak"] == pytest.approx(row["tflops"] / row["peak_tflops"])
    assert 0 < row["share_of_peak"] <= row["roofline_share"] < 1
    work, moved = flops(JOB) / (row["peak_tflops"] * 1e12), moved_bytes(JOB) / 10e9
    assert row["roofline_seconds"] == pytest.approx(max(work, moved))
    assert ("formula_memory_gb" in row) == (variant == "ours")


def test_products_add_up_as_in_training() -> None:
    matmul = torch.backends.cuda.matmul
    matmul.allow_bf16_reduced_precision_reduction = matmul.allow_fp16_reduced_precision_reduction = True
    step.prepare({"F": 8, "precision": "fp32", "variant": "ours"}, torch.randn(8, 2, 2, 4))
    assert not matmul.allow_bf16_reduced_precision_reduction
    assert not matmul.allow_fp16_reduced_precision_reduction


def test_comparison_and_plot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def result(seconds: float) -> dict[str, Any]:
        row = {**SIZES, "variant": "ours", "seconds": seconds, "roofline_seconds": 1.0}
        machine = {"device": "x", "commit": "abc", "matmul_peak_tflops": {"fp32": 2.0}, "copy_gb_per_s": 3.0}
        return {**machine, "step": [row, {**SIZES, "variant": "textbook", "error": "out of memory"}]}

    report.compare(result(4.0), result(3.0))
    (line,) = [line for line in capsys.readouterr().out.splitlines() if " seconds" in line]
    assert line.split()[-3:] == ["4", "3", "0.750"]
    report.plot(result(4.0)["step"] * 3, tmp_path / "plots" / "step.png")
    assert (tmp_path / "plots" / "step.png").stat().st_size > 1000
