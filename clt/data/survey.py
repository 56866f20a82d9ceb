"""Look through some rows of a store for numbers that are right and still no use. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from clt.data.index import StoreIndex
from clt.data.shards import TENSOR_DTYPES, dataset_offsets, read_at, row_bytes

_ROWS, _BYTES = 1024, 256 << 20  # read at most
_ZERO, _TYPICAL = 0.01, 0.1  # a layer with more zeros, or a smaller typical distance, gets a warning


def survey(path: Path, index: StoreIndex, statistics: dict[str, Any]) -> list[str]:
    """Warnings about a store's values, from evenly spaced rows and the statistics (numpy) of all rows.

    Told are values that became 0 in float16 and layers most of whose variance a few rows hold: those in which the
    median over rows of |x - mean|^2 is under a tenth of its mean.
    """
    side_layer = (2, index.n_layers)
    mean, sd = (np.stack([statistics[f"{side}_{kind}"] for side in ("input", "target")]) for kind in ("mean", "sd"))
    variance = (sd**2).sum(-1)  # (2, L)
    zeros, distances = np.zeros(side_layer), []
    for row in _sample(path, index):  # (2, L, D)
        zeros += (row == 0).mean(-1)
        distances.append(((row - mean) ** 2).sum(-1))
    zeros, typical = zeros / len(distances), np.median(distances, axis=0)
    typical = np.divide(typical, variance, out=np.ones(side_layer), where=variance > 0)
    found = []
    for side, layer in np.ndindex(side_layer):
        name = f"{('inputs', 'targets')[side]} of layer {index.layers[layer]}"
        if index.dtype == "float16" and zeros[side, layer] > _ZERO:
            found.append(
                f"{name}: {zeros[side, layer]:.1%} of the values are 0; unless they are 0 in the model, they are "
                "too small for float16, which ends at 6e-08: extract again with data.dtype=bfloat16 or float32"
            )
        elif typical[side, layer] < _TYPICAL:
            found.append(
                f"{name}: half of the rows are nearer to the mean than {typical[side, layer]:.2%} of the variance, so "
                "a few tokens with huge activations hold most of it and decide the layer's scale; "
                "clt.normalization=token scales each token by itself"
            )
    return found


def _sample(path: Path, index: StoreIndex) -> Iterator[np.ndarray]:
    """Evenly spaced rows (2, L, D) float32."""
    shape, kind = index.shape, TENSOR_DTYPES[index.dtype]
    size = row_bytes(*shape)["tensor"]
    count = max(1, min(index.rows, _ROWS, _BYTES // size))
    chosen, first = np.linspace(0, index.rows - 1, count).astype(np.int64), 0
    for shard in index.shards:
        low, high = np.searchsorted(chosen, [first, first + shard["rows"]])
        if low < high:
            file = path / shard["file"]
            offset = dataset_offsets(file, shard["rows"], *shape)["tensor"]
            with file.open("rb", buffering=0) as opened:
                for number in (chosen[low:high] - first).tolist():
                    row = np.empty((2, index.n_layers, index.d_acts), kind)
                    read_at(opened, [row.reshape(-1).view(np.uint8).data], offset + number * size)
                    if index.dtype == "bfloat16":
                        row = (row.astype(np.uint32) << 16).view(np.float32)
                    yield row.astype(np.float32)
        first += shard["rows"]
