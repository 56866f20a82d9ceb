"""Firings that several processes have collected, each a share of the text, as those of one.

firings/share_0_of_2 ..   the files of each rank (clt/explore/firings.py), with a state.json that says how far they are
firings/whole             all of them, made by rank 0; there only when it is complete
"""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np

from clt.data.index import write_json
from clt.errors import UserError
from clt.explore.firings import OF_LAYER, OF_TEXT
from clt.files import read_object

STATE, WHOLE = "state.json", "whole"
FIELDS = {"identity": dict, "windows": int, "firings": list[int], "done": bool}
_LOOK_SECONDS, _COPIED = 0.2, 1 << 21  # between two looks for the other ranks; elements at once


def share_directory(directory: Path, rank: int, ranks: int) -> Path:
    """That of a rank's files."""
    return directory / f"share_{rank}_of_{ranks}"


def check_ranks(directory: Path, ranks: int) -> None:
    """Raise UserError when the shares in `directory` are of another number of processes."""
    if odd := {path.name.rpartition("_")[2] for path in directory.glob("share_*_of_*")} - {str(ranks)}:
        raise UserError(
            f"{directory.parent} holds features that {odd.pop()} processes have begun, found {ranks} now; finish them "
            "with as many as before, or delete it"
        )


def unite(directory: Path, ranks: int, n_layers: int) -> None:
    """Wait for all ranks, then make `whole` of their shares. An interrupted call is begun again from the shares."""
    shares = [share_directory(directory, rank, ranks) for rank in range(ranks)]
    while len(states := _finished(shares)) < ranks:
        time.sleep(_LOOK_SECONDS)
    if ranks == 1:
        shares[0].rename(directory / WHOLE)
        return
    partial = directory / f"{WHOLE}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    for name in (f"text.{name}" for name in OF_TEXT):
        _append([share / name for share in shares], partial / name)
    for s in range(n_layers):
        for name in ("feature", "value"):
            _append([share / f"layer_{s}.{name}" for share in shares], partial / f"layer_{s}.{name}")
        _append_ends([share / f"layer_{s}.end" for share in shares], partial / f"layer_{s}.end")
    windows = sum(state["windows"] for state in states)
    firings = [sum(of_layer) for of_layer in zip(*(state["firings"] for state in states))]
    write_json(partial / STATE, states[0] | {"windows": windows, "firings": firings})
    partial.rename(directory / WHOLE)
    for share in shares:
        shutil.rmtree(share)


def _finished(shares: list[Path]) -> list[dict[str, Any]]:
    """The states of the shares that are complete."""
    there = [share / STATE for share in shares if (share / STATE).exists()]
    states = [read_object(file, FIELDS, "delete the features and run `clt features RUN` again") for file in there]
    return [state for state in states if state["done"]]


def _append(parts: list[Path], whole: Path) -> None:
    with whole.open("wb") as file:
        for part in parts:
            with part.open("rb") as opened:
                shutil.copyfileobj(opened, file, _COPIED)


def _append_ends(parts: list[Path], whole: Path) -> None:
    """As `_append`, for the `end` files: a share's numbers are raised by the firings of the shares before it."""
    kind, before = np.dtype(OF_LAYER["end"]), 0
    with whole.open("wb") as file:
        for part in parts:
            with part.open("rb") as opened:
                last = 0
                while data := opened.read(_COPIED * kind.itemsize):
                    ends = np.frombuffer(data, kind)
                    last = int(ends[-1])
                    file.write((ends + before).data)
                before += last
