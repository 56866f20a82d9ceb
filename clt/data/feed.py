"""The source of an activation server: an endless stream of rows, the held-out rows, their index and statistics."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from clt.config import Config, digest
from clt.data.check import check_files, check_model, check_store
from clt.data.extract import extract
from clt.data.index import INDEX, STATISTICS, StoreIndex, read_index, write_index, write_json
from clt.data.sampler import batch_rows
from clt.data.statistics import Moments, Statistics
from clt.data.store import DiscBuffer
from clt.errors import UserError, tell
from clt.files import read_object, reading
from clt.lm.fingerprint import fingerprints
from clt.lm.forward import Rows, check_finite, forward_text

if TYPE_CHECKING:
    from clt.lm.load import LanguageModel

_TRAINING = ("source", "url", "token_file", "store", "prefetch")  # of the data section: not what the rows are
_PLACE = "position.json"
_ASKED = "statistics.json"  # how many rows the statistics were asked of: a short text has fewer
_STORE_BATCH = 4096  # rows of a store that come at once


def load(config: Config) -> LanguageModel:
    """The language model, on `server.device`. Raises UserError for a GPU that is not there."""
    from transformers.utils.logging import disable_progress_bar

    from clt.lm.load import load_language_model

    gpu = torch.cuda.is_available()
    if config.server.device == "gpu" and not gpu:
        raise UserError("server.device=gpu but no CUDA device is available; set server.device=cpu")
    disable_progress_bar()  # a log is no place for it, and its semaphore outlives a process that is killed
    return load_language_model(config.lm, "cuda" if gpu and config.server.device != "cpu" else "cpu")


def from_model(
    config: Config, lm: LanguageModel, epoch: int = 0, windows: int = 0
) -> Iterator[tuple[tuple[int, int], Rows]]:
    """((epoch, windows before it), rows) of every batch of the training text, over and over."""
    while True:
        for batch, rows in forward_text(config, "train", lm, windows):
            check_finite(lm, batch, rows)
            yield (epoch, windows), dataclasses.replace(rows, activations=rows.activations.cpu())
            windows += len(batch)
        epoch, windows = epoch + 1, 0


@dataclass
class StoredRows:
    """Rows of a store whose activations have not been read yet: they go from its files straight to their places.

    To read them into `Rows` first takes the generator twice the time a row (measured).
    """

    store: DiscBuffer
    number: np.ndarray
    """(n,) int64"""
    token: np.ndarray
    """(n,) int32"""
    position: np.ndarray
    """(n,) int32"""
    document: np.ndarray
    """(n,) int64"""

    def __len__(self) -> int:
        return len(self.number)

    def __getitem__(self, part: slice) -> StoredRows:
        columns = (self.token[part], self.position[part], self.document[part])
        return StoredRows(self.store, self.number[part], *columns)

    def copy_into(self, views: list[memoryview]) -> None:
        """The bytes of each row."""
        self.store.read_into(self.number, views)


def from_store(config: Config, epoch: int = 0, step: int = 0) -> Iterator[tuple[tuple[int, int], StoredRows]]:
    """((epoch, step), rows) of every batch of the training store, its blocks in an order that `run.seed` determines."""
    store = DiscBuffer(Path(config.data.store) / "train")
    batch = min(_STORE_BATCH, len(store))
    while True:
        at = batch_rows(len(store), config.data.block_rows, batch, config.run.seed, step)
        columns = (store.tokens(at), store.positions(at), store.documents(at))
        yield (step * batch // len(store), step), StoredRows(store, at, *columns)
        step += 1


def feed(config: Config, epoch: int, place: int) -> Iterator[tuple[tuple[int, int], Rows | StoredRows]]:
    """What `server.source` asks for: `from_store`, or `from_model` with the model loaded at once."""
    if config.server.source == "store":
        return from_store(config, epoch, place)
    return from_model(config, load(config), epoch, place)


def feed_hash(config: Config) -> str:
    """64 hexadecimal digits that two configs share if and only if they ask for the same rows in the same order."""
    tree = dataclasses.asdict(config)
    data = {key: value for key, value in tree["data"].items() if key not in _TRAINING}
    return digest([tree["lm"], tree["text"], data, config.server.source, config.run.seed])


def save_place(directory: Path, feed: str, mark: list[int]) -> None:
    """Record that the rows before `mark` (two numbers as above, then rows of that batch) of a feed have been used."""
    try:
        write_json(directory / _PLACE, {"rows": feed, "mark": mark})
    except OSError as error:  # a disk that is full or gone is no reason to stop serving
        tell(f"the place in the text was not recorded: {error}")


def load_place(directory: Path, feed: str) -> tuple[int, int, int]:
    """The last mark that was recorded; zeros where there is none, or one of another feed. Raises UserError."""
    file, anew = directory / _PLACE, "it is the place in the text: delete it to begin anew"
    if not file.exists():
        return 0, 0, 0
    found = read_object(file, {"mark": list[int], "rows": str}, anew)
    with reading(file, anew):
        first, second, third = found["mark"]
    return (first, second, third) if found["rows"] == feed else (0, 0, 0)


def describe_feed(config: Config, directory: Path, progress: bool = False) -> StoreIndex:
    """The index of the rows to be served: a training store's, or (no rows, no shards) of those a model will give.

    What is missing of held-out rows and, in `directory`, of statistics is made. Raises UserError as `extract` does, and
    for stores of another config.
    """
    heldout = Path(config.data.store) / "heldout"
    lm = None if (heldout / INDEX).exists() else load(config)
    found = extract(config, "heldout", lm, progress)
    if config.server.source == "store":
        index = read_index(directory)
        check_store(index, config)
        check_files(index, config)
        return index
    files = fingerprints(config, "train", ask_hub=True)
    index = dataclasses.replace(found, text={**found.text, "part": "train"}, rows=0, shards=[], fingerprints=files)
    if not _has_statistics(config, directory, index):
        lm = lm or load(config)
        check_model(found, lm)
        directory.mkdir(parents=True, exist_ok=True)
        (directory / INDEX).unlink(missing_ok=True)
        _statistics(config, index, lm).save(directory / STATISTICS)
        write_json(directory / _ASKED, config.server.statistics_tokens)
        write_index(directory, index)
    return index


def _has_statistics(config: Config, directory: Path, index: StoreIndex) -> bool:
    file = directory / _ASKED
    if not (directory / INDEX).exists() or not file.exists():
        return False
    with reading(file, "delete it to have the statistics made anew"):
        asked = json.loads(file.read_bytes())
    return read_index(directory) == index and asked == config.server.statistics_tokens


def _statistics(config: Config, index: StoreIndex, lm: LanguageModel) -> Statistics:
    """The statistics of the first `server.statistics_tokens` rows of the training text, or of all if it is shorter."""
    moments = Moments.zero(index.n_layers, index.d_acts)
    for batch, rows in forward_text(config, "train", lm):
        check_finite(lm, batch, rows)
        moments.add(rows.activations.cpu()[: config.server.statistics_tokens - moments.rows])
        if moments.rows == config.server.statistics_tokens:
            break
    return moments.statistics()
