"""The files of a run's features: one record a feature, as circuit-tracer's page reads them, and a summary of all.

features/
    summary.json          written last: what the features are of (docs/features.md lists the fields)
    summary.safetensors   arrays over all features, for tables, plots and search without a record being opened
    vocabulary.json.gz    the text of every token id
    index.json.gz         for each layer the name of its file and the F + 1 offsets of its records
    layer_0.bin ..        the records of a layer: four bytes of length (little-endian), then that much zlib JSON
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save

from clt.data.index import write_atomically, write_json
from clt.errors import UserError
from clt.export.records import RECORDS_INDEX, records_file
from clt.files import read_object, reading

FORMAT_VERSION = 1
SUMMARY, _ARRAYS, _VOCABULARY = "summary.json", "summary.safetensors", "vocabulary.json.gz"
_REMEDY = "delete its directory and run `clt features RUN` again"

ARRAYS = {
    "count": np.int64,  # tokens on which the feature fires
    "max_activation": np.float32,
    "mean_activation": np.float32,  # over the tokens on which it fires; 0 if there are none
    "decoder_norm": np.float32,  # of all that it writes, to all target layers
    "example_tokens": np.int32,  # (L, F, n): ids of the tokens on which its highest examples fire; -1: no such example
    "top_logits": np.int32,  # (L, F, m): ids of the tokens that it promotes most, the most promoted first
    "bottom_logits": np.int32,  # (L, F, m): ids of those that it suppresses most, the most suppressed first
}
"""The arrays of summary.safetensors, each of (L, F) unless said otherwise."""


def cantor(layer: int, feature: int) -> int:
    """The one number by which circuit-tracer names a feature."""
    return (layer + feature) * (layer + feature + 1) // 2 + feature


def pack(record: dict[str, Any]) -> bytes:
    """A record as it stands in a layer's file."""
    text = json.dumps(record, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    data = zlib.compress(text.encode(), 4)  # half the time of 6, 6% more bytes
    return len(data).to_bytes(4, "little") + data


def unpack(data: bytes) -> dict[str, Any]:
    """The record in `data`. Raises ValueError when it is damaged."""
    size = int.from_bytes(data[:4], "little")
    if len(data) != 4 + size:
        raise ValueError(f"a record of {len(data)} bytes says that it has {size} and 4")
    try:
        return json.loads(zlib.decompress(data[4:]))
    except zlib.error as error:
        raise ValueError(f"a record is no zlib data: {error}") from error


def write_layer(directory: Path, layer: int, records: Iterable[bytes]) -> list[int]:
    """Write the packed records of a layer, in the order of its features; returns their F + 1 offsets."""
    offsets = [0]
    with (directory / records_file(layer)).open("wb") as file:
        for record in records:
            offsets.append(offsets[-1] + file.write(record))
    return offsets


def write_summary(
    directory: Path,
    offsets: list[list[int]],
    arrays: dict[str, np.ndarray],
    vocabulary: list[str],
    summary: dict[str, Any],
) -> None:
    """Write all but the records; summary.json last. `offsets`: of each layer, from `write_layer`."""
    assert arrays.keys() == ARRAYS.keys()
    index = [{"filename": records_file(layer), "offsets": of_layer} for layer, of_layer in enumerate(offsets)]
    for name, tree in ((RECORDS_INDEX, index), (_VOCABULARY, vocabulary)):
        text = json.dumps(tree, ensure_ascii=False, separators=(",", ":"))
        write_atomically(directory / name, gzip.compress(text.encode(), mtime=0))  # without the time: the same bytes
    contiguous = {name: np.ascontiguousarray(arrays[name], ARRAYS[name]) for name in ARRAYS}
    write_atomically(directory / _ARRAYS, save(contiguous))
    write_json(directory / SUMMARY, {"format_version": FORMAT_VERSION, **summary})


class Features:
    """The features of a run, read when they are asked for.

    Raises UserError, here and later, for files that are missing, damaged or of another format version.
    """

    def __init__(self, directory: str | Path) -> None:
        """directory: `RUN/features`."""
        self.directory = Path(directory)
        if not (self.directory / SUMMARY).is_file():
            raise UserError(f"{self.directory} has no {SUMMARY}; make the features with `clt features RUN`")
        fields = {"format_version": int, "n_layers": int, "d_features": int, "tokens": int}
        self.summary = read_object(self.directory / SUMMARY, fields, _REMEDY)
        """What summary.json says."""
        if (version := self.summary["format_version"]) != FORMAT_VERSION:
            raise UserError(f"{self.directory} has format version {version}, wanted {FORMAT_VERSION}; {_REMEDY}")
        self.n_layers: int = self.summary["n_layers"]
        self.d_features: int = self.summary["d_features"]
        self.tokens: int = self.summary["tokens"]

    @cached_property
    def arrays(self) -> dict[str, np.ndarray]:
        """The arrays of ARRAYS, each (L, F, ..)."""
        file, shape = self.directory / _ARRAYS, (self.n_layers, self.d_features)
        with reading(file, _REMEDY), safe_open(str(file), "np") as tensors:
            found = {name: tensors.get_tensor(name) for name in ARRAYS}
            for name, array in found.items():
                if array.shape[:2] != shape or array.dtype != ARRAYS[name]:
                    raise ValueError(f"{name} is {array.dtype} {array.shape}, wanted {ARRAYS[name].__name__} {shape}")
        return found

    @cached_property
    def vocabulary(self) -> list[str]:
        """The text of each token id. A byte that is not a character of its own stands as `\\xe2`."""
        return self._read_json(_VOCABULARY)

    def record(self, layer: int, feature: int) -> dict[str, Any]:
        """The record of a feature: what docs/features.md says. Raises IndexError when there is no such feature."""
        if not (0 <= layer < self.n_layers and 0 <= feature < self.d_features):
            raise IndexError(f"no feature {feature} of layer {layer}: {self.n_layers} layers of {self.d_features}")
        start, end = self._offsets[layer][feature : feature + 2]
        file = self.directory / records_file(layer)
        with reading(file, _REMEDY), file.open("rb") as opened:
            opened.seek(start)
            return unpack(opened.read(end - start))

    @cached_property
    def _offsets(self) -> list[list[int]]:
        index = self._read_json(RECORDS_INDEX)
        with reading(self.directory / RECORDS_INDEX, _REMEDY):
            if [len(layer["offsets"]) for layer in index] != [self.d_features + 1] * self.n_layers:
                raise ValueError(f"wanted {self.d_features + 1} offsets for each of {self.n_layers} layers")
        return [layer["offsets"] for layer in index]

    def _read_json(self, name: str) -> Any:
        file = self.directory / name
        with reading(file, _REMEDY):
            try:
                return json.loads(gzip.decompress(file.read_bytes()))
            except (EOFError, zlib.error) as error:
                raise ValueError(f"no whole gzip file: {error}") from error
