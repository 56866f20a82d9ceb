"""Rows written in the background: what is whole is recorded in order, and what is not leaves nothing."""

import errno
from pathlib import Path

import numpy as np
import pytest
import torch

from clt.data import groups
from clt.data.groups import Placement
from clt.data.index import ShardEntry, read_index
from clt.data.state import ExtractionState
from clt.data.statistics import Moments
from clt.data.store import DiscBuffer
from clt.data.writer import Writer, write_store
from clt.lm.forward import Rows
from tests.data.conftest import D, L


class Record:
    """What a writer tells of whole groups."""

    def __init__(self) -> None:
        self.files: list[str] = []
        self.windows: list[int] = []

    def __call__(self, entries: list[ShardEntry], state: ExtractionState | None) -> None:
        assert state is not None
        self.files += [entry["file"] for entry in entries]
        self.windows.append(state.windows)


@pytest.fixture
def placement(store: Path, tmp_path: Path) -> Placement:
    """Four groups of two shards of 6 rows, and a last one of 5 rows."""
    (tmp_path / "new").mkdir()
    return Placement(tmp_path / "new", read_index(store), 6, 2)


def put(writer: Writer, rows: Rows, first_group: int = 0) -> None:
    """Hand over the rows in pieces of 5 or fewer that end with groups."""
    for number, start in enumerate(range(0, len(rows), 12), first_group):
        group = rows[start : start + 12]
        for first in range(0, len(group), 5):
            ends = first + 5 >= len(group)
            writer.put(group[first : first + 5], ExtractionState([], number, 0, Moments.zero(L, D)) if ends else None)


@pytest.fixture
def rows(tensor: torch.Tensor, columns: dict[str, np.ndarray]) -> Rows:
    return Rows(tensor, **columns)


def test_whole_groups_are_recorded_in_order(placement: Placement, rows: Rows) -> None:
    record = Record()
    with Writer(placement, 0, record) as writer:
        put(writer, rows)
    assert record.windows == [0, 1, 2, 3, 4]
    assert record.files == sorted(file.name for file in placement.path.iterdir())
    assert record.files == [f"shard_{number:05d}.h5" for number in range(9)]


def test_writing_goes_on_at_a_later_group(placement: Placement, rows: Rows) -> None:
    record = Record()
    with Writer(placement, 2, record) as writer:
        put(writer, rows[24:], first_group=2)
    assert record.files == [f"shard_{number:05d}.h5" for number in range(4, 9)]


def test_an_error_of_the_caller_keeps_whole_groups_and_deletes_the_open_one(placement: Placement, rows: Rows) -> None:
    record = Record()
    with pytest.raises(KeyError), Writer(placement, 0, record) as writer:  # noqa: PT012
        put(writer, rows[:24])
        writer.put(rows[24:29])
        raise KeyError
    assert record.windows == [0, 1]
    assert record.files == sorted(file.name for file in placement.path.iterdir())


@pytest.mark.parametrize("calls", [0, 3])
def test_a_full_disk_is_raised_to_the_caller(
    placement: Placement, rows: Rows, monkeypatch: pytest.MonkeyPatch, calls: int
) -> None:
    left, write_at = iter(range(calls)), groups.write_at

    def limited(fd: int, view: memoryview, offset: int) -> None:
        if next(left, None) is None:
            raise OSError(errno.ENOSPC, "No space left on device")
        write_at(fd, view, offset)

    monkeypatch.setattr(groups, "write_at", limited)
    record = Record()
    with pytest.raises(OSError, match="No space left"), Writer(placement, 0, record) as writer:
        put(writer, rows)
    assert record.files == sorted(file.name for file in placement.path.iterdir())
    assert record.files == []


def test_a_record_that_fails_is_raised_and_ends_the_writing(placement: Placement, rows: Rows) -> None:
    told = []

    def record(entries: list[ShardEntry], state: ExtractionState | None) -> None:
        told.append(len(entries))
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space left"), Writer(placement, 0, record) as writer:
        put(writer, rows)
    assert told == [2]
    assert not list(placement.path.glob("*.partial"))


def test_a_store_of_rows_in_memory_keeps_their_order(tmp_path: Path, rows: Rows) -> None:
    columns = {"token": rows.token, "position": rows.position, "document": rows.document}
    index = write_store(tmp_path, rows.activations, 10, columns, model="a model", context=7)
    assert (index.model, index.context, index.rows) == ("a model", 7, len(rows))
    assert read_index(tmp_path) == index
    buffer = DiscBuffer(tmp_path)
    assert torch.equal(buffer[:], rows.activations)
    np.testing.assert_array_equal(buffer.documents(slice(None)), rows.document)
    write_store(tmp_path / "plain", rows.activations)
    assert not DiscBuffer(tmp_path / "plain").tokens(slice(None)).any()
