"""Extract a store from text: run the language model, shuffle the rows, write the shards. Resumable at any time."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from tqdm import tqdm

from clt.config import Config
from clt.data.check import check_files, check_store, read_from
from clt.data.index import INDEX, STATISTICS, StoreIndex, read_index, read_statistics, write_index
from clt.data.lock import locked
from clt.data.shards import is_full_disk, row_bytes
from clt.data.state import STATE, ExtractionState, load_state
from clt.data.statistics import Moments
from clt.data.survey import survey
from clt.data.writer import Placement, Writer
from clt.errors import UserError, size_text, tell
from clt.lm.fingerprint import fingerprints, pinned
from clt.lm.forward import Rows, check_finite, forward_text
from clt.memory import keep_freed_memory

if TYPE_CHECKING:
    from clt.lm.documents import Part
    from clt.lm.load import LanguageModel
    from clt.lm.text import Window

_TEXT_RULES = 3
"""How a text becomes rows. Rules that differ in what is cut or left out must not meet in one store."""


def extract_all(config: Config, progress: bool = True) -> list[StoreIndex]:
    """`extract` the training and the held-out store, with one language model for both."""
    parts: tuple[Part, ...] = ("train", "heldout")
    with _writing(Path(config.data.store)):
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
    with _writing(path):
        if not (path / INDEX).exists():
            lm = lm or _load(config)
            path.mkdir(parents=True, exist_ok=True)
            with locked(path):
                if not (path / INDEX).exists():  # else another process has just finished it
                    return _extract(path, config, part, lm, progress)
    index = read_index(path)
    check_store(index, config)
    check_files(index, config)
    if (path / STATE).exists():  # the extraction was killed just before it deleted it
        (path / STATE).unlink()
    return index


def _load(config: Config) -> LanguageModel:
    from clt.lm.load import load_language_model

    return load_language_model(config.lm, "cuda" if torch.cuda.is_available() else "cpu")


def _extract(path: Path, config: Config, part: Part, lm: LanguageModel, progress: bool) -> StoreIndex:
    keep_freed_memory()
    placement = Placement(path, _blank_index(config, part, lm), config.data.shard_rows, config.data.open_shards)
    # What must be equal to resume. The number of rows may change: only the last group depends on it.
    identity = dataclasses.asdict(placement.index)
    del identity["rows"], identity["shards"], identity["group_rows"]
    del identity["text"]["revision"]  # the commit is among the fingerprints
    identity |= identity.pop("fingerprints")
    identity |= {"text_rules": _TEXT_RULES, "lm.dtype": config.lm.dtype, "lm.batch_windows": config.lm.batch_windows}
    identity |= {"data.shard_rows": placement.shard_rows, "data.open_shards": placement.open_shards}
    zero = Moments.zero(placement.index.n_layers, placement.index.d_acts)
    state = load_state(path, identity) or ExtractionState([], 0, 0, zero)
    _check_room(placement, state)
    with Writer(placement, state, identity) as writer:
        _write_rows(pinned(config, part, placement.index.fingerprints or {}), placement, lm, writer, progress)
    check_files(placement.index, config)  # they may have changed while they were read
    writer.state.moments.statistics().save(path / STATISTICS)
    index = dataclasses.replace(placement.index, shards=writer.state.shards)
    write_index(path, index)
    (path / STATE).unlink()
    for text in survey(path, index, read_statistics(path / STATISTICS, "np")):
        tell(f"warning: {path}: {text}")
    return index


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Raise UserError for a store that cannot be written. Errors of reading are UserErrors already, and pass."""
    try:
        yield
    except OSError as error:
        if not is_full_disk(error):
            raise UserError(
                f"the store {path} cannot be written ({error}): change the mode or the owner of its directory, or set "
                "data.store to another one"
            ) from error
        raise UserError(
            f"no more could be written to {path} ({error}); free space and run `clt extract CONFIG` again, which "
            "resumes after the last complete shards, or set data.store to another disk"
        ) from error


