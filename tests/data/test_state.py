"""The state of an interrupted extraction, written and read again."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from clt.data.state import STATE, ExtractionState, load_state
from clt.data.statistics import Moments
from clt.errors import UserError

IDENTITY = {"dtype": "float16", "seed": 0, "n_layers": 2, "d_acts": 3}


def state_after(rows: torch.Tensor) -> ExtractionState:
    moments = Moments.zero(2, 3)
    moments.add(rows)
    shards = [{"file": "shard_00000.h5", "rows": len(rows), "checksum": "xxh3_128:0"}] if len(rows) else []
    return ExtractionState(shards, 8, 3, moments)  # type: ignore[arg-type]


@pytest.mark.parametrize("cut", [0, 7, 19, 20])
def test_moments_continue_from_a_saved_state(tmp_path: Path, cut: int) -> None:
    rows, whole = torch.randn(20, 2, 2, 3), Moments.zero(2, 3)
    saved = state_after(rows[:cut])
    saved.save(tmp_path, IDENTITY)
    found = load_state(tmp_path, IDENTITY)
    assert found is not None
    assert (found.shards, found.windows, found.skip_rows, found.rows) == (saved.shards, 8, 3, cut)
    for part in (rows[:cut], rows[cut:]):
        whole.add(part)
    found.moments.add(rows[cut:])
    assert found.moments.rows == 20
    assert torch.equal(found.moments.mean, whole.mean)
    assert torch.equal(found.moments.squares, whole.squares)


def test_without_a_state_unfinished_files_are_deleted(tmp_path: Path) -> None:
    for name in ("shard_00000.h5.partial", f"{STATE}.partial", "shard_00001.h5"):
        (tmp_path / name).touch()
    assert load_state(tmp_path, IDENTITY) is None
    assert [file.name for file in tmp_path.iterdir()] == ["shard_00001.h5"]


def test_a_state_of_another_extraction_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    state_after(torch.randn(4, 2, 2, 3)).save(tmp_path, IDENTITY)
    (tmp_path / "shard_00001.h5.partial").touch()
    with pytest.raises(UserError, match="something else: seed: found 0, wanted 1; set these back"):
        load_state(tmp_path, {**IDENTITY, "seed": 1})
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("content", [b"", b"{", b"\x08\0\0\0\0\0\0\0{}      "])
def test_a_damaged_state(tmp_path: Path, content: bytes) -> None:
    (tmp_path / STATE).write_bytes(content)
    with pytest.raises(UserError, match=r"state.safetensors is damaged .*; delete .* and extract it again"):
        load_state(tmp_path, IDENTITY)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"windows": "8"}, "windows is '8'; wanted int"),
        ({"skip_rows": -1}, "skip_rows is -1; wanted zero or a positive number"),
        ({"shards": [{"file": "shard_00000.h5", "rows": 4}]}, "shards is .*; wanted list.*ShardEntry"),
        ({"shards": None}, "shards is None; wanted list"),
        ({"identity": [1]}, r"identity is \[1\]; wanted dict"),
        (
            {"identity": IDENTITY | {"d_acts": 4}},
            r"the moments are torch.float64 \(2, 2, 3\), wanted finite .* \(2, 2, 4\)",
        ),
        ({"surprise": 1}, "unknown surprise"),
    ],
)
def test_a_state_with_a_wrong_field(tmp_path: Path, change: dict[str, Any], what: str) -> None:
    state_after(torch.randn(4, 2, 2, 3)).save(tmp_path, IDENTITY)
    with safe_open(tmp_path / STATE, "pt") as file:
        fields, tensors = (
            json.loads(file.metadata()["state"]),
            {name: file.get_tensor(name) for name in ("mean", "squares")},
        )
    save_file(tensors, tmp_path / STATE, {"state": json.dumps(fields | change)})
    with pytest.raises(UserError, match=rf"state.safetensors is damaged \(.*{what}.*\); delete {tmp_path} and extract"):
        load_state(tmp_path, IDENTITY)


def test_a_state_whose_moments_are_not_finite(tmp_path: Path) -> None:
    saved = state_after(torch.randn(4, 2, 2, 3))
    saved.moments.squares[0, 0, 0] = float("nan")
    saved.save(tmp_path, IDENTITY)
    with pytest.raises(UserError, match=r"state.safetensors is damaged \(the moments are .*, wanted finite float64"):
        load_state(tmp_path, IDENTITY)


def test_a_finished_store_that_lost_its_index_is_refused(tmp_path: Path) -> None:
    (tmp_path / "stats.safetensors").touch()
    with pytest.raises(UserError, match=r"finished store but no index.json: copy its index.json there again"):
        load_state(tmp_path, IDENTITY)
