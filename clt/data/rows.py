"""The rows of a store in the order of the text: the language model's forward pass, statistics, the way to the host."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from clt.config import Config
from clt.data.state import ExtractionState
from clt.data.statistics import Moments
from clt.data.writer import Plan, Rows
from clt.errors import UserError

if TYPE_CHECKING:
    from clt.lm.capture import Capture
    from clt.lm.documents import Part
    from clt.lm.load import LanguageModel


def pieces(
    config: Config, plan: Plan, lm: LanguageModel, state: ExtractionState
) -> Iterator[tuple[Rows, ExtractionState | None]]:
    """The rows from `state` on, cut where groups end; a piece that ends a group comes with the state then.

    Raises UserError for a value that does not fit the storage dtype and for a text that ends early.
    """
    done = state.rows
    for piece in _counted(_cut(config, plan, lm, state), state.moments, lm.device):
        if not piece.finite:
            raise _overflow(piece, lm)
        yield Rows(piece.stored, *(column[piece.part] for column in piece.batch.columns)), piece.note
        done += len(piece.stored)
    if done < plan.index.rows:
        part = plan.index.text["part"]
        key = "train_tokens" if part == "train" else "heldout_tokens"
        raise UserError(
            f"the {part} text of {config.text.source!r} ends after {done} rows, wanted {plan.index.rows}: "
            f"lower data.{key}={done}, or give more text"
        )


def captured(config: Config, part: Part, lm: LanguageModel, skip: int) -> Iterator[tuple[int, Rows]]:
    """Batch by batch, from window `skip` of the text on: the windows before it, and its kept rows in `data.dtype`.

    Raises UserError for a value that this dtype does not hold.
    """
    for batch in _batches(config, part, lm, skip):
        stored = batch.run(getattr(torch, config.data.dtype))
        finite = stored.isfinite().all()
        if not finite:
            raise _overflow(_Piece(batch, slice(None), stored, None), lm)
        yield skip, Rows(stored.cpu(), *batch.columns)
        skip += len(batch.tokens)


@dataclass
class _Batch:
    """What one forward pass was made of."""

    capture: Capture
    tokens: np.ndarray
    """(N, T)"""
    keep: np.ndarray
    """(N, T) bool: False at positions whose activations are not stored; n of them are True"""
    columns: tuple[np.ndarray, np.ndarray, np.ndarray]
    """token, position and document (n,)"""

    def run(self, dtype: torch.dtype | None) -> Tensor:
        """The kept rows (n, 2, L, D) on the model's device; in its own dtype for None."""
        return self.capture(torch.from_numpy(self.tokens).long(), self.keep, dtype)


@dataclass
class _Piece:
    """Rows of one forward pass that belong to one group of shards."""

    batch: _Batch
    part: slice
    """Which of the batch's kept rows."""
    stored: Tensor
    """(n, 2, L, D) in storage dtype"""
    ends: tuple[int, int] | None
    """(windows, rows of the next) before the next group, of a piece that ends one"""
    finite: Tensor | None = None
    """() bool, when it is counted: all values so far are"""
    note: ExtractionState | None = None
    """When it is counted and ends a group."""


def _cut(config: Config, plan: Plan, lm: LanguageModel, state: ExtractionState) -> Iterator[_Piece]:
    """The pieces, on the model's device."""
    done, total, used, windows = state.rows, plan.index.rows, state.skip_rows, state.windows
    dtype = getattr(torch, plan.index.dtype)
    for batch in _batches(config, plan.index.text["part"], lm, windows):
        rows = batch.run(dtype)
        while used < len(rows) and done < total:
            group_end = min((done // plan.group_rows + 1) * plan.group_rows, total)
            part = slice(used, min(len(rows), used + group_end - done))
            used, done = part.stop, done + part.stop - part.start
            yield _Piece(batch, part, rows[part], (windows, used) if done == group_end else None)
        if done == total:
            return
        used, windows = 0, windows + len(batch.tokens)


def _batches(config: Config, part: Part, lm: LanguageModel, skip: int) -> Iterator[_Batch]:
    from clt.lm.capture import Capture
    from clt.lm.text import windows

    capture = Capture(lm)
    stream = iter(windows(config.text, part, lm, config.lm.context, skip=skip))
    while batch := list(islice(stream, config.lm.batch_windows)):
        tokens, documents, keep = (np.stack(arrays) for arrays in zip(*batch))  # (N, T)
        positions = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
        yield _Batch(capture, tokens, keep, (tokens[keep], positions[keep], documents[keep]))


def _counted(pieces: Iterator[_Piece], moments: Moments, device: torch.device) -> Iterator[_Piece]:
    """The pieces in host memory and in the moments.

    On a GPU, a stream of its own sees to both while the model computes the next batch. On a CPU there is nothing to
    overlap with: the model takes all cores, and a thread beside it gained nothing (measured).
    """
    waiting = deque[tuple[_Piece, torch.cuda.Event]]()
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None
    with torch.cuda.stream(stream):  # also their memory is that stream's: the model's must not have it while it is read
        moments = moments.to(device)
    for piece in pieces:
        if stream is None:
            _count(piece, moments)
            yield piece
            continue
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            piece.stored.record_stream(stream)
            _count(piece, moments)
            waiting.append((piece, _copy(piece, stream)))
        if len(waiting) > 1:
            yield _copied(*waiting.popleft())
    while waiting:
        yield _copied(*waiting.popleft())


def _count(piece: _Piece, moments: Moments) -> None:
    moments.add(piece.stored)
    # One value that is not finite makes its sum of squares so: no pass over the rows is needed to find it.
    piece.finite = moments.squares.isfinite().all()
    if piece.ends is not None:
        piece.note = ExtractionState([], *piece.ends, moments.to("cpu"))


def _copy(piece: _Piece, stream: torch.cuda.Stream) -> torch.cuda.Event:
    """Start copying a piece to pinned memory; returns the event after which it is there."""
    for name in ("stored", "finite"):
        there = getattr(piece, name)
        setattr(piece, name, torch.empty_like(there, device="cpu", pin_memory=True).copy_(there, non_blocking=True))
    event = torch.cuda.Event()
    event.record(stream)
    return event


def _copied(piece: _Piece, event: torch.cuda.Event) -> _Piece:
    event.synchronize()
    return piece


def _overflow(piece: _Piece, lm: LanguageModel) -> UserError:
    """The error for the first value that does not fit the storage dtype; the model runs again to say what it was."""
    stored, kept, documents = piece.stored, piece.batch.run(None)[piece.part], piece.batch.columns[2][piece.part]
    # By layer, then input before target, as the model computes them: later ones may only follow from the first.
    layer, side, row, dim = (~stored.isfinite()).transpose(0, 2).nonzero()[0].tolist()
    value, dtype = kept[row, side, layer, dim].item(), str(stored.dtype).removeprefix("torch.")
    where = f"{('input', 'target')[side]} activation {value:g} at layer {lm.layers[layer]} (document {documents[row]})"
    if np.isfinite(value):
        return UserError(
            f"{where} overflows {dtype}, which ends at {torch.finfo(stored.dtype).max:g}: set data.dtype=bfloat16 or "
            "data.dtype=float32"
        )
    return UserError(f"{where} is not finite in the language model itself: set lm.dtype=bfloat16 or lm.dtype=float32")
