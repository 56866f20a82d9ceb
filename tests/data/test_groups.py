"""Rows cut into groups of shards, and the places that they get there."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from clt.config import Config
from clt.data.groups import OpenGroup, Placement, rows_by_group
from clt.data.index import read_index
from clt.data.state import ExtractionState
from clt.data.statistics import Moments
from clt.lm.forward import forward_text
from clt.lm.load import load_language_model

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]


def start() -> ExtractionState:
    return ExtractionState([], 0, 0, Moments.zero(3, 16))


@pytest.mark.parametrize("device", DEVICES)
def test_pieces_end_with_groups_and_go_on_from_any_of_them(
    config: Callable[..., Config], stores: Path, device: str
) -> None:
    made = config()
    lm = load_language_model(made.lm, device)
    placement = Placement(stores / "train", read_index(stores / "train"), 64, 3)
    pieces = list(rows_by_group(made, placement, lm, start()))
    rows = torch.cat([rows.activations for rows, _ in pieces])
    assert rows.device.type == "cpu"
    wanted = torch.cat([rows.activations.cpu() for _, rows in forward_text(made, "train", lm)])[:1000]
    assert torch.equal(rows, wanted)
    ends = [number for number, (_, state) in enumerate(pieces) if state is not None]
    done = np.cumsum([len(rows) for rows, _ in pieces])[ends]
    assert done.tolist() == [192, 384, 576, 768, 960, 1000]
    for end, count in zip(ends[:-1], done[:-1]):
        reached = pieces[end][1]
        assert reached is not None
        assert reached.moments.rows == count
        shards = [{"file": "", "rows": int(count), "checksum": ""}]
        state = ExtractionState(shards, reached.windows, reached.skip_rows, reached.moments)  # type: ignore[arg-type]
        rest = list(rows_by_group(made, placement, lm, state))
        assert torch.equal(torch.cat([rows.activations for rows, _ in rest]), rows[count:])
        last, whole = rest[-1][1], pieces[-1][1]
        assert last is not None
        assert whole is not None
        assert torch.equal(last.moments.mean, whole.moments.mean)
        assert torch.equal(last.moments.squares, whole.moments.squares)


def test_places_depend_on_seed_group_and_part(config: Callable[..., Config], stores: Path, tmp_path: Path) -> None:
    index = read_index(stores / "train")
    other_seed = dataclasses.replace(index, seed=1)
    other_part = dataclasses.replace(index, text={**index.text, "part": "heldout"})
    orders = []
    for made, number in ((index, 0), (index, 0), (index, 1), (other_seed, 0), (other_part, 0)):
        group = OpenGroup(Placement(tmp_path, made, 64, 3), number)
        orders.append(tuple(group.order))
        group.files.close()
    assert orders[0] == orders[1]
    assert len(set(orders)) == 4
    assert all(sorted(order) == list(range(192)) for order in orders)
