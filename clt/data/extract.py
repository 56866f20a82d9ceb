"""From text to a store: run the language model, shuffle the rows, write the shards; interruptible at any time."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from clt.config import Config
from clt.data import progress as record
from clt.data.index import FORMAT_VERSION, INDEX, StoreIndex, read_index, write_index
from clt.data.progress import Progress
from clt.data.shards import is_full_disk, row_bytes
from clt.data.statistics import STATISTICS
from clt.data.writer import Plan, Rows, Writer
from clt.errors import UserError

if TYPE_CHECKING:
    from clt.lm.documents import Part
    from clt.lm.load import LanguageModel


def extract(config: Config, part: Part, lm: LanguageModel | None = None, progress: bool = True) -> StoreIndex:
    """Make the store `<data.store>/<part>`, or finish it, or return its index when it is already there.

    The bytes of the store depend on the config alone, not on how often the extraction was interrupted. Raises
    UserError for another config's store or leftovers, too little text, a value that does not fit the storage dtype,
    and a full disk.
    """
    path = Path(config.data.store) / part
    if (path / INDEX).exists():
        index = read_index(path)
        check_store(index, config)
        if (path / record.PROGRESS).exists():
            record.finish(path)
        return index
    if lm is None:
        from clt.lm.load import load_language_model

        lm = load_language_model(config.lm, "cuda" if torch.cuda.is_available() else "cpu")
    path.mkdir(parents=True, exist_ok=True)
    plan = Plan(path, _blank_index(config, part, lm), config.data.shard_rows, config.data.open_shards)
    identity = _identity(plan, config)
    state = record.load_progress(path, identity, record.start(plan.index.n_layers, plan.index.d_acts))
    _check_rows(plan, state)
    _check_space(plan, state)
    try:
        state = _write_groups(config, plan, lm, state, identity, progress)
        state.moments.statistics().save(path / STATISTICS)
        index = dataclasses.replace(plan.index, shards=state.shards)
        write_index(path, index)
    except OSError as error:
        if not is_full_disk(error):
            raise
        raise UserError(
            f"no more could be written to {path} ({error}); free space and run `clt extract CONFIG` again, which goes "
            "on from the last whole shards, or set data.store to another disk"
        ) from error
    record.finish(path)
    return index


def check_store(index: StoreIndex, config: Config) -> None:
    """Check that a store is the one that the config asks for; raises UserError that names every field that is not."""
    part, lm, text = index.text["part"], config.lm, index.text
    layers = list(range(index.lm_layers or index.n_layers)) if lm.layers is None else lm.layers
    rows = "train_tokens" if part == "train" else "heldout_tokens"
    pairs = {
        "lm.model": (index.model, lm.model),
        "lm.dtype": (index.lm_dtype, lm.dtype),
        "lm.layers": (index.layers, layers),
        "lm.context": (index.context, lm.context),
        "data.dtype": (index.dtype, config.data.dtype),
        f"data.{rows}": (index.rows, getattr(config.data, rows)),
        "data.seed": (index.seed, config.data.seed),
        **{f"text.{key}": (text.get(key), value) for key, value in dataclasses.asdict(config.text).items()},
    }
    for key, sites in (("input_site", index.input_sites), ("output_site", index.output_sites)):
        template = getattr(lm, key)
        if template is not None:
            pairs[f"lm.{key}"] = (sites, [template.format(layer=layer) for layer in index.layers])
    odd = [f"{key}: found {found!r}, wanted {wanted!r}" for key, (found, wanted) in pairs.items() if found != wanted]
    if odd:
        raise UserError(
            f"the {part} store in {config.data.store} is not the one that the config asks for: {'; '.join(odd)}; "
            "set data.store to another directory, or delete this store to extract it again, or change the config"
        )


def check_model(index: StoreIndex, lm: LanguageModel) -> None:
    """Check that a store's activations are those of this language model; raises UserError that says what differs."""
    pairs = {
        "width D": (index.d_acts, lm.d_model),
        "layers": (index.layers, list(lm.layers)),
        "input sites": (index.input_sites, [site.input_path for site in lm.sites]),
        "output sites": (index.output_sites, [site.output_path for site in lm.sites]),
        "revision": (index.revision, lm.revision),
        "tokenizer": (index.tokenizer_hash, lm.tokenizer_hash),
    }
    odd = [
        f"{what}: the store has {found!r}, the model {wanted!r}"
        for what, (found, wanted) in pairs.items()
        if found != wanted
    ]
    if odd:
        raise UserError(
            f"the store was not extracted from the model that {lm.name!r} is now: {'; '.join(odd)}; "
            "set lm.model or lm.revision to the one it was, or set data.store to another directory and extract again"
        )


def _blank_index(config: Config, part: Part, lm: LanguageModel) -> StoreIndex:
    """The index of the store to be, but for its shards."""
    return StoreIndex(
        format_version=FORMAT_VERSION,
        model=lm.name,
        revision=lm.revision,
        tokenizer_hash=lm.tokenizer_hash,
        layers=list(lm.layers),
        lm_layers=lm.model.config.get_text_config().num_hidden_layers,
        lm_dtype=config.lm.dtype,
        input_sites=[site.input_path for site in lm.sites],
        output_sites=[site.output_path for site in lm.sites],
        text={"part": part, **dataclasses.asdict(config.text)},
        seed=config.data.seed,
        context=config.lm.context,
        n_layers=len(lm.layers),
        d_acts=lm.d_model,
        dtype=config.data.dtype,
        rows=config.data.train_tokens if part == "train" else config.data.heldout_tokens,
        shards=[],
    )


