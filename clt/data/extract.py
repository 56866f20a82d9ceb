"""Extract a store from text: run the language model, shuffle the rows, write the shards. Resumable at any time."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from clt.config import Config
from clt.data.groups import Placement, rows_by_group
from clt.data.index import FORMAT_VERSION, INDEX, STATISTICS, ShardEntry, StoreIndex, read_index, write_index
from clt.data.lock import locked
from clt.data.shards import is_full_disk, row_bytes
from clt.data.state import STATE, ExtractionState, load_state
from clt.data.statistics import Moments
from clt.data.writer import Writer
from clt.errors import UserError, mismatches
from clt.memory import keep_freed_memory

if TYPE_CHECKING:
    from clt.lm.documents import Part
    from clt.lm.load import LanguageModel


def extract_all(config: Config, progress: bool = True) -> list[StoreIndex]:
    """`extract` the training and the held-out store, with one language model for both."""
    parts: tuple[Part, ...] = ("train", "heldout")
    complete = all((Path(config.data.store) / part / INDEX).exists() for part in parts)
    lm = None if complete else _load(config)
    return [extract(config, part, lm, progress) for part in parts]


def extract(config: Config, part: Part, lm: LanguageModel | None = None, progress: bool = True) -> StoreIndex:
    """Make or resume the store `<data.store>/<part>`; returns its index, also when the store is already finished.

    The bytes of the store depend on the config alone, not on interruptions. Raises UserError for a store or an
    unfinished extraction of another config, another process that extracts it, too little text, a value that overflows
    the storage dtype, and a full disk.
    """
    path = Path(config.data.store) / part
    if (path / INDEX).exists():
        return _finished(path, config)
    lm = lm or _load(config)
    path.mkdir(parents=True, exist_ok=True)
    with locked(path):
        if (path / INDEX).exists():  # another process has made it
            return _finished(path, config)
        return _extract(path, config, part, lm, progress)


def _load(config: Config) -> LanguageModel:
    from clt.lm.load import load_language_model

    return load_language_model(config.lm, "cuda" if torch.cuda.is_available() else "cpu")


def _finished(path: Path, config: Config) -> StoreIndex:
    index = read_index(path)
    check_store(index, config)
    if (path / STATE).exists():
        (path / STATE).unlink()
    return index


def _extract(path: Path, config: Config, part: Part, lm: LanguageModel, progress: bool) -> StoreIndex:
    keep_freed_memory()
    placement = Placement(path, _blank_index(config, part, lm), config.data.shard_rows, config.data.open_shards)
    # What must be equal to resume. The number of rows may change: only the last group depends on it.
    identity = dataclasses.asdict(placement.index)
    del identity["rows"], identity["shards"]
    identity |= {"lm.dtype": config.lm.dtype, "lm.batch_windows": config.lm.batch_windows}
    identity |= {"data.shard_rows": placement.shard_rows, "data.open_shards": placement.open_shards}
    zero = Moments.zero(placement.index.n_layers, placement.index.d_acts)
    state = load_state(path, identity) or ExtractionState([], 0, 0, zero)
    _check_room(placement, state)
    try:
        shards, moments = _write_groups(config, placement, lm, state, identity, progress)
        moments.statistics().save(path / STATISTICS)
        index = dataclasses.replace(placement.index, shards=shards)
        write_index(path, index)
    except OSError as error:
        if not is_full_disk(error):
            raise
        raise UserError(
            f"no more could be written to {path} ({error}); free space and run `clt extract CONFIG` again, which "
            "resumes after the last complete shards, or set data.store to another disk"
        ) from error
    (path / STATE).unlink()
    return index


def _write_groups(
    config: Config, placement: Placement, lm: LanguageModel, state: ExtractionState, identity: dict[str, Any], bar: bool
) -> tuple[list[ShardEntry], Moments]:
    """Extract the groups that follow `state` and record each; returns the shards and moments of the whole store."""
    done, total, part = state.rows, placement.index.rows, placement.index.text["part"]
    shards, moments = list(state.shards), state.moments

    def record(entries: list[ShardEntry], reached: ExtractionState | None) -> None:
        assert reached is not None
        shards.extend(entries)
        dataclasses.replace(reached, shards=shards).save(placement.path, identity)

    if done < total:
        with (
            tqdm(total=total, initial=done, unit="row", desc=part, disable=not bar) as meter,
            Writer(placement, done // placement.group_rows, record) as writer,
        ):
            for rows, reached in rows_by_group(config, placement, lm, state):
                writer.put(rows, reached)
                moments = moments if reached is None else reached.moments
                meter.update(len(rows))
                done += len(rows)
            if done < total:
                raise UserError(
                    f"the {part} text of {config.text.source!r} ends after {done} rows, wanted {total}: "
                    f"lower data.{part}_tokens={done}, or give more text"
                )
    return shards, moments


def check_store(index: StoreIndex, config: Config) -> None:
    """Raise UserError, naming every field that differs, unless a store is the one that the config asks for."""
    if odd := differences(index, config):
        raise UserError(
            f"the {index.text['part']} store in {config.data.store} is not the one that the config asks for: {odd}; "
            "set data.store to another directory, or delete this store to extract it again, or change the config"
        )


def differences(index: StoreIndex, config: Config) -> str:
    """The fields in which a store differs from the config: what was found and what was wanted; empty if none."""
    lm, tokens = config.lm, f"{index.text['part']}_tokens"
    found = {
        "lm.model": index.model,
        "lm.revision": index.revision if lm.revision == index.revision else index.lm_revision,
        "lm.dtype": index.lm_dtype,
        "lm.layers": index.layers,
        "lm.context": index.context,
        "lm.input_site": index.input_sites,
        "lm.output_site": index.output_sites,
        "data.dtype": index.dtype,
        f"data.{tokens}": index.rows,
        "data.seed": index.seed,
        **{f"text.{key}": value for key, value in index.text.items()},
    }
    wanted = {key: getattr(lm, key.removeprefix("lm.")) for key in found if key.startswith("lm.")}
    wanted |= {f"data.{key}": getattr(config.data, key) for key in ("dtype", tokens, "seed")}
    wanted |= {f"text.{key}": value for key, value in dataclasses.asdict(config.text).items()}
    if lm.layers is None:
        wanted["lm.layers"] = list(range(index.lm_layers or index.n_layers))
    for key in ("lm.input_site", "lm.output_site"):
        template = wanted.pop(key)
        if template is not None:
            wanted[key] = [template.replace("{layer}", str(layer)) for layer in index.layers]
    return mismatches(found, wanted)


def check_model(index: StoreIndex, lm: LanguageModel) -> None:
    """Raise UserError, naming what differs, unless a store holds activations of this language model."""
    found = {
        "width D": index.d_acts,
        "layers": index.layers,
        "input sites": index.input_sites,
        "output sites": index.output_sites,
        "revision": index.revision,
        "tokenizer": index.tokenizer_hash,
    }
    wanted = {
        "width D": lm.d_model,
        "layers": lm.layers,
        "input sites": [site.input_path for site in lm.sites],
        "output sites": [site.output_path for site in lm.sites],
        "revision": lm.revision,
        "tokenizer": lm.tokenizer_hash,
    }
    if odd := mismatches(found, wanted):
        raise UserError(
            f"the store was not extracted from the model that {lm.name!r} is now: {odd}; "
            "set lm.model or lm.revision to the one it was, or set data.store to another directory and extract again"
        )


def _blank_index(config: Config, part: Part, lm: LanguageModel) -> StoreIndex:
    """The index of the store that will be extracted, without its shards."""
    return StoreIndex(
        format_version=FORMAT_VERSION,
        model=lm.name,
        revision=lm.revision,
        tokenizer_hash=lm.tokenizer_hash,
        layers=list(lm.layers),
        lm_layers=lm.model.config.get_text_config().num_hidden_layers,
        lm_dtype=config.lm.dtype,
        lm_revision=config.lm.revision,
        input_sites=[site.input_path for site in lm.sites],
        output_sites=[site.output_path for site in lm.sites],
        text={"part": part, **dataclasses.asdict(config.text)},
        seed=config.data.seed,
        context=config.lm.context,
        n_layers=len(lm.layers),
        d_acts=lm.d_model,
        dtype=config.data.dtype,
        rows=getattr(config.data, f"{part}_tokens"),
        shards=[],
    )


def _check_room(placement: Placement, state: ExtractionState) -> None:
    """Raise UserError when the rest of the rows cannot follow the extracted ones, or does not fit on the disk."""
    path, index, done = placement.path, placement.index, state.rows
    if done > index.rows or (done < index.rows and done % placement.group_rows):
        raise UserError(
            f"{path} holds an unfinished extraction with {done} rows done, wanted {index.rows}: "
            "set the tokens back to what they were to finish it, delete it, or choose another data.store"
        )
    wanted = (index.rows - done) * sum(row_bytes(index.n_layers, index.d_acts, index.dtype).values())
    free = shutil.disk_usage(path).free
    if free < wanted:
        raise UserError(
            f"{path} has {free / 1e9:.3f} GB free, wanted {wanted / 1e9:.3f} GB for the rows that are left: "
            "free space, set data.store to another disk, or lower data.train_tokens, data.heldout_tokens or lm.layers"
        )
