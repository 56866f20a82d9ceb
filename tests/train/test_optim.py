"""Schedules at their corners."""

from pathlib import Path

import pytest
import torch

from clt.config import LossConfig, OptimConfig
from clt.train.optim import autocast_dtype, learning_rate, sparsity_coefficient


def test_learning_rate():
    config = OptimConfig(lr=2.0, warmup=0.1, decay=0.2)
    rates = [learning_rate(step, 100, config) for step in range(100)]
    assert rates[:3] == pytest.approx([0.2, 0.4, 0.6])
    assert rates[9:80] == [2.0] * 71
    assert rates[81] == pytest.approx(1.9)
    assert rates[99] == pytest.approx(0.1)
    assert [learning_rate(step, 100, OptimConfig(lr=2.0)) for step in (0, 50, 99)] == [2.0] * 3
    assert max(learning_rate(step, 10, OptimConfig(lr=2.0, warmup=1.0, decay=1.0)) for step in range(10)) < 2.0


def test_sparsity_coefficient():
    config = LossConfig(sparsity=3.0, sparsity_ramp=0.5)
    values = [sparsity_coefficient(step, 100, config) for step in range(100)]
    assert values[0] == 0
    assert values[25] == pytest.approx(1.5)
    assert values[50:] == [3.0] * 50
    assert sparsity_coefficient(0, 100, LossConfig(sparsity=3.0, sparsity_ramp=0.0)) == 3.0


def test_auto_precision_is_what_the_hardware_multiplies():
    cpu = torch.device("cpu")
    assert autocast_dtype("bf16", cpu) == torch.bfloat16
    assert autocast_dtype("fp16", cpu) == torch.float16
    assert autocast_dtype("fp32", cpu) == torch.float32
    flags = Path("/proc/cpuinfo").read_text()
    native = "amx_bf16" in flags or "avx512_bf16" in flags
    assert autocast_dtype("auto", cpu) == (torch.bfloat16 if native else torch.float32)
