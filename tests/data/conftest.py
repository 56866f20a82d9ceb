"""A store of known rows, and a small language model of random weights with text for it."""

from pathlib import Path

import numpy as np
import pytest
import torch

from clt.data.store import DiscBuffer
from clt.data.writer import write_store

ROWS, SHARD_ROWS, L, D = 53, 10, 3, 4


@pytest.fixture
def tensor() -> torch.Tensor:
    """(53, 2, 3, 4) float16 rows."""
    return torch.randn(ROWS, 2, L, D, generator=torch.Generator().manual_seed(0)).half()


@pytest.fixture
def columns() -> dict[str, np.ndarray]:
    return {"token": np.arange(ROWS, dtype="i4") * 3, "position": np.arange(ROWS, dtype="i4") % 7,
            "document": np.arange(ROWS, dtype="i8") + 2**40}  # fmt: skip


@pytest.fixture
def store(tmp_path: Path, tensor: torch.Tensor, columns: dict[str, np.ndarray]) -> Path:
    """A store of `tensor` in six shards, the last one ragged."""
    write_store(tmp_path / "store", tensor, SHARD_ROWS, columns)
    return tmp_path / "store"


@pytest.fixture
def buffer(store: Path) -> DiscBuffer:
    return DiscBuffer(store)
