"""Frames: what safetensors reads in them, and what a damaged one does."""

import io
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load

from clt.data.index import RowShape
from clt.data.raw_rows import COLUMNS, RawRows, cut, empty_rows, raw_rows, tensor_of
from clt.server import wire
from clt.server.wire import WireError

SMALL = RowShape(1, 3, "float16")
HEAD = 24  # bytes before the safetensors payload


def make(n: int, shape: RowShape = SMALL, sequence: int = 0, parts: int = 1) -> tuple[RawRows, bytearray]:
    """Random bits (infinities and NaNs included) and their frame, as of so many slices."""
    random = np.random.default_rng(n)
    data = torch.from_numpy(np.frombuffer(random.bytes(n * shape.row_bytes), np.uint8).copy())
    rows = data.view(getattr(torch, shape.dtype)).view(n, 2, shape.n_layers, shape.d_acts)
    part = raw_rows(rows, {name: random.integers(0, 2**31, n).astype(kind) for name, kind in COLUMNS.items()})
    cuts = np.linspace(0, n, parts + 1).astype(int).tolist()
    whole = bytearray(b"".join(wire.frame([cut(part, a, b) for a, b in pairwise(cuts)], sequence, shape, "5e9")))
    assert len(whole) == wire.frame_bytes(n, shape, "5e9")
    return part, whole


def read(data: bytes, shape: RowShape = SMALL, most: int = 9, sequence: int = 0) -> tuple[int, RawRows]:
    """The frame's number of rows, and them behind one other row."""
    out = empty_rows(1 + most, shape)
    return wire.read_frame(io.BytesIO(data).readinto, sequence, shape, "5e9", out, 1), out


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@given(n=st.integers(1, 9), n_layers=st.integers(1, 3), d=st.integers(1, 7), parts=st.integers(1, 3))
@settings(max_examples=25, deadline=None)
def test_what_is_sent_arrives_and_is_plain_safetensors(dtype, n, n_layers, d, parts):
    shape = RowShape(n_layers, d, dtype)
    sent, data = make(n, shape, 7, parts)
    got, out = read(data, shape, sequence=7)
    assert got == n
    independent = load(bytes(data[HEAD:]))
    rows = independent.pop("activations").flatten(1).view(torch.uint8).numpy()
    assert np.array_equal(rows, sent["rows"])
    assert np.array_equal(rows, out["rows"][1 : 1 + n])
    assert tensor_of(out, shape).shape == (10, 2, n_layers, d)
    assert independent.keys() == COLUMNS.keys()
    for name, column in independent.items():
        assert np.array_equal(sent[name], column.numpy())
        assert np.array_equal(out[name][1 : 1 + n], column.numpy())


def test_every_damaged_bit_and_every_cut_is_noticed_but_for_the_cut_between_frames():
    _, data = make(2)
    assert read(b"")[0] == 0
    for at in range(len(data)):
        bad = bytearray(data)
        bad[at] ^= 1 << at % 8
        with pytest.raises(WireError):
            read(bad)
    for at in range(1, len(data)):
        with pytest.raises(WireError):
            read(data[:at])
