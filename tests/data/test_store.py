import os
import warnings
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from clt.data.statistics import Statistics
from clt.data.store import DiscBuffer
from clt.data.writer import write_store
from clt.errors import UserError

N = 53
rows = st.lists(st.integers(-N, N - 1), max_size=80)
ends = st.one_of(st.none(), st.integers(-N - 5, N + 5))
fixture_is_read_only = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)


@fixture_is_read_only
@given(rows)
def test_any_rows_in_any_order(buffer: DiscBuffer, tensor: torch.Tensor, rows: list[int]) -> None:
    assert torch.equal(buffer[rows], tensor[rows])
    assert torch.equal(buffer[np.array(rows, dtype=np.int32)], tensor[rows])
    assert torch.equal(buffer[torch.tensor(rows, dtype=torch.int64)], tensor[rows])


@fixture_is_read_only
@given(ends, ends, st.sampled_from([None, 1, 2, 7, -1, -3]))
def test_slices(buffer: DiscBuffer, tensor: torch.Tensor, start: int, stop: int, step: int) -> None:
    found = buffer[start:stop:step]
    np.testing.assert_array_equal(found.numpy(), tensor.numpy()[start:stop:step])
    assert found.shape[1:] == tensor.shape[1:]


def test_single_rows_and_the_length(buffer: DiscBuffer, tensor: torch.Tensor) -> None:
    assert len(buffer) == N
    for row in (0, 9, 10, np.int64(52), -1, -N):
        assert torch.equal(buffer[row], tensor[row])


@pytest.mark.parametrize("rows", [N, -N - 1, [0, N], [-N - 1], [0.5], [[1]], "a", [True]])
def test_rows_that_do_not_exist_are_index_errors(buffer: DiscBuffer, rows: object) -> None:
    with pytest.raises(IndexError):
        buffer[rows]


def test_the_bytes_are_those_that_h5py_reads(buffer: DiscBuffer, store: Path, columns: dict[str, np.ndarray]) -> None:
    found = {"tensor": buffer[:].numpy(), "token": buffer.tokens(slice(None)),
             "position": buffer.positions(range(N)), "document": buffer.documents(np.arange(N))}  # fmt: skip
    for name, values in found.items():
        parts = []
        for shard in sorted(store.glob("*.h5")):
            with h5py.File(shard) as file:
                parts.append(file[name][:])
        np.testing.assert_array_equal(values, np.concatenate(parts))
    assert buffer.documents([52, 0]).tolist() == [2**40 + 52, 2**40]
    assert found["document"].dtype == np.int64
    assert found["token"].dtype == np.int32


def test_bfloat16_keeps_every_bit(tmp_path: Path) -> None:
    bits = torch.arange(2**16, dtype=torch.int32).to(torch.int16).reshape(-1, 2, 4, 8)  # NaNs and infinities included
    write_store(tmp_path, bits.view(torch.bfloat16), 100)
    zero = torch.zeros(4, 8, dtype=torch.float64)  # which are finite, as a store's must be
    Statistics(zero, zero.clone(), zero.clone(), zero.clone(), len(bits)).save(tmp_path / "stats.safetensors")
    buffer = DiscBuffer(tmp_path)
    assert buffer[:].dtype == torch.bfloat16
    assert torch.equal(buffer[:].view(torch.int16), bits)
    with h5py.File(tmp_path / "shard_00000.h5") as file:
        np.testing.assert_array_equal(file["tensor"][:].view("i2"), bits[:100].numpy())


def test_reading_into_a_buffer(buffer: DiscBuffer, tensor: torch.Tensor) -> None:
    out = torch.zeros(12, 2, 3, 4, dtype=torch.float16)
    found = buffer.read(np.arange(5, 15), out[1:11])
    assert found.data_ptr() == out[1].data_ptr()
    assert torch.equal(out[1:11], tensor[5:15])
    assert not out[0].any()
    assert not out[11].any()


def test_reading_each_row_into_its_own_view(buffer: DiscBuffer, tensor: torch.Tensor) -> None:
    numbers = np.array([*range(3, 30), 52, 7, 8, 0])
    out = torch.zeros(N, *tensor.shape[1:], dtype=tensor.dtype)
    places = np.random.default_rng(0).permutation(N)[: len(numbers)]
    flat = out.view(N, -1).view(torch.uint8).numpy()
    buffer.read_into(numbers, [flat[place].data for place in places])
    wanted = torch.zeros_like(out)
    wanted[places] = tensor[numbers]
    assert torch.equal(out, wanted)


def test_threads_and_forked_processes_read_the_same(buffer: DiscBuffer, tensor: torch.Tensor) -> None:
    orders = [np.random.default_rng(seed).permutation(N) for seed in range(40)]
    with ThreadPoolExecutor(8) as pool:
        for order, found in zip(orders, pool.map(buffer.__getitem__, orders)):
            assert torch.equal(found, tensor[order])
    reader, writer = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of forks beside threads: torch has some
        child = os.fork()
    if child == 0:
        os.write(writer, b"same" if torch.equal(buffer[orders[0]], tensor[orders[0]]) else b"odd!")
        os._exit(0)
    assert os.read(reader, 4) == b"same"
    os.waitpid(child, 0)
    os.close(reader)
    os.close(writer)


def test_a_dataloader_takes_it_and_a_spawned_worker_opens_it_again(buffer: DiscBuffer, tensor: torch.Tensor) -> None:
    assert torch.equal(torch.cat(list(DataLoader(buffer, batch_size=20))), tensor)
    there = ForkingPickler.loads(ForkingPickler.dumps(buffer))  # how multiprocessing hands it over
    assert torch.equal(there[:], tensor)
    there.close()
    assert torch.equal(buffer[:], tensor)


def test_closing_closes_the_files(buffer: DiscBuffer, store: Path) -> None:
    def open_shards() -> int:
        links = (f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd"))
        return sum(str(store) in os.readlink(link) for link in links if os.path.lexists(link))

    buffer[:]
    assert open_shards() == 6
    buffer.close()
    assert open_shards() == 0


def test_missing_and_truncated_shards_are_found_when_opening(store: Path) -> None:
    shard = store / "shard_00003.h5"
    size = shard.stat().st_size
    os.truncate(shard, size - 300)
    with pytest.raises(UserError, match=rf"shard_00003.h5 is truncated: found {size - 300} bytes, wanted {size}; copy"):
        DiscBuffer(store)
    shard.unlink()
    with pytest.raises(UserError, match=r"shard_00003.h5 is missing; copy"):
        DiscBuffer(store)


def test_a_shard_truncated_after_opening_is_an_error_and_no_crash(buffer: DiscBuffer, store: Path) -> None:
    os.truncate(store / "shard_00000.h5", 2100)
    with pytest.raises(UserError, match=r"shard_00000.h5 is truncated: found 2100 bytes"):
        buffer[:10]


def test_missing_and_damaged_statistics(store: Path) -> None:
    (store / "stats.safetensors").write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"stats.safetensors is damaged"):
        DiscBuffer(store)
    (store / "stats.safetensors").unlink()
    with pytest.raises(UserError, match=r"stats.safetensors are missing"):
        DiscBuffer(store)
