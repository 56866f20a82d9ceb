"""Which feature fires on which token, and how strongly, as files of flat arrays. Imports no torch.

text.token, text.document, text.keep           of P tokens, special ones included
layer_0.feature, layer_0.value, layer_0.end    firings token by token, those of a token by feature, and where each
..                                             token's end
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

OF_TEXT = {"token": np.int32, "document": np.int64, "keep": np.bool_}
OF_LAYER = {"feature": np.int32, "value": np.float32, "end": np.int64}
GROUP, GROUP_BYTES = 1 << 25, 40  # firings that are sorted at once, and what each takes
OF_ALL_BYTES = 3  # that each firing of a layer takes while those of a group are found


class OfLayer(NamedTuple):
    """The firings of one layer's features: token by token, those of a token by feature."""

    feature: np.ndarray  # (n,) int32
    value: np.ndarray  # (n,) float32
    end: np.ndarray  # (P,) int64: where the firings of each token end

    def at(self, places: np.ndarray) -> np.ndarray:
        """The features that fire on some tokens, those of one token after those of another."""
        start = np.where(places > 0, self.end[places - 1], 0)
        count = self.end[places] - start
        return self.feature[np.repeat(start - (np.cumsum(count) - count), count) + np.arange(count.sum())]

    def counts(self, d_features: int) -> np.ndarray:
        """On how many tokens each feature fires, (F,) int64."""
        pieces = range(0, max(len(self.feature), 1), GROUP)
        return sum(np.bincount(self.feature[i : i + GROUP], minlength=d_features) for i in pieces)  # type: ignore

    def by_feature(self, d_features: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Of each feature the places (m,) of the tokens on which it fires, ascending, and its activations there."""
        ends = np.cumsum(self.counts(d_features))
        first = 0
        while first < d_features:
            done = ends[first - 1] if first else 0
            last = max(first + 1, int(np.searchsorted(ends, done + GROUP, "right")))
            of_group = np.flatnonzero((self.feature >= first) & (self.feature < last))
            # Integers of 16 bits are sorted several times faster.
            key = (self.feature[of_group] - first).astype(np.uint16 if last - first <= 1 << 16 else np.int32)
            order = np.argsort(key, kind="stable")
            places, values = np.searchsorted(self.end, of_group, "right")[order], self.value[of_group[order]]
            for start, end in zip([0, *(ends[first : last - 1] - done)], ends[first:last] - done):
                yield places[start:end], values[start:end]
            first = last


class Firings:
    """The files in a directory, mapped. A token's place is its number, special tokens included: there nothing fires."""

    def __init__(self, directory: Path, n_layers: int, context: int) -> None:
        """context: tokens in a window of the text."""
        self.directory, self.context = directory, context
        self.token, self.document, self.keep = (_mapped(directory / f"text.{name}", OF_TEXT[name]) for name in OF_TEXT)
        self.layers = [
            OfLayer(*(_mapped(directory / f"layer_{s}.{name}", kind) for name, kind in OF_LAYER.items()))
            for s in range(n_layers)
        ]

    def __reduce__(self) -> tuple[type, tuple[Path, int, int]]:
        return Firings, (self.directory, len(self.layers), self.context)  # other processes map the files themselves


def _mapped(file: Path, kind: Any) -> np.ndarray:
    # An array over the mapped bytes: slices of a memmap itself are much slower. An empty file cannot be mapped.
    return np.asarray(np.memmap(file, kind, "r")) if file.stat().st_size else np.empty(0, kind)
