"""Rows written in the background: complete groups are recorded in order, and incomplete ones leave no files."""

import dataclasses
import errno
import threading
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from clt.data import writer as writing
from clt.data.index import read_index
from clt.data.shards import write_at
from clt.data.state import STATE, ExtractionState, load_state
from clt.data.statistics import Moments
from clt.data.store import DiscBuffer
from clt.data.writer import OpenGroup, Placement, Writer, write_store
from clt.lm.forward import Rows
from tests.data.conftest import D, L

GROUP = 12
IDENTITY = {"seed": 0, "n_layers": L, "d_acts": D}
FULL = OSError(errno.ENOSPC, "No space left on device")


def state_at(group: int) -> ExtractionState:
    """The state after that many groups, as it comes with the last rows of the one before."""
    return ExtractionState([], group, 0, Moments.zero(L, D))


@pytest.fixture
def placement(store: Path, tmp_path: Path) -> Placement:
    """Four groups of two shards of 6 rows, and a last one of 5 rows."""
    (tmp_path / "new").mkdir()
    return Placement(tmp_path / "new", read_index(store), 6, 2)


@pytest.fixture
def rows(tensor: torch.Tensor, columns: dict[str, np.ndarray]) -> Rows:
    return Rows(tensor, **columns)


def put(writer: Writer, rows: Rows, first_group: int = 0, piece: int = 5) -> None:
    """Hand over the rows in pieces that end with groups."""
    for number, start in enumerate(range(0, len(rows), GROUP), first_group + 1):
        group = rows[start : start + GROUP]
        for first in range(0, len(group), piece):
            ends = first + piece >= len(group)
            writer.put(group[first : first + piece], state_at(number) if ends else None)


def recorded(placement: Placement, rows: Rows) -> tuple[list[str], int]:
    """The shards that the state on disk names, and its windows, which are groups here.

    The directory holds nothing else, and the shards hold the first rows of the text.
    """
    state = load_state(placement.path, IDENTITY)
    files = [shard["file"] for shard in state.shards] if state else []
    names = sorted(file.name for file in placement.path.iterdir())
    assert names == files + ([STATE] if state else [])
    documents: list[int] = []
    for file in files:
        with h5py.File(placement.path / file) as shard:
            documents += shard["document"][:].tolist()
    assert sorted(documents) == rows.document[: len(documents)].tolist()
    return files, state.windows if state else 0


def test_complete_groups_are_recorded_in_order(placement: Placement, rows: Rows) -> None:
    with Writer(placement, state_at(0), IDENTITY) as writer:
        put(writer, rows)
    assert recorded(placement, rows) == ([f"shard_{number:05d}.h5" for number in range(9)], 5)
    assert writer.state.rows == len(rows)


def test_writing_resumes_after_the_groups_of_a_state(placement: Placement, rows: Rows) -> None:
    with Writer(placement, state_at(0), IDENTITY) as writer:
        put(writer, rows[:24])
    with Writer(placement, writer.state, IDENTITY) as writer:
        put(writer, rows[24:], first_group=2)
    assert recorded(placement, rows) == ([f"shard_{number:05d}.h5" for number in range(9)], 5)


def test_an_error_of_the_caller_keeps_complete_groups_and_deletes_the_open_one(
    placement: Placement, rows: Rows
) -> None:
    with pytest.raises(KeyError), Writer(placement, state_at(0), IDENTITY) as writer:  # noqa: PT012
        put(writer, rows[:24])
        writer.put(rows[24:29])
        raise KeyError
    assert recorded(placement, rows) == ([f"shard_{number:05d}.h5" for number in range(4)], 2)


@pytest.mark.parametrize("piece", [5, GROUP])
@pytest.mark.parametrize("fails_at", [1, 3, GROUP + 1, 2 * GROUP])
def test_nothing_is_written_after_a_row_that_could_not_be(
    placement: Placement, rows: Rows, monkeypatch: pytest.MonkeyPatch, piece: int, fails_at: int
) -> None:
    """The disk is full for one row only. No later row may take its place, or a resumed extraction would lose rows."""
    written = 0

    def limited(fd: int, view: memoryview, offset: int) -> None:
        nonlocal written
        if threading.current_thread().name.startswith("clt-pwrite"):  # they write rows; columns are written elsewhere
            written += 1
            if written == fails_at:
                raise FULL
        write_at(fd, view, offset)

    monkeypatch.setattr(writing, "write_at", limited)
    with pytest.raises(OSError, match="No space left"), Writer(placement, state_at(0), IDENTITY) as writer:
        put(writer, rows, piece=piece)
    complete = (fails_at - 1) // GROUP
    assert recorded(placement, rows) == ([f"shard_{number:05d}.h5" for number in range(2 * complete)], complete)


@pytest.mark.parametrize("step", ["create_shard", "checksum", "rename_synced"])
@pytest.mark.parametrize("fails", [0, 1])
def test_a_group_that_cannot_be_created_or_finished(
    placement: Placement, rows: Rows, monkeypatch: pytest.MonkeyPatch, step: str, fails: int
) -> None:
    call, shard = getattr(writing, step), f"shard_{2 * fails:05d}.h5.partial"

    def limited(path: Path, *arguments: object) -> object:
        if path.name == shard:
            raise FULL
        return call(path, *arguments)

    monkeypatch.setattr(writing, step, limited)
    with pytest.raises(OSError, match="No space left"), Writer(placement, state_at(0), IDENTITY) as writer:
        put(writer, rows)
    for orphan in sorted(placement.path.glob("*.h5"))[2 * fails :]:  # a resumed extraction replaces them
        assert step == "rename_synced"
        orphan.unlink()
    assert recorded(placement, rows) == ([f"shard_{number:05d}.h5" for number in range(2 * fails)], fails)


def test_a_state_that_cannot_be_saved_ends_the_writing(
    placement: Placement, rows: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The state on disk is behind the shards then, and a resumed extraction writes them again."""
    saved: list[int] = []
    save = ExtractionState.save

    def limited(state: ExtractionState, *arguments: object) -> None:
        if saved:
            raise FULL
        saved.append(state.windows)
        save(state, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(ExtractionState, "save", limited)
    with pytest.raises(OSError, match="No space left"), Writer(placement, state_at(0), IDENTITY) as writer:
        put(writer, rows)
    monkeypatch.undo()
    assert writer.state.windows == 1
    assert {file.name for file in placement.path.iterdir()} == {STATE, *(f"shard_0000{i}.h5" for i in range(4))}
    with Writer(placement, load_state(placement.path, IDENTITY) or state_at(0), IDENTITY) as writer:
        put(writer, rows[GROUP:], first_group=1)
    assert recorded(placement, rows) == ([f"shard_{number:05d}.h5" for number in range(9)], 5)


def test_places_depend_on_seed_group_and_part(placement: Placement) -> None:
    index = placement.index
    other_seed = dataclasses.replace(index, seed=1)
    other_part = dataclasses.replace(index, text={**index.text, "part": "heldout"})
    orders = []
    for made, number in ((index, 0), (index, 0), (index, 1), (other_seed, 0), (other_part, 0)):
        group = OpenGroup(dataclasses.replace(placement, index=made), number)
        orders.append(tuple(group.order))
        group.files.close()
    assert orders[0] == orders[1]
    assert len(set(orders)) == 4
    assert all(sorted(order) == list(range(GROUP)) for order in orders)


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
