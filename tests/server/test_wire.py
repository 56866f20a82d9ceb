"""Frames: what safetensors reads in them, and what a damaged one does."""

import io
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load

from clt.server.wire import COLUMNS, Shape, Slice, WireError, as_bytes, body_of, frame, frame_bytes, read_frame

DTYPES = ["float16", "bfloat16", "float32"]
HEAD = 48  # bytes before the safetensors payload


def make(n: int, shape: Shape, sequence: int = 0, parts: int = 1) -> tuple[Slice, bytearray]:
    """Random bits (infinities and NaNs included) and their frame, as of so many slices of two bodies."""
    random = np.random.default_rng(n)
    data = torch.from_numpy(np.frombuffer(random.bytes(n * shape.row_bytes), np.uint8).copy())
    rows = data.view(getattr(torch, shape.dtype)).view(n, 2, shape.n_layers, shape.d_acts)
    body = body_of(rows, {name: random.integers(0, 2**31, n).astype(kind) for name, kind in COLUMNS.items()})
    cuts = np.linspace(0, n, parts + 1).astype(int).tolist()
    slices = [body._replace(start=a, stop=b) for a, b in pairwise(cuts) if a < b]
    whole = bytearray(b"".join(frame(slices, sequence, shape, "5e9")))
    assert len(whole) == frame_bytes(n, shape, "5e9")
    return body, whole


def read(data: bytes, shape: Shape, most: int = 9, sequence: int = 0) -> tuple[dict, str, torch.Tensor] | None:
    out = torch.zeros(most, 2, shape.n_layers, shape.d_acts, dtype=getattr(torch, shape.dtype))
    found = read_frame(io.BytesIO(data).readinto, shape, out, sequence, lambda size: None)
    return None if found is None else (*found, out[: len(found[0]["row"])])


@pytest.mark.parametrize("dtype", DTYPES)
@given(n=st.integers(1, 9), n_layers=st.integers(1, 3), d=st.integers(1, 7), parts=st.integers(1, 3))
@settings(max_examples=25, deadline=None)
def test_what_is_sent_arrives_and_is_plain_safetensors(dtype, n, n_layers, d, parts):
    shape = Shape(n_layers, d, dtype)
    body, data = make(n, shape, 7, parts)
    found = read(data, shape, sequence=7)
    assert found is not None
    columns, segment, rows = found
    assert segment == "5e9"
    independent = load(bytes(data[HEAD:]))
    assert as_bytes(rows) == as_bytes(independent.pop("activations").contiguous()) == body.body[24 * n :].data
    for name, column in columns.items():
        assert np.array_equal(column, independent[name].numpy())


def test_every_bit_of_a_frame_is_guarded():
    shape = Shape(1, 3, "float16")
    _, data = make(2, shape)
    for at in range(len(data)):
        bad = bytearray(data)
        bad[at] ^= 1 << at % 8
        with pytest.raises(WireError):
            read(bad, shape)


def test_every_cut_is_noticed_but_for_the_one_between_frames():
    shape = Shape(1, 3, "float16")
    _, data = make(2, shape)
    assert read(b"", shape) is None
    for at in range(1, len(data)):
        with pytest.raises(WireError):
            read(data[:at], shape)


@pytest.mark.parametrize("shape", [Shape(2, 3, "float16"), Shape(1, 6, "float16"), Shape(1, 3, "bfloat16")])
def test_rows_of_another_shape_than_the_indexs_are_refused(shape):
    with pytest.raises(WireError, match=r"as the server's index says|its header's checksum"):
        read(make(2, Shape(1, 3, "float16"))[1], shape)


def test_frames_come_in_order_and_no_larger_than_asked_for():
    shape = Shape(1, 3, "float16")
    with pytest.raises(WireError, match="frame 2 of 2 rows came where frame 1 of 1 to 9 rows was due"):
        read(make(2, shape, 2)[1], shape, sequence=1)
    with pytest.raises(WireError, match="of 1 to 1 rows was due"):
        read(make(2, shape)[1], shape, most=1)


@given(st.binary(max_size=300))
@settings(max_examples=200, deadline=None)
def test_arbitrary_bytes_are_a_wire_error(data):
    with pytest.raises(WireError):
        read(b"CLT2" + data + b"!", Shape(1, 3, "float16"))
