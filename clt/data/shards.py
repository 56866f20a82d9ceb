"""Shard files: HDF5 says where each dataset starts, plain positioned reads and writes move the bytes.

Every dataset is contiguous, uncompressed and allocated when the file is created. `preadv` and `pwrite` take no global
lock and release the GIL. A truncated file is an error for them; a memory map of it would kill the process.
"""

from __future__ import annotations

import errno
import functools
import hashlib
import os
import re
from collections.abc import Callable
from io import FileIO
from pathlib import Path
from typing import Any

import h5py  # noqa: TID251
import numpy as np
from h5py import h5d, h5l, h5o, h5p, h5s, h5t  # noqa: TID251  # pyright: ignore[reportAttributeAccessIssue] - compiled, without stubs

from clt.data.index import RowShape, new_file
from clt.errors import UserError, mismatches

TENSOR_DTYPES = {"float16": np.dtype("f2"), "bfloat16": np.dtype("u2"), "float32": np.dtype("f4")}
COLUMN_DTYPES = {"token": np.dtype("i4"), "position": np.dtype("i4"), "document": np.dtype("i8")}
_VIEWS = os.sysconf("SC_IOV_MAX")  # that one system call can fill
_CHUNK = 1 << 19  # bytes hashed at once: they are still in the cache


def row_bytes(n_layers: int, d_acts: int, dtype: str) -> dict[str, int]:
    """Bytes of one row of each dataset."""
    columns = {name: column.itemsize for name, column in COLUMN_DTYPES.items()}
    return {"tensor": RowShape(n_layers, d_acts, dtype).row_bytes, **columns}


def create_shard(path: Path, rows: int, n_layers: int, d_acts: int, dtype: str) -> dict[str, int]:
    """Create a shard of unwritten rows; returns the byte at which each dataset starts, by name.

    The bytes of the file depend on the arguments alone: no timestamps, no fill values.
    """
    shapes = {"tensor": (rows, 2, n_layers, d_acts), **dict.fromkeys(COLUMN_DTYPES, (rows,))}
    dtypes, offsets = {"tensor": TENSOR_DTYPES[dtype], **COLUMN_DTYPES}, {}
    new_file(path).close()
    try:
        with h5py.File(path, "w", libver="earliest", locking=False) as file:
            for name, shape in shapes.items():
                settings = h5p.create(h5p.DATASET_CREATE)
                settings.set_layout(h5d.CONTIGUOUS)
                settings.set_alloc_time(h5d.ALLOC_TIME_EARLY)
                settings.set_fill_time(h5d.FILL_TIME_NEVER)
                settings.set_obj_track_times(False)
                dataset = h5d.create(
                    file.id, name.encode(), _hdf5_type(dtypes[name]), h5s.create_simple(shape), settings
                )
                offsets[name] = dataset.get_offset()
            file["tensor"].attrs["dtype"] = np.bytes_(dtype)  # numpy has no bfloat16: its bits are stored as uint16
    except (RuntimeError, OSError) as error:  # HDF5 hides the errno, or tells it in many lines with memory addresses
        if found := re.search(r"errno = (\d+)", str(error)):
            raise OSError(int(found[1]), os.strerror(int(found[1])), str(path)) from error
        raise
    if hasattr(os, "posix_fallocate"):  # a full disk shows here, and the blocks lie together on it
        with open(path, "r+b") as raw:
            os.posix_fallocate(raw.fileno(), 0, path.stat().st_size)
    return offsets


def dataset_offsets(path: Path, rows: int, n_layers: int, d_acts: int, dtype: str) -> dict[str, int]:
    """The byte at which each dataset of a shard starts, by name, after a check against the store's index.

    Raises UserError for a file that is missing, truncated, not HDF5, or whose datasets are not just as `create_shard`
    makes them: reads take their bytes as they lie in the file.
    """
    remedy = "copy this file again, or delete the store and run `clt extract CONFIG` again"
    if not path.is_file():
        raise UserError(f"shard {path} is missing; {remedy}")
    shapes = {"tensor": (rows, 2, n_layers, d_acts), **dict.fromkeys(COLUMN_DTYPES, (rows,))}
    dtypes = {"tensor": TENSOR_DTYPES[dtype], **COLUMN_DTYPES}
    wanted = {name: f"{dtypes[name].str} {shape} contiguous" for name, shape in shapes.items()}
    try:
        with h5py.File(path, "r", locking=False) as file:
            found = {name: _described(file.id, name, dtypes[name]) for name in wanted}
            odd = mismatches({name: text for name, (text, _) in found.items()}, wanted)
            if not odd:
                odd = mismatches({"dtype": file["tensor"].attrs.get("dtype")}, {"dtype": dtype.encode()})
    except (OSError, KeyError, RuntimeError, TypeError, ValueError) as error:  # whatever h5py raises for damaged bytes
        if sizes := re.search(r"truncated file: eof = (\d+), .*stored_eof = (\d+)", str(error)):
            raise UserError(
                f"shard {path} is truncated: found {sizes[1]} bytes, wanted {sizes[2]}; {remedy}"
            ) from error
        raise UserError(f"shard {path} is not readable as a shard ({error}); {remedy}") from error
    if odd:
        raise UserError(f"shard {path} is not what its format and index.json say: {odd}; {remedy}")
    return {name: offset for name, (_, offset) in found.items()}


