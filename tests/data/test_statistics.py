from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from clt.data.describe import describe
from clt.data.statistics import Moments, Statistics
from clt.data.store import DiscBuffer
from clt.data.writer import write_store
from clt.errors import UserError


def two_pass(tensor: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    wide = tensor.double().numpy()
    return wide.mean(0), wide.std(0)


@settings(deadline=None)
@given(
    st.lists(st.integers(0, 300), min_size=1, max_size=5).filter(any),
    st.sampled_from(["float16", "bfloat16", "float32"]),
)
def test_streaming_equals_two_passes(parts: list[int], dtype: str) -> None:
    torch.manual_seed(sum(parts))
    scale, shift = torch.rand(2, 2, 3) * 50, torch.randn(2, 2, 3) * 300  # means far from zero: the hard case
    tensor = (torch.randn(sum(parts), 2, 2, 3) * scale + shift).to(getattr(torch, dtype))
    moments = Moments.zero(2, 3)
    for part in tensor.split(parts):
        moments.add(part)
    found = moments.statistics()
    mean, sd = two_pass(tensor)
    np.testing.assert_allclose(torch.stack([found.input_mean, found.target_mean]).numpy(), mean, rtol=1e-12)
    np.testing.assert_allclose(torch.stack([found.input_sd, found.target_sd]).numpy(), sd, rtol=1e-9, atol=1e-10)
    assert found.rows == sum(parts)
    assert found.input_mean.dtype == found.target_sd.dtype == torch.float64


def test_a_constant_dimension_has_sd_zero() -> None:
    moments = Moments.zero(1, 1)
    moments.add(torch.full((1000, 2, 1, 1), 0.1, dtype=torch.float16))
    assert moments.statistics().input_sd.item() == 0
    assert moments.statistics().input_mean.item() == float(np.float16(0.1))


def test_a_store_has_the_statistics_of_its_rows_as_stored(tmp_path: Path) -> None:
    tensor = (torch.randn(70, 2, 3, 4) * 100).bfloat16()
    write_store(tmp_path, tensor, 30)
    found = DiscBuffer(tmp_path).statistics
    mean, sd = two_pass(DiscBuffer(tmp_path)[:])
    np.testing.assert_allclose(found.input_mean.numpy(), mean[0], rtol=1e-12)
    np.testing.assert_allclose(found.target_sd.numpy(), sd[1], rtol=1e-12)
    assert found.rows == 70


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("input_mean", lambda t: t * float("nan"), "input_mean has values that are not finite"),
        ("target_sd", lambda t: t - 1e9, "target_sd has values less than 0"),
        ("target_sd", lambda t: t / 0, "target_sd has values that are not finite"),
        ("rows", lambda t: t * 0, "rows has values less than 1"),
        ("rows", lambda t: t.float(), "rows is torch.float32"),
        ("target_mean", lambda t: t.float(), r"target_mean is torch.float32 \(3, 4\), wanted float64 \(3, 4\)"),
        ("input_sd", lambda t: t[:1], r"input_sd is torch.float64 \(1, 4\), wanted float64 \(3, 4\)"),
    ],
)
def test_statistics_that_no_rows_can_have(
    tmp_path: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor], message: str
) -> None:
    write_store(tmp_path, torch.randn(70, 2, 3, 4), 30)
    tensors = load_file(tmp_path / "stats.safetensors")
    save_file({**tensors, name: change(tensors[name]).contiguous()}, tmp_path / "stats.safetensors")
    message = message.replace("torch.", "(torch.)?")  # which `describe` does without
    for read in (DiscBuffer, describe):
        with pytest.raises(UserError, match=rf"stats.safetensors is damaged \({message}"):
            read(tmp_path)


def test_statistics_of_another_store(tmp_path: Path) -> None:
    write_store(tmp_path / "a", torch.randn(70, 2, 3, 4), 30)
    write_store(tmp_path / "b", torch.randn(70, 2, 1, 4), 30)
    (tmp_path / "b" / "stats.safetensors").replace(tmp_path / "a" / "stats.safetensors")
    with pytest.raises(UserError, match=r"input_mean is torch.float64 \(1, 4\), wanted float64 \(3, 4\)"):
        DiscBuffer(tmp_path / "a")


def test_save_and_load(tmp_path: Path) -> None:
    moments = Moments.zero(2, 3)
    moments.add(torch.randn(20, 2, 2, 3))
    wanted = moments.statistics()
    wanted.save(tmp_path / "stats.safetensors")
    found = Statistics.load(tmp_path / "stats.safetensors")
    assert found.rows == 20
    for name in ("input_mean", "input_sd", "target_mean", "target_sd"):
        assert torch.equal(getattr(found, name), getattr(wanted, name))
