import errno
import fcntl
import os
import re
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

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
    with pytest.raises(UserError, match=r"tensor: found '<f2 .* \(5, 2, 2, 3\) con.*', wanted '<u2 \(4, 2, 2, 3\) con"):
        shards.dataset_offsets(path, 4, 2, 3, "bfloat16")


def _float64(file: h5py.File) -> None:
    _put(file, "tensor", "<f8")


def _big_endian(file: h5py.File) -> None:
    _put(file, "tensor", ">f2")


def _int16(file: h5py.File) -> None:
    _put(file, "tensor", "<i2")


def _other_float16(file: h5py.File) -> None:
    """Two bytes, but the exponent has eight bits as bfloat16's: h5py has no dtype of its own for it."""
    kind = h5py.h5t.IEEE_F16LE.copy()
    kind.set_fields(15, 7, 8, 0, 7)
    kind.set_ebias(127)
    del file["tensor"]
    space = h5py.h5s.create_simple((5, 2, 2, 3))
    settings = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    settings.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    h5py.h5d.create(file.id, b"tensor", kind, space, settings)
    file["tensor"].attrs["dtype"] = np.bytes_("float16")


def _wide_token(file: h5py.File) -> None:
    _put(file, "token", "<i8")


def _unsigned_document(file: h5py.File) -> None:
    _put(file, "document", "<u8")


def _short_position(file: h5py.File) -> None:
    del file["position"]
    file["position"] = np.zeros(4, "<i4")


def _chunked(file: h5py.File) -> None:
    _put(file, "tensor", "<f2", chunks=True)


def _external_storage(file: h5py.File) -> None:
    _put(file, "token", "<i4", external=[(file.filename + ".raw", 0, 20)])


def _virtual(file: h5py.File) -> None:
    layout = h5py.VirtualLayout((5,), "<i4")
    layout[:] = h5py.VirtualSource(file.filename + ".other", "token", (5,))
    del file["token"]
    file.create_virtual_dataset("token", layout)


def _external_link(file: h5py.File) -> None:
    with h5py.File(file.filename + ".other", "w") as other:
        other["token"] = np.zeros(5, "<i4")
    del file["token"]
    file["token"] = h5py.ExternalLink(file.filename + ".other", "token")


def _cycle(file: h5py.File) -> None:
    del file["token"]
    file["token"] = h5py.SoftLink("/token")


def _group(file: h5py.File) -> None:
    del file["document"]
    file.create_group("document")


def _named_type(file: h5py.File) -> None:
    del file["document"]
    file["document"] = np.dtype("<i8")


def _missing(file: h5py.File) -> None:
    del file["position"]


def _string_attribute(file: h5py.File) -> None:
    file["tensor"].attrs["dtype"] = "float16"


def _number_attribute(file: h5py.File) -> None:
    file["tensor"].attrs["dtype"] = 16


def _other_attribute(file: h5py.File) -> None:
    file["tensor"].attrs["dtype"] = np.bytes_("bfloat16")


def _no_attribute(file: h5py.File) -> None:
    del file["tensor"].attrs["dtype"]


def _put(file: h5py.File, name: str, kind: str, **storage: Any) -> None:
    """In place of a dataset one of another type, or stored in another way."""
    shape, attributes = file[name].shape, dict(file[name].attrs)
    del file[name]
    settings = storage or {"data": np.zeros(shape, kind)}
    file.create_dataset(name, shape, kind, **settings).attrs.update(attributes)


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (
            _float64,
            r"tensor: found '<f8 .HDF5 type. \(5, 2, 2, 3\) contiguous', wanted '<f2 \(5, 2, 2, 3\) contiguous'",
        ),
        (_big_endian, r"tensor: found '>f2 .* wanted '<f2 "),
        (_int16, r"tensor: found '<i2 .* wanted '<f2 "),
        (_other_float16, r"tensor: found '.*HDF5 type.* wanted '<f2 "),
        (_wide_token, r"token: found '<i8 .* wanted '<i4 "),
        (_unsigned_document, r"document: found '<u8 .* wanted '<i8 "),
        (_short_position, r"position: found '<i4 \(4,\) contiguous', wanted '<i4 \(5,\) contiguous'"),
        (_chunked, r"tensor: found '<f2 \(5, 2, 2, 3\) stored otherwise', wanted '<f2 \(5, 2, 2, 3\) contiguous'"),
        (_external_storage, r"token: found '<i4 \(5,\) stored otherwise'"),
        (_virtual, r"token: found '<i4 \(5,\) stored otherwise'"),
        (_external_link, "token: found 'a link to elsewhere'"),
        (_cycle, "token: found 'a link to elsewhere'"),
        (_group, "document: found 'GroupID'"),
        (_named_type, "document: found 'TypeI[^']*'"),
        (_missing, "position: found 'nothing'"),
        (_string_attribute, "dtype: found 'float16', wanted b'float16'"),
        (_number_attribute, "dtype: found .*16.*, wanted b'float16'"),
        (_other_attribute, ".*dtype: found .*b'bfloat16'.*, wanted b'float16'"),
        (_no_attribute, "dtype: found None, wanted b'float16'"),
    ],
)
def test_a_dataset_that_is_not_as_it_is_written_is_refused(
    tmp_path: Path, change: Callable[[h5py.File], None], found: str
) -> None:
    """Their bytes would be read as numbers of another type, or from another place."""
    path = tmp_path / "shard.h5"
    shards.create_shard(path, 5, 2, 3, "float16")
    shards.dataset_offsets(path, 5, 2, 3, "float16")
    with h5py.File(path, "r+") as file:
        change(file)
    with pytest.raises(UserError, match=rf"shard {path} is not what its format and index.json say: {found}.*; copy"):
        shards.dataset_offsets(path, 5, 2, 3, "float16")


def test_hdf5_takes_no_lock_of_its_own(tmp_path: Path) -> None:
    """Its lock fails where the file system has none, and where another process holds one."""
    path = tmp_path / "shard.h5"
    offsets = shards.create_shard(path, 5, 2, 3, "float16")
    with path.open("rb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        assert shards.dataset_offsets(path, 5, 2, 3, "float16") == offsets
        assert shards.create_shard(path, 5, 2, 3, "float16") == offsets


def test_damaged_metadata_end_in_a_message(tmp_path: Path) -> None:
    """Whatever byte before the data is altered: the shard is the same as before, or refused."""
    path = tmp_path / "shard.h5"
    offsets = shards.create_shard(path, 5, 2, 3, "float16")
    whole = path.read_bytes()
    refused = 0
    for place in range(0, offsets["tensor"], 3):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
        try:
            assert shards.dataset_offsets(path, 5, 2, 3, "float16").keys() == offsets.keys()
        except UserError:
            refused += 1
    assert refused > 50


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
