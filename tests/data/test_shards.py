import errno
import os
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import h5py
import numpy as np
import pytest
import xxhash

from clt.data import shards
from clt.errors import UserError


@pytest.mark.parametrize(("dtype", "stored"), [("float16", "f2"), ("bfloat16", "u2"), ("float32", "f4")])
def test_rows_written_at_random_places_are_what_h5py_reads(tmp_path: Path, dtype: str, stored: str) -> None:
    path = tmp_path / "shard.h5"
    offsets = shards.create_shard(path, 9, 2, 3, dtype)
    wanted = np.random.default_rng(0).standard_normal((9, 2, 2, 3)).astype("f4").astype(stored)
    fd = os.open(path, os.O_WRONLY)
    for row in np.random.default_rng(1).permutation(9):
        shards.write_at(fd, wanted[row].reshape(-1).view("u1").data, offsets["tensor"] + row * wanted[0].nbytes)
    for name, column in shards.COLUMN_DTYPES.items():
        shards.write_at(fd, np.arange(9, dtype=column).view("u1").data, offsets[name])
    os.close(fd)
    with h5py.File(path) as file:
        np.testing.assert_array_equal(file["tensor"][:], wanted)
        assert file["tensor"].attrs["dtype"] == dtype.encode()
        assert file["tensor"].chunks is None
        for name, column in shards.COLUMN_DTYPES.items():
            assert file[name].dtype == column
            np.testing.assert_array_equal(file[name][:], np.arange(9))
    assert shards.dataset_offsets(path, 9, 2, 3, dtype) == offsets


def test_a_new_shard_has_the_same_bytes_every_time(tmp_path: Path) -> None:
    for name in ("a", "b"):
        shards.create_shard(tmp_path / name, 5, 2, 3, "float16")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize("missing", [1, 1000])
def test_a_truncated_shard_is_named_with_its_sizes(tmp_path: Path, missing: int) -> None:
    path = tmp_path / "shard.h5"
    shards.create_shard(path, 50, 2, 3, "float32")
    size = path.stat().st_size
    os.truncate(path, size - missing)
    with pytest.raises(UserError, match=rf"shard.h5 is truncated: found {size - missing} bytes, wanted {size}"):
        shards.dataset_offsets(path, 50, 2, 3, "float32")


def test_files_that_are_not_the_expected_shard_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "shard.h5"
    with pytest.raises(UserError, match="is missing"):
        shards.dataset_offsets(path, 5, 2, 3, "float16")
    path.write_bytes(b"not HDF5" * 1000)
    with pytest.raises(UserError, match="not readable as a shard"):
        shards.dataset_offsets(path, 5, 2, 3, "float16")
    shards.create_shard(path, 5, 2, 3, "float16")
    with pytest.raises(UserError, match=r"holds \(5, 2, 2, 3\) float16 where index.json says \(4, 2, 2, 3\) bfloat16"):
        shards.dataset_offsets(path, 4, 2, 3, "bfloat16")
    with h5py.File(path, "w") as file:
        file.create_dataset("tensor", data=np.zeros((5, 2, 2, 3), "f2"), chunks=True).attrs["dtype"] = np.bytes_(
            "float16"
        )
        for name, column in shards.COLUMN_DTYPES.items():
            file[name] = np.zeros(5, column)
    with pytest.raises(UserError, match="chunked or compressed"):
        shards.dataset_offsets(path, 5, 2, 3, "float16")


def test_a_file_that_ends_early_while_it_is_read_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "short"
    path.write_bytes(b"x" * 10)
    with (
        open(path, "rb", buffering=0) as file,
        pytest.raises(UserError, match=f"shard {path} is truncated: found 10 bytes, wanted 12"),
    ):
        shards.read_at(file, [memoryview(bytearray(8))], 4)


@pytest.mark.parametrize("most", [1, 3, 4, 7, 100])
def test_short_reads_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    """As from a network file system, and with more views than one call takes."""
    path, data, whole = tmp_path / "bytes", os.urandom(100), os.preadv

    def preadv(fd: int, views: list[memoryview], offset: int) -> int:
        assert len(views) <= 5
        part = bytearray(min(most, sum(map(len, views))))
        count = whole(fd, [part], offset)
        for view in views:
            view[:] = bytes(part[: len(view)]) + bytes(view[len(part) :])
            part = part[len(view) :]
        return count

    monkeypatch.setattr(shards, "_VIEWS", 5)
    monkeypatch.setattr(os, "preadv", preadv)
    path.write_bytes(data)
    out = memoryview(bytearray(90))
    ends = [0, 4, 5, 12, 20, 21, 30, 44, 45, 60, 75, 80, 90]
    with open(path, "rb", buffering=0) as file:
        shards.read_at(file, [out[a:b] for a, b in pairwise(ends)], 10)
    assert out == data[10:]


def test_checksums_are_those_of_the_published_algorithms(tmp_path: Path) -> None:
    path = tmp_path / "bytes"
    path.write_bytes(b"")
    # XXH3 of no bytes, from the tests of the reference implementation
    assert shards.checksum(path) == "xxh3_128:99aa06d3014798d86001c324468d497f"
    data = os.urandom(5 << 20)
    path.write_bytes(data)
    assert shards.checksum(path) == f"xxh3_128:{xxhash.xxh3_128_hexdigest(data)}"  # in one piece
    wanted = subprocess.run(["sha256sum", str(path)], capture_output=True, text=True, check=True).stdout.split()[0]
    assert shards.checksum(path, "sha256") == f"sha256:{wanted}"
    with pytest.raises(UserError, match="checksum kind 'md5' of bytes is unknown, wanted one of xxh3_128, sha256"):
        shards.checksum(path, "md5")


@pytest.mark.parametrize("kib", [0, 1, 3, 8])
def test_a_shard_that_does_not_fit_on_the_disk(tmp_path: Path, kib: int) -> None:
    code = (
        "import resource, signal, sys; from pathlib import Path; from clt.data import shards\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({kib << 10}, resource.RLIM_INFINITY))\n"
        "try: shards.create_shard(Path(sys.argv[1]), 1000, 2, 3, 'float16')\n"
        "except OSError as error: print(shards.is_full_disk(error), error, sep='\\n')\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "s.h5")], capture_output=True, text=True, check=False
    )
    assert run.stdout.splitlines()[0] == "True", run.stderr
    assert re.fullmatch(
        rf"\[Errno {errno.EFBIG}\] File too large(: '.*s\.h5')?", "\n".join(run.stdout.splitlines()[1:])
    )
