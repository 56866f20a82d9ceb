import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from clt.data.describe import describe, verify
from clt.data.index import read_index, write_index
from clt.data.shards import checksum
from clt.data.writer import write_store
from clt.errors import UserError


def test_describe_says_what_is_there(store: Path, tensor: torch.Tensor) -> None:
    text = describe(store)
    size = sum(path.stat().st_size for path in store.glob("*.h5"))
    assert 1000 < size < 100_000
    assert f"size      {size / 1000:.4g} kB: 53 rows in 6 shards" in text
    assert "L=3, D=4) float16" in text
    rms = tensor.double().square().mean((0, 3)).sqrt()  # (2, L)
    last = [float(word) for word in re.split(r"\s+", text.splitlines()[-1].strip())]
    np.testing.assert_allclose(last, [2, rms[0, 2], rms[1, 2]], rtol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_values_that_underflow_are_told(tmp_path: Path, dtype: torch.dtype) -> None:
    tensor = torch.randn(2000, 2, 3, 32, generator=torch.Generator().manual_seed(0))
    tensor[:, 1, 2] *= 1e-7
    zero = (tensor[:, 1, 2].to(dtype) == 0).double().mean().item()
    assert (zero > 0.2) == (dtype == torch.float16)
    write_store(tmp_path, tensor.to(dtype), 300)
    found = [line for line in describe(tmp_path).splitlines() if line.startswith("warning")]
    if dtype != torch.float16:
        assert found == []
        return
    (line,) = found
    share = re.search(r"targets of layer 2: ([\d.]+)% of the values are 0; .* extract again with data.dtype=bfl", line)
    assert share is not None
    assert float(share[1]) / 100 == pytest.approx(zero, abs=0.01)  # five times the sample's standard error


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_huge_token_is_told(tmp_path: Path, dtype: torch.dtype) -> None:
    tensor = torch.randn(3000, 2, 2, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    write_store(tmp_path / "plain", tensor, 700)
    assert "warning" not in describe(tmp_path / "plain")
    tensor[1234, 0, 1, 3] = 1800
    wide = tensor[:, 0, 1].double()
    distances = (wide - wide.mean(0)).square().sum(1)
    assert distances.max() > 0.98 * distances.sum()
    write_store(tmp_path / "huge", tensor, 700)
    (line,) = [line for line in describe(tmp_path / "huge").splitlines() if line.startswith("warning")]
    share = re.search(r"inputs of layer 1: half of the rows are nearer to the mean than ([\d.]+)% of the var", line)
    assert share is not None
    assert float(share[1]) / 100 == pytest.approx((distances.median() / distances.mean()).item(), rel=0.1)


@pytest.mark.parametrize("kind", ["xxh3_128", "sha256"])  # sha256: what stores had once
def test_verify_names_every_altered_shard(store: Path, kind: str) -> None:
    index = read_index(store)
    shards = [{**shard, "checksum": checksum(store / shard["file"], kind)} for shard in index.shards]
    write_index(store, replace(index, shards=shards))
    verify(store)
    for name, at in (("shard_00001.h5", 2500), ("shard_00004.h5", -1)):
        data = bytearray((store / name).read_bytes())
        data[at] ^= 1
        (store / name).write_bytes(data)
    with pytest.raises(UserError, match=r"altered shards: shard_00001.h5, shard_00004.h5 do not"):
        verify(store)
