"""Frames: what safetensors reads in them, what a damaged one does, and that nothing is copied on arrival."""

import io
import socket
import threading
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load

from clt.server import wire
from clt.server.buffer import Batch
from clt.server.client import ActivationClient
from clt.server.wire import CHECKSUM, HEADER, StreamEnded, WireError, decode, error_frame, layout, read_frame

DTYPES = ["float16", "bfloat16", "float32"]


def make(n: int, n_layers: int, d_acts: int, dtype: str, sequence: int = 0) -> tuple[Batch, bytearray]:
    """A batch of random bits (infinities and NaNs included) and its frame."""
    random = np.random.default_rng(n)
    form = layout(n, n_layers, d_acts, dtype, "5e9")
    data = memoryview(bytearray(random.bytes(n * form.row_bytes)))
    rows = torch.frombuffer(data, dtype=getattr(torch, dtype)).view(n, 2, n_layers, d_acts)
    columns = [random.integers(0, 2**31, n).astype(kind) for kind in ("i4", "i4", "i8", "i8")]
    batch = Batch(rows, *columns)

    def copy(part: slice, out: memoryview) -> None:
        out[:] = data[part.start * form.row_bytes : part.stop * form.row_bytes]

    frame = b"".join(form.pieces(batch._asdict(), sequence, copy))
    assert len(frame) == form.size
    return batch, bytearray(frame)


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("dtype", DTYPES)
@given(n=st.integers(1, 9), n_layers=st.integers(1, 3), d_acts=st.integers(1, 7), sequence=st.integers(0, 2**64 - 1))
@settings(max_examples=25, deadline=None)
def test_what_is_sent_arrives_and_is_plain_safetensors(dtype, n, n_layers, d_acts, sequence):
    batch, frame = make(n, n_layers, d_acts, dtype, sequence)
    found = read_frame(io.BytesIO(frame).readinto, sequence)
    assert found is not None
    assert (found.sequence, found.segment) == (sequence, "5e9")
    independent = load(bytes(frame[HEADER.size : -CHECKSUM.size]))
    for got in (found.batch._asdict(), {k: v if k == "activations" else v.numpy() for k, v in independent.items()}):
        assert got["activations"].dtype == getattr(torch, dtype)
        assert bits(got["activations"]) == bits(batch.activations)
        for name in ("token", "position", "document", "row"):
            assert np.array_equal(got[name], getattr(batch, name))
            assert got[name].dtype == getattr(batch, name).dtype


@pytest.mark.parametrize("piece", [1, 100, 1000])
def test_a_frame_is_the_same_in_pieces_of_any_size(monkeypatch, piece):
    whole = make(9, 2, 5, "float16", 3)[1]
    monkeypatch.setattr(wire, "PIECE", piece)
    assert make(9, 2, 5, "float16", 3)[1] == whole
    found = read_frame(io.BytesIO(whole).readinto, 3)
    assert found is not None
    assert found.sequence == 3


def test_every_bit_of_a_frame_is_guarded():
    _, frame = make(2, 1, 3, "float16")
    for at in range(len(frame)):
        bad = bytearray(frame)
        bad[at] ^= 1 << at % 8
        with pytest.raises((WireError, StreamEnded)):
            read_frame(io.BytesIO(bad).readinto, 0)


@pytest.mark.parametrize("size", [300, 5000, 1 << 19, (1 << 20) + 1, 3_000_000])
def test_a_frame_is_not_kept_waiting_for_what_follows_it(size):
    """The kernel may wake the client late, but never wait for bytes that are not of this frame."""
    frame = make(2, 1, size // 8, "float16")[1]

    def serve() -> None:
        connection, _ = listener.accept()
        connection.recv(65536)
        connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 99999999\r\n\r\n")
        for start in range(0, len(frame), 300_007):
            time.sleep(0.02)
            connection.sendall(frame[start : start + 300_007])
        connections.append(connection)  # open, and silent

    connections: list[socket.socket] = []
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve)
        thread.start()
        client = ActivationClient(f"http://127.0.0.1:{listener.getsockname()[1]}", timeout=10, patience=0)
        assert len(next(client.stream_activations(2)).row) == 2
        thread.join()
        connections[0].close()


def test_every_cut_is_noticed_but_for_the_one_between_frames():
    _, frame = make(2, 1, 3, "float16")
    assert read_frame(io.BytesIO(b"").readinto, 0) is None
    for at in range(1, len(frame)):
        with pytest.raises(WireError, match="cut off"):
            read_frame(io.BytesIO(frame[:at]).readinto, 0)


def test_frames_come_in_order():
    stream = io.BytesIO(make(2, 1, 3, "float16", 0)[1] + make(2, 1, 3, "float16", 2)[1])
    assert read_frame(stream.readinto, 0) is not None
    with pytest.raises(WireError, match="frame 2 came where frame 1 was due"):
        read_frame(stream.readinto, 1)


def test_an_error_frame_says_why_the_stream_ended():
    with pytest.raises(StreamEnded, match="the generator died") as caught:
        read_frame(io.BytesIO(error_frame(4, "the generator died", 2.5)).readinto, 4)
    assert caught.value.retry_after == 2.5


@given(st.binary(max_size=200))
@settings(max_examples=200, deadline=None)
def test_arbitrary_bytes_are_a_wire_error(data):
    with pytest.raises(WireError):
        read_frame(io.BytesIO(b"CLT1" + data + b"!").readinto, 0)
    with pytest.raises(WireError):
        decode(memoryview(bytearray(data)))


def test_arrival_copies_nothing():
    batch, frame = make(3, 2, 4, "bfloat16")
    payload = memoryview(frame)[HEADER.size : -CHECKSUM.size]
    found, _ = decode(payload)
    payload[-1] ^= 0xFF
    assert bits(found.activations) != bits(batch.activations)
    assert bits(found.activations)[:-1] == bits(batch.activations)[:-1]
