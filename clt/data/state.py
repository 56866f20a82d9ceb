"""The state of an unfinished extraction: what it needs to resume after its last complete group of shards."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from safetensors import safe_open
from safetensors.torch import save

from clt.data.index import INDEX, STATISTICS, ShardEntry, delete_unfinished, write_atomically
from clt.data.statistics import Moments
from clt.errors import UserError, mismatches
from clt.files import parse_object, reading
from clt.ranges import NOT_NEGATIVE

STATE = "state.safetensors"
_COUNT = Annotated[int, NOT_NEGATIVE]
_FIELDS = {"identity": dict, "shards": list[ShardEntry], "windows": _COUNT, "skip_rows": _COUNT}


@dataclass(frozen=True)
class ExtractionState:
    """How far an extraction has come: always to the end of a group of shards."""

    shards: list[ShardEntry]
    windows: int
    """Windows of text to skip: a multiple of `lm.batch_windows`, so that resumed batches have the same windows."""
    skip_rows: int
    """Kept rows to skip after those windows: the batch in which the last group ended is computed again."""
    moments: Moments

    @property
    def rows(self) -> int:
        """Rows in the complete groups."""
        return sum(shard["rows"] for shard in self.shards)

    def save(self, path: Path, identity: dict[str, Any]) -> None:
        """Write the state into the store's directory `path`; `identity` says which extraction it belongs to."""
        fields = {"identity": identity, "shards": self.shards, "windows": self.windows, "skip_rows": self.skip_rows}
        tensors = {"mean": self.moments.mean, "squares": self.moments.squares}
        write_atomically(path / STATE, save(tensors, {"state": json.dumps(fields)}))


def load_state(path: Path, identity: dict[str, Any]) -> ExtractionState | None:
    """The state in directory `path`, or None if there is none. Deletes the files that an interruption left unfinished.

    Raises UserError for the state of another extraction (naming the differences) and for a finished store without its
    index.
    """
    file, state = path / STATE, None
    if file.exists():
        with reading(file, f"delete {path} and extract it again"), safe_open(str(file), framework="pt") as tensors:
            fields = parse_object((tensors.metadata() or {}).get("state", ""), _FIELDS)
            moments = Moments(0, tensors.get_tensor("mean"), tensors.get_tensor("squares"))
            found = fields.pop("identity")
            shape = (2, found.get("n_layers"), found.get("d_acts"))
            for tensor in (moments.mean, moments.squares):
                if tensor.shape != shape or tensor.dtype != torch.float64 or not tensor.isfinite().all():
                    raise ValueError(
                        f"the moments are {tensor.dtype} {tuple(tensor.shape)}, wanted finite float64 {shape}"
                    )
            if odd := fields.keys() - _FIELDS.keys():
                raise ValueError(f"unknown {', '.join(sorted(odd))}")
            state = ExtractionState(**fields, moments=moments)
            moments.rows = state.rows
        if odd := mismatches(found, identity):
            raise UserError(
                f"{path} holds an unfinished extraction of something else: {odd}; "
                "set these back to finish it, delete it, or choose another data.store"
            )
    elif (path / STATISTICS).exists():  # written after the last shard and before the state is deleted
        raise UserError(
            f"{path} holds the shards of a finished store but no {INDEX}: copy its {INDEX} there again, "
            "delete the directory to extract it again, or choose another data.store"
        )
    delete_unfinished(path)
    return state