def _write_rows(config: Config, placement: Placement, lm: LanguageModel, writer: Writer, progress: bool) -> None:
    """Hand the rows that follow the writer's state to the writer, in host memory, cut where groups end.

    On a GPU a second stream updates the moments and copies the rows while the model computes the next batch. On a CPU
    the model uses all cores, and a thread beside it gained nothing (measured). Raises UserError for too little text and
    for a value that overflows the storage dtype.
    """
    state, part, total = writer.state, placement.index.text["part"], placement.index.rows
    done, windows, skip = state.rows, state.windows, state.skip_rows
    side = torch.cuda.Stream(lm.device) if lm.device.type == "cuda" else None
    with torch.cuda.stream(side):  # allocated on that stream, so that the model's stream does not reuse the memory
        moments = state.moments.to(lm.device)
    with tqdm(total=total, initial=done, unit="row", desc=part, disable=not progress) as bar:
        for batch, rows, computed in _passes(config, part, lm, windows):
            while skip < len(rows) and done < total:
                group_end = min((done // placement.group_rows + 1) * placement.group_rows, total)
                piece = rows[skip : skip + group_end - done]
                done, skip = done + len(piece), skip + len(piece)
                with torch.cuda.stream(side):
                    if side is not None and computed is not None:
                        side.wait_event(computed)
                        piece.activations.record_stream(side)
                    moments.add(piece.activations)
                    reached = ExtractionState([], windows, skip, moments.to("cpu")) if done == group_end else None
                    if side is not None:
                        host = torch.empty_like(piece.activations, device="cpu", pin_memory=True)
                        piece = dataclasses.replace(piece, activations=host.copy_(piece.activations, non_blocking=True))
                    # A value that is not finite makes its sum of squares not finite: the rows need no check of their
                    # own. On a GPU this waits for the side stream, and so for the copy.
                    if not moments.squares.isfinite().all():
                        check_finite(lm, batch, piece)
                writer.put(piece, reached)
                bar.update(len(piece))
            if done == total:
                return
            skip, windows = 0, windows + len(batch)
    raise UserError(
        f"the {part} text of {config.text.source!r} ends after {done} rows, wanted {total}: "
        f"lower data.{part}_tokens={done}, or give more text"
    )


def _passes(
    config: Config, part: Part, lm: LanguageModel, windows: int
) -> Iterator[tuple[list[Window], Rows, torch.Event | None]]:
    """`forward_text`; on a GPU with the event after each pass, and one pass late, so that the GPU always has work."""
    waiting: list[tuple[list[Window], Rows, torch.Event]] = []
    for batch, rows in forward_text(config, part, lm, windows):
        if lm.device.type == "cpu":
            yield batch, rows, None
            continue
        computed = torch.cuda.current_stream(lm.device).record_event()
        yield from waiting
        waiting = [(batch, rows, computed)]
    yield from waiting


def _blank_index(config: Config, part: Part, lm: LanguageModel) -> StoreIndex:
    """The index of the store that will be extracted, without its shards."""
    return StoreIndex(
        model=lm.name,
        lm_layers=lm.model.config.get_text_config().num_hidden_layers,
        lm_dtype=config.lm.dtype,
        lm_revision=config.lm.revision,
        text={"part": part, **dataclasses.asdict(config.text)},
        seed=config.data.seed,
        context=config.lm.context,
        n_layers=len(lm.layers),
        dtype=config.data.dtype,
        rows=getattr(config.data, f"{part}_tokens"),
        shards=[],
        group_rows=config.data.shard_rows * config.data.open_shards,
        fingerprints=fingerprints(config, part, ask_hub=True),
        **read_from(lm),
    )


def _check_room(placement: Placement, state: ExtractionState) -> None:
    """Raise UserError when the rest of the rows cannot follow the extracted ones, or does not fit on the disk."""
    path, index, done = placement.path, placement.index, state.rows
    if done > index.rows or (done < index.rows and done % placement.group_rows):
        raise UserError(
            f"{path} holds an unfinished extraction with {done} rows done, wanted {index.rows}: "
            "set the tokens back to what they were to finish it, delete it, or choose another data.store"
        )
    wanted = (index.rows - done) * sum(row_bytes(*index.shape).values())
    free = shutil.disk_usage(path).free
    if free < wanted:
        raise UserError(
            f"{path} has {size_text(free)} free, wanted {size_text(wanted)} for the rows that are left: "
            "free space, set data.store to another disk, or lower data.train_tokens, data.heldout_tokens or lm.layers"
        )
