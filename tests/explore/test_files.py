"""The files of features: what is written is read, by circuit-tracer's rules too, and damage is told."""

import gzip
import json
import zlib
from pathlib import Path

import numpy as np
import pytest

from clt.errors import UserError
from clt.explore.files import ARRAYS, Features, cantor, pack, write_layer, write_summary

L, F = 3, 5


@pytest.fixture
def written(tmp_path: Path) -> Path:
    """Features of three layers; the record of feature f of layer l says so."""
    offsets = [
        write_layer(tmp_path, s, (pack({"layer": s, "feature": f, "é": "⏎"}) for f in range(F))) for s in range(L)
    ]
    arrays = {name: np.arange(L * F * 2).reshape(L, F, 2) if name.endswith(("s", "tokens")) else
              np.arange(L * F).reshape(L, F) for name in ARRAYS}  # fmt: skip
    write_summary(tmp_path, offsets, arrays, ["a", " b"], {"n_layers": L, "d_features": F, "tokens": 7})
    return tmp_path


def test_every_record_and_array_is_read_again(written):
    features = Features(written)
    assert (features.n_layers, features.d_features, features.summary["tokens"]) == (L, F, 7)
    assert features.vocabulary == ["a", " b"]
    for s in range(L):
        for f in range(F):
            assert features.record(s, f) == {"layer": s, "feature": f, "é": "⏎"}
    assert features.arrays["count"].tolist() == np.arange(L * F).reshape(L, F).tolist()
    assert {name: array.dtype for name, array in features.arrays.items()} == ARRAYS
    for layer, feature in ((L, 0), (-1, 0), (0, F), (0, -1)):
        with pytest.raises(IndexError):
            features.record(layer, feature)


def test_a_record_is_found_as_circuit_tracers_page_finds_it(written):
    """Written from its JavaScript: unpair the number, take the range of bytes, inflate what the length says."""
    index = json.loads(gzip.decompress((written / "index.json.gz").read_bytes()))
    for s in range(L):
        for f in range(F):
            z = cantor(s, f)
            w = int(((8 * z + 1) ** 0.5 - 1) / 2)
            f_found = z - (w * w + w) // 2
            layer = index[w - f_found]
            start, end = layer["offsets"][f_found], layer["offsets"][f_found + 1]
            body = (written / layer["filename"]).read_bytes()[start : end + 1]  # its range has a byte more
            size = body[0] | body[1] << 8 | body[2] << 16 | body[3] << 24
            assert json.loads(zlib.decompress(body[4 : 4 + size]))["layer"] == s


@pytest.mark.parametrize("share", [0, 0.6])
@pytest.mark.parametrize(
    "name", ["summary.json", "summary.safetensors", "vocabulary.json.gz", "index.json.gz", "layer_1.bin"]
)
def test_a_damaged_file_is_named(written, name, share):
    file = written / name
    data = file.read_bytes()
    file.write_bytes(data[: int(share * len(data))])
    with pytest.raises(UserError, match=name):
        read_all(written)


def read_all(directory: Path) -> None:
    features = Features(directory)
    print(features.arrays, features.vocabulary, features.record(1, 4))


def test_features_of_another_version_and_missing_ones_are_refused(written):
    tree = json.loads((written / "summary.json").read_text())
    (written / "summary.json").write_text(json.dumps(tree | {"format_version": 2}))
    with pytest.raises(UserError, match=r"version 2, wanted 1.*clt features"):
        Features(written)
    with pytest.raises(UserError, match="clt features RUN"):
        Features(written / "nowhere")
