import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from clt.data.describe import describe, verify
from clt.data.index import read_index, write_index
from clt.data.shards import checksum
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
