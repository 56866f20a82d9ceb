"""What must exist before rows are served: held-out rows, the statistics of the training rows, and their description."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from clt.config import Config
from clt.data.extract import check_model, check_store, extract
from clt.data.index import INDEX, STATISTICS, StoreIndex, read_index, write_index, write_json
from clt.data.statistics import Moments, Statistics
from clt.errors import UserError
from clt.lm.forward import check_finite, forward_text
from clt.server.generator import device_for
from clt.server.layout import buffer_bytes
from clt.server.segment import FOLDER, check_memory

if TYPE_CHECKING:
    from clt.lm.load import LanguageModel

_ASKED = "statistics.json"  # how many rows the statistics were asked of: a short text has fewer
_TRAINING = ("source", "url", "token_file", "store", "prefetch")  # of the data section: not what the rows are


def folder(config: Config) -> Path:
    """The directory whose index.json and stats.safetensors describe the rows that are served."""
    return Path(config.data.store) / "train" if config.server.source == "store" else own_folder(config)


def own_folder(config: Config) -> Path:
    """The directory of what one server keeps: a lock, its config, its place in the text, statistics."""
    name = config.server.name
    return Path(config.data.store) / ("server" if name is None else f"server-{name}")


def segment_name(config: Config) -> str:
    """The name of the config's segment: `server.name`, else one that belongs to the path of `data.store`."""
    return config.server.name or hashlib.sha256(os.path.realpath(config.data.store).encode()).hexdigest()[:16]


def tag(config: Config) -> str:
    """64 hexadecimal digits that two configs share if and only if they ask for the same buffer of the same rows."""
    server, store = dataclasses.asdict(config.server), os.path.realpath(config.data.store)
    return _digest(
        [rows_tag(config), store, *(server[key] for key in ("rows", "min_fill", "device", "low", "statistics_tokens"))]
    )


def rows_tag(config: Config) -> str:
    """The same of the rows alone, and the order in which they come."""
    data = {key: value for key, value in dataclasses.asdict(config.data).items() if key not in _TRAINING}
    parts = [dataclasses.asdict(part) for part in (config.lm, config.text)]
    return _digest([*parts, data, config.server.source, config.run.seed])


def _digest(parts: list[Any]) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def prepare(config: Config, progress: bool = False) -> StoreIndex:
    """Make what is missing of it; returns the index of the rows to be served (no rows, no shards, if from a model).

    Raises UserError as `extract` does, for stores of another config, and for a GPU that is not there.
    """
    if config.server.device == "gpu" and not torch.cuda.is_available():
        raise UserError("server.device=gpu but no CUDA device is available; set server.device=cpu")
    lm = None
    if needs_model(config):
        from clt.lm.load import load_language_model

        lm = load_language_model(config.lm, device_for(config.server, 0.0, "cpu", torch.cuda.is_available()))
        if not (FOLDER / f"clt-{segment_name(config)}").exists():  # else its memory may be what is missing
            check_memory(buffer_bytes(config.server.rows, len(lm.layers), lm.d_model, config.data.dtype))
    heldout = extract(config, "heldout", lm, progress)
    directory = folder(config)
    if config.server.source == "store":
        index = read_index(directory)
        check_store(index, config)
        return index
    index = _description(heldout)
    if not _has_statistics(config, index):
        directory.mkdir(parents=True, exist_ok=True)
        (directory / INDEX).unlink(missing_ok=True)
        assert lm is not None, "needs_model has seen to it"
        _statistics(config, heldout, lm).save(directory / STATISTICS)
        write_json(directory / _ASKED, config.server.statistics_tokens)
        write_index(directory, index)
    return index


def needs_model(config: Config) -> bool:
    """Whether `prepare` will run the language model, which takes memory and time."""
    heldout = Path(config.data.store) / "heldout"
    if not (heldout / INDEX).exists():
        return True
    return config.server.source == "model" and not _has_statistics(config, _description(read_index(heldout)))


def _description(heldout: StoreIndex) -> StoreIndex:
    return dataclasses.replace(heldout, text={**heldout.text, "part": "train"}, rows=0, shards=[])


def _has_statistics(config: Config, index: StoreIndex) -> bool:
    directory = folder(config)
    if not (directory / INDEX).exists() or not (directory / _ASKED).exists():
        return False
    return read_index(directory) == index and json.loads((directory / _ASKED).read_text()) == (
        config.server.statistics_tokens
    )


def _statistics(config: Config, heldout: StoreIndex, lm: LanguageModel) -> Statistics:
    """The statistics of the first `server.statistics_tokens` rows of the training text, or of all if it is shorter."""
    check_model(heldout, lm)
    moments = Moments.zero(heldout.n_layers, heldout.d_acts)
    for batch, rows in forward_text(config, "train", lm):
        check_finite(lm, batch, rows)
        moments.add(rows.activations.cpu()[: config.server.statistics_tokens - moments.rows])
        if moments.rows == config.server.statistics_tokens:
            break
    return moments.statistics()
