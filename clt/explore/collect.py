"""Run a text through the language model and the transcoder, and write down which feature fires where. Resumable.

Features are sparse: all firings of a text fit on a disk where the features themselves would not. What is told of a
feature is computed from them exactly, and the language model sees the text once.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from clt.config import Config
from clt.data.index import write_json
from clt.errors import UserError, mismatches, size_text, tell
from clt.explore.firings import GROUP, GROUP_BYTES, OF_ALL_BYTES, OF_LAYER, OF_TEXT, Firings
from clt.explore.shares import FIELDS, STATE, WHOLE, check_ranks, share_directory, unite
from clt.files import read_object
from clt.lm.documents import Part
from clt.lm.forward import check_finite, forward_text
from clt.lm.load import LanguageModel
from clt.model.transcoder import CrossLayerTranscoder

_RECORD = 6000  # bytes of a feature's record, about
_SAVE_SECONDS = 10.0  # between two states: what an interruption costs at most
_ROWS, _ELEMENTS = 512, 1 << 26  # encoded at once: tokens on a CPU, whose cache they fit; features of tokens on a GPU


def collect(
    directory: Path,
    config: Config,
    part: Part,
    lm: LanguageModel,
    transcoder: CrossLayerTranscoder,
    dtype: torch.dtype,
    windows: int,
    identity: dict[str, Any],
    progress: bool = True,
    rank: int = 0,
    ranks: int = 1,
) -> Firings | None:
    """Run the first `windows` windows of one part of the text, or as many as it has, through model and transcoder.

    Each of `ranks` processes runs its share of them; rank 0 puts the shares together, the others return None. Goes on
    where an interrupted call stopped; the files depend on neither that nor the ranks. dtype: of the encoder's products.
    Raises UserError as `forward_text` and `check_finite`, when the files in `directory` are of another `identity` or of
    another number of ranks, when a feature is not finite, and when the disk has too little room.
    """
    whole, T = directory / WHOLE, config.lm.context
    if not whole.exists():
        own = share_directory(directory, rank, ranks)
        check_ranks(directory, ranks)
        state = _state(own, transcoder.n_layers, identity)
        if not state["done"]:
            run = _Share(config, part, lm, transcoder, dtype, windows, rank, ranks)
            with _Files(own, state, T) as files:
                _stream(files, run, progress and rank == 0)
                files.save(done=True)
        if rank == 0:
            unite(directory, ranks, transcoder.n_layers)
    if rank:
        return None
    _state(whole, transcoder.n_layers, identity)
    firings = Firings(whole, transcoder.n_layers, T)
    if (found := len(firings.token) // T) < windows:
        tell(f"the {part} text ends after {found} of {windows} windows of {T} tokens; these are taken")
    return firings


def _state(directory: Path, n_layers: int, identity: dict[str, Any]) -> dict[str, Any]:
    """How far the files in `directory` are; starts them where there are none."""
    if not (directory / STATE).exists():
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)
        state = {"identity": identity, "windows": 0, "firings": [0] * n_layers, "done": False}
        write_json(directory / STATE, state)
        return state
    features = directory.parents[1]
    state = read_object(directory / STATE, FIELDS, f"delete {features} and run `clt features RUN` again")
    if odd := mismatches(state["identity"], identity):
        raise UserError(
            f"{features} holds unfinished features of something else: {odd}; set these back to finish them, or "
            "delete it"
        )
    return state


class _Files:
    """The files of `Firings`, open for appending after what `state` says is complete."""

    def __init__(self, directory: Path, state: dict[str, Any], context: int) -> None:
        self.directory, self.state, self.saved = directory, state, time.monotonic()
        places, stack = state["windows"] * context, ExitStack()
        lengths = {f"text.{name}": (places, kind) for name, kind in OF_TEXT.items()}
        for s, firings in enumerate(state["firings"]):
            lengths |= {f"layer_{s}.{n}": (places if n == "end" else firings, kind) for n, kind in OF_LAYER.items()}
        self.files = {name: stack.enter_context((directory / name).open("ab")) for name in lengths}
        self.stack = stack
        for name, (length, kind) in lengths.items():
            self.files[name].truncate(length * np.dtype(kind).itemsize)

    def __enter__(self) -> _Files:
        return self

    def __exit__(self, *_: object) -> None:
        self.stack.close()

    def put(self, name: str, array: np.ndarray) -> None:
        """Append the array to the file of that name."""
        kind = (OF_TEXT | OF_LAYER)[name.rpartition(".")[2]]
        self.files[name].write(np.ascontiguousarray(array, kind).data)

    def save(self, done: bool = False) -> None:
        """Record that all that was put is complete."""
        for file in self.files.values():
            file.flush()
            os.fsync(file.fileno())
        self.state["done"] = done
        write_json(self.directory / STATE, self.state)
        self.saved = time.monotonic()


class _Share(NamedTuple):
    """What one of the ranks runs: whole passes of the model, so that their batches are those of a single process."""

    config: Config
    part: Part
    lm: LanguageModel
    transcoder: CrossLayerTranscoder
    dtype: torch.dtype
    windows: int  # of all ranks
    rank: int
    ranks: int

    def starts_at(self, rank: int) -> int:
        """The first window of a rank."""
        size = self.config.lm.batch_windows
        return min(-(-self.windows // size) * rank // self.ranks * size, self.windows)


def _stream(files: _Files, share: _Share, progress: bool) -> None:
    config, state, room = share.config, files.state, share.rank == 0
    first, T, size = share.starts_at(share.rank), config.lm.context, config.lm.batch_windows
    windows = share.starts_at(share.rank + 1) - first
    with tqdm(
        total=windows * T, initial=state["windows"] * T, unit="token", desc=share.part, disable=not progress
    ) as bar:
        passes = -(-(windows - state["windows"]) // size)
        stream = forward_text(config, share.part, share.lm, first + state["windows"])
        for batch, rows in islice(stream, passes):
            if not rows.activations[:, 0].sum(dtype=torch.float32).isfinite():  # a fraction of the time of all()
                check_finite(share.lm, batch, rows)
            batch = batch[: windows - state["windows"]]
            token, document, keep = (np.concatenate(arrays) for arrays in zip(*batch))  # (p,) each
            for name, array in zip(OF_TEXT, (token, document, keep)):
                files.put(f"text.{name}", array)
            x = rows.activations[: keep.sum(), 0]  # (n, L, D)
            for s, (feature, value, count) in enumerate(_encoded(share.transcoder, x, share.dtype)):
                if not np.isfinite(value).all():
                    raise UserError(
                        f"a feature of layer {s} overflows {str(share.dtype).removeprefix('torch.')}: set "
                        "train.precision=bf16 or fp32 in the run's config.yaml, and delete "
                        f"{files.directory.parents[1]}"
                    )
                counts = np.zeros(len(keep), np.int64)
                counts[keep] = count
                files.put(f"layer_{s}.feature", feature)
                files.put(f"layer_{s}.value", value)
                files.put(f"layer_{s}.end", state["firings"][s] + np.cumsum(counts))
                state["firings"][s] += len(feature)
            state["windows"] += len(batch)
            if room:
                _check_room(files.directory, state, share)
                room = False
            if time.monotonic() - files.saved > _SAVE_SECONDS:
                files.save()
            bar.update(len(token))


@torch.no_grad()
def _encoded(
    transcoder: CrossLayerTranscoder, x: Tensor, dtype: torch.dtype
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """For each layer what fires on the tokens x (n, L, D): features and values (m,), and their number by token (n,)."""
    F = transcoder.d_features
    split = max(1, _ELEMENTS // F) if x.is_cuda else _ROWS
    for s in range(transcoder.n_layers):
        parts = []
        for few in x[:, s].split(split):
            with torch.autocast(x.device.type, dtype, enabled=dtype != torch.float32):
                flat = transcoder.encode_layer(few, s).flatten()
            if flat.is_cuda:
                at = (flat > 0).nonzero().squeeze(1)
                places, values = at.cpu().numpy(), flat[at].float().cpu().numpy()
            else:  # six times as fast as torch's nonzero
                places = np.flatnonzero(flat.numpy() > 0)
                values = flat.numpy()[places]
            parts.append((places % F, values, np.bincount(places // F, minlength=len(few))))
        feature, value, count = (np.concatenate(arrays) for arrays in zip(*parts))
        yield feature, value, count


def _check_room(directory: Path, state: dict[str, Any], share: _Share) -> None:
    """Tell what all windows will take, by those so far; raise UserError when the disk has less."""
    layers, T = state["firings"], share.config.lm.context
    done, all_tokens = state["windows"] * T, share.windows * T
    place = sum(np.dtype(kind).itemsize for kind in OF_TEXT.values()) + len(layers) * np.dtype(OF_LAYER["end"]).itemsize
    firing = sum(np.dtype(OF_LAYER[name]).itemsize for name in ("feature", "value"))
    l0, copies = sum(layers) / done, 1 if share.ranks == 1 else 2  # rank 0 puts the shares together in a second copy
    wanted = (copies * all_tokens - done) * (place + firing * l0)
    wanted += len(layers) * share.transcoder.d_features * _RECORD
    most = all_tokens / done * max(layers)
    memory = min(GROUP, most) * GROUP_BYTES + most * OF_ALL_BYTES
    free = shutil.disk_usage(directory).free
    tell(
        f"{l0:.1f} features fire on a token; {all_tokens:,} tokens take about {size_text(wanted)} of disk, and "
        f"{size_text(memory)} of memory in each process that writes records"
    )
    if free < wanted:
        raise UserError(
            f"{directory} has {size_text(free)} free, wanted {size_text(wanted)} for what fires on {all_tokens} tokens "
            "and the records: free space, or lower --tokens"
        )
