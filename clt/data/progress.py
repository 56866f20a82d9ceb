"""How far an extraction has come: what it needs to go on from its last whole group of shards."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clt.data.index import INDEX, PARTIAL, STATISTICS, ShardEntry, write_json
from clt.data.statistics import Moments
from clt.errors import UserError

PROGRESS = "progress.json"


@dataclass(frozen=True)
class Progress:
    """The state of an extraction between two groups."""

    shards: list[ShardEntry]
    windows: int
    """Windows of text to skip: a multiple of the language model's batch, so that resumed batches are the same ones."""
    skip_rows: int
    """Kept rows to skip after those windows: the batch in which the last group ended is computed once more."""
    moments: Moments

    @property
    def rows(self) -> int:
        """Rows in the whole groups."""
        return sum(shard["rows"] for shard in self.shards)

    def save(self, path: Path, identity: dict[str, Any]) -> None:
        """Record the progress in the store's directory; the JSON file is the one that counts."""
        moments = f"moments_{len(self.shards):05d}.safetensors"
        self.moments.save(path / moments)
        fields = {name: getattr(self, name) for name in ("shards", "windows", "skip_rows")}
        write_json(path / PROGRESS, {"identity": identity, **fields, "moments": moments})
        for older in path.glob("moments_*.safetensors"):
            if older.name != moments:
                older.unlink()


def load_progress(path: Path, identity: dict[str, Any], start: Progress) -> Progress:
    """The progress recorded in `path`, or `start` where there is none; deletes what an interruption left half-written.

    Raises UserError, naming the differences, when the progress is that of another extraction, and for a finished store
    that has lost its index.
    """
    file = path / PROGRESS
    if not file.exists():
        if (path / STATISTICS).exists():  # written when all shards are whole, and before this file is deleted
            raise UserError(
                f"{path} holds the shards of a finished store but no {INDEX}: copy its {INDEX} there again, "
                "delete the directory to extract it again, or choose another data.store"
            )
        _clean(path, keep=None)
        return start
    try:
        tree = json.loads(file.read_bytes())
        found, moments = tree["identity"], tree["moments"]
        progress = Progress(tree["shards"], tree["windows"], tree["skip_rows"], Moments.load(path / moments))
    except (ValueError, KeyError) as error:
        raise UserError(f"{file} is damaged ({error}); delete {path} and extract it again") from error
    odd = [key for key in identity if found.get(key) != identity[key]]
    if odd:
        differences = "; ".join(f"{key} found {found.get(key)!r}, wanted {identity[key]!r}" for key in odd)
        raise UserError(
            f"{path} holds an unfinished extraction of something else: {differences}; "
            "set these back to finish it, delete it, or choose another data.store"
        )
    _clean(path, keep=moments)
    return progress


def finish(path: Path) -> None:
    """Delete the record of progress of a finished store."""
    (path / PROGRESS).unlink(missing_ok=True)
    _clean(path, keep=None)


def _clean(path: Path, keep: str | None) -> None:
    for leftover in [*path.glob(f"*{PARTIAL}"), *path.glob("moments_*.safetensors")]:
        if leftover.name != keep:
            leftover.unlink(missing_ok=True)


def start(n_layers: int, d_acts: int) -> Progress:
    """The progress of an extraction that has not begun."""
    return Progress([], 0, 0, Moments.zero(n_layers, d_acts))