def _identity(plan: Plan, config: Config) -> dict[str, Any]:
    """What must be the same for an extraction to go on. Not the number of rows: only the last group depends on it."""
    index = {key: value for key, value in dataclasses.asdict(plan.index).items() if key not in ("rows", "shards")}
    batch = {"lm.dtype": config.lm.dtype, "lm.batch_windows": config.lm.batch_windows}
    return {**index, **batch, "data.shard_rows": plan.shard_rows, "data.open_shards": plan.open_shards}


def _check_rows(plan: Plan, state: Progress) -> None:
    whole, wanted = state.rows % plan.group_rows == 0, plan.index.rows
    if state.rows != wanted and not (whole and state.rows < wanted):
        raise UserError(
            f"{plan.path} holds an unfinished extraction with {state.rows} rows done, wanted {wanted}: "
            "set the tokens back to what they were to finish it, delete it, or choose another data.store"
        )


def _check_space(plan: Plan, state: Progress) -> None:
    index = plan.index
    wanted = (index.rows - state.rows) * sum(row_bytes(index.n_layers, index.d_acts, index.dtype).values())
    free = shutil.disk_usage(plan.path).free
    if free < wanted:
        raise UserError(
            f"{plan.path} has {free / 1e9:.3f} GB free, wanted {wanted / 1e9:.3f} GB for the rows to come: "
            "free space, set data.store to another disk, or lower data.train_tokens, data.heldout_tokens or lm.layers"
        )


def _write_groups(
    config: Config, plan: Plan, lm: LanguageModel, state: Progress, identity: dict[str, Any], bar: bool
) -> Progress:
    """Extract all groups that `state` does not have, recording each; returns the final state."""
    first_group = state.rows // plan.group_rows

    def save(shards: list[Any], note: Any) -> None:
        nonlocal state
        state = dataclasses.replace(note, shards=[*state.shards, *shards])
        state.save(plan.path, identity)

    if state.rows < plan.index.rows:
        with (
            tqdm(
                total=plan.index.rows, initial=state.rows, unit="row", desc=plan.index.text["part"], disable=not bar
            ) as meter,
            Writer(plan, first_group, save) as writer,
        ):
            for rows, note in _pieces(config, plan, lm, state):
                writer.put(rows, note)
                meter.update(len(rows))
    return state


def _pieces(config: Config, plan: Plan, lm: LanguageModel, state: Progress) -> Iterator[tuple[Rows, Progress | None]]:
    """The rows from `state` on, cut where groups end; a piece that ends a group comes with the progress made then."""
    done, total, skip = state.rows, plan.index.rows, state.skip_rows
    moments = state.moments.to(lm.device)
    for windows_before, stored, rows in captured(config, plan.index.text["part"], lm, state.windows):
        used, skip = skip, 0
        while used < len(rows) and done < total:
            group_end = min((done // plan.group_rows + 1) * plan.group_rows, total)
            take = min(len(rows) - used, group_end - done)
            moments.add(stored[used : used + take])
            piece, used, done = rows[used : used + take], used + take, done + take
            yield piece, Progress([], windows_before, used, moments.to("cpu")) if done == group_end else None
        if done == total:
            return
    part = plan.index.text["part"]
    key = "train_tokens" if part == "train" else "heldout_tokens"
    raise UserError(
        f"the {part} text of {config.text.source!r} ends after {done} rows, wanted {total}: "
        f"lower data.{key}={done}, or give more text"
    )


def captured(config: Config, part: Part, lm: LanguageModel, skip: int) -> Iterator[tuple[int, Tensor, Rows]]:
    """Batch by batch: windows before it, its kept rows (n, 2, L, D) on the model's device, and the same on the CPU.

    In `data.dtype`, from window `skip` on. Raises UserError for a value that this dtype does not hold.
    """
    from clt.lm.capture import Capture
    from clt.lm.text import windows

    capture, dtype = Capture(lm), getattr(torch, config.data.dtype)
    stream = iter(windows(config.text, part, lm, config.lm.context, skip=skip))
    while batch := list(islice(stream, config.lm.batch_windows)):
        tokens = np.stack([np.asarray(window.tokens) for window in batch])  # (N, T)
        documents = np.stack([np.asarray(window.documents) for window in batch])
        keep = np.stack([np.asarray(window.keep) for window in batch])
        activations = capture(torch.from_numpy(tokens).long())  # (N, T, 2, L, D)
        kept = activations[torch.from_numpy(keep).to(activations.device)]  # (n, 2, L, D)
        stored = kept.to(dtype)
        if not stored.isfinite().all():
            raise _overflow(kept, stored, documents[keep], lm.layers)
        positions = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)[keep]
        yield skip, stored, Rows(stored.cpu(), tokens[keep], positions, documents[keep])
        skip += len(batch)


def _overflow(kept: Tensor, stored: Tensor, documents: np.ndarray, layers: list[int]) -> UserError:
    """The error for the first value (n, 2, L, D) that is not finite in the storage dtype."""
    # By layer, then input before target, as the model computes them: later ones may only follow from the first.
    layer, side, row, dim = (~stored.isfinite()).transpose(0, 2).nonzero()[0].tolist()
    value, dtype = kept[row, side, layer, dim].item(), str(stored.dtype).removeprefix("torch.")
    where = f"{('input', 'target')[side]} activation {value:g} at layer {layers[layer]} (document {documents[row]})"
    if np.isfinite(value):
        return UserError(
            f"{where} overflows {dtype}, which ends at {torch.finfo(stored.dtype).max:g}: set data.dtype=bfloat16 or "
            "data.dtype=float32"
        )
    return UserError(f"{where} is not finite in the language model itself: set lm.dtype=bfloat16 or lm.dtype=float32")
