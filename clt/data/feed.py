"""What an activation server lives on: rows without end, held-out rows, and what is to be known of them beforehand."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from clt.config import Config
from clt.data.extract import check_model, check_store, extract
from clt.data.index import INDEX, STATISTICS, StoreIndex, read_index, write_index, write_json
from clt.data.sampler import batch_rows
from clt.data.statistics import Moments, Statistics
from clt.data.store import DiscBuffer
from clt.errors import UserError
from clt.lm.forward import Rows, check_finite, forward_text

if TYPE_CHECKING:
    from clt.lm.load import LanguageModel

_ASKED = "statistics.json"  # how many rows the statistics were asked of: a short text has fewer
_STORE_BYTES = 2 << 20  # of a store that come at once: they are still in the cache when they are scattered


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


def from_store(config: Config, epoch: int = 0, step: int = 0) -> Iterator[tuple[tuple[int, int], Rows]]:
    """((epoch, step), rows) of every batch of the training store, its blocks in an order that `run.seed` determines."""
    store = DiscBuffer(Path(config.data.store) / "train")
    batch = min(len(store), max(1, _STORE_BYTES // store[:1].nbytes))
    while True:
        at = batch_rows(len(store), config.data.block_rows, batch, config.run.seed, step)
        rows = Rows(store.read(at), store.tokens(at), store.positions(at), store.documents(at))
        yield (step * batch // len(store), step), rows
        step += 1


def describe_feed(
    config: Config, directory: Path, load: Callable[[], LanguageModel], progress: bool = False
) -> StoreIndex:
    """The index of the rows to be served: a training store's, or (no rows, no shards) of those a model will give.

    What is missing of held-out rows and, in `directory`, of statistics is made with the model that `load` gives. Raises
    UserError as `extract` does, and for stores of another config.
    """
    heldout = Path(config.data.store) / "heldout"
    lm = None if (heldout / INDEX).exists() else load()
    found = extract(config, "heldout", lm, progress)
    if config.server.source == "store":
        index = read_index(directory)
        check_store(index, config)
        return index
    index = dataclasses.replace(found, text={**found.text, "part": "train"}, rows=0, shards=[])
    if not _has_statistics(config, directory, index):
        lm = lm or load()
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
    try:
        asked = json.loads(file.read_text())
    except ValueError as error:
        raise UserError(f"{file} is damaged ({error}); delete it to have the statistics made anew") from error
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