def _described(file: Any, name: str, kind: np.dtype) -> tuple[str, int]:
    """Byte order, type, shape and storage of a dataset, and its place: reads take its bytes as they lie in the file."""
    key = name.encode()
    if not file.links.exists(key):
        return "nothing", 0
    if file.links.get_info(key).type != h5l.TYPE_HARD:
        return "a link to elsewhere", 0
    dataset = h5o.open(file, key)
    if not isinstance(dataset, h5d.DatasetID):
        return type(dataset).__name__, 0
    settings = dataset.get_create_plist()
    plain = settings.get_layout() == h5d.CONTIGUOUS and settings.get_external_count() == 0
    at = dataset.get_offset()  # None for bytes that were never allocated
    stored = plain and at is not None and at + dataset.get_storage_size() <= file.get_filesize()
    same = dataset.get_type().equal(_hdf5_type(kind))
    type_ = kind.str if same else f"{dataset.dtype.str} (HDF5 type)"
    return f"{type_} {dataset.shape} {'contiguous' if stored else 'stored otherwise'}", at or 0


@functools.cache
def _hdf5_type(kind: np.dtype) -> Any:
    return h5t.py_create(kind.newbyteorder("<"))


def read_at(file: FileIO, views: list[memoryview], offset: int) -> None:
    """Fill `views`, one after the other, with the bytes from `offset` on. Raises UserError when the file ends early."""
    end = offset + sum(map(len, views))
    while views:
        first = views[:_VIEWS]
        count = os.preadv(file.fileno(), first, offset)
        if count == 0:
            raise UserError(
                f"shard {file.name} is truncated: found {os.fstat(file.fileno()).st_size} bytes, wanted {end}; "
                "it changed while it was read: copy this file again"
            )
        offset += count
        # Usually one call reads everything; a loop over the views would take longer than reading small rows.
        views = views[_VIEWS:] if count == sum(map(len, first)) else _unfilled(views, count)


def _unfilled(views: list[memoryview], count: int) -> list[memoryview]:
    """The views, or rest of a view, that follow the first `count` bytes."""
    at = 0
    while count >= len(views[at]):
        count -= len(views[at])
        at += 1
    return [views[at][count:], *views[at + 1 :]]


def write_at(fd: int, view: memoryview, offset: int) -> None:
    """Write all of `view` (bytes, contiguous) at `offset`. Raises OSError, e.g. for a full disk."""
    while len(view):
        count = os.pwrite(fd, view, offset)
        view, offset = view[count:], offset + count


def checksum(path: Path, kind: str = "xxh3_128") -> str:
    """`kind:` and the hexadecimal digest of the file's bytes, as `xxhsum -H2` prints it; sha256 in older stores.

    xxh3 hashes 12 GB/s where sha256 reaches 1.4 (measured). Raises UserError for any other kind.
    """
    import xxhash  # here: training does not need it

    kinds: dict[str, Callable[[], Any]] = {"xxh3_128": xxhash.xxh3_128, "sha256": hashlib.sha256}
    if kind not in kinds:
        raise UserError(
            f"checksum kind {kind!r} of {path.name} is unknown, wanted one of {', '.join(kinds)}; "
            "read the store with the version that made it, or correct index.json"
        )
    digest, chunk = kinds[kind](), memoryview(bytearray(_CHUNK))
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(chunk):
            digest.update(chunk[:count])
    return f"{kind}:{digest.hexdigest()}"


def is_full_disk(error: OSError) -> bool:
    """Whether an error means that no more can be written: disk, quota or file size limit."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
