"""`clt features RUN`: what each feature of a run fires on and writes, as the files of clt/explore/files.py."""

from __future__ import annotations

import dataclasses
import os
import shutil
import signal
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file
from tqdm import tqdm

from clt.config import Config
from clt.data.check import check_files, check_model
from clt.data.index import INDEX, read_index
from clt.data.lock import locked
from clt.errors import UserError, mismatches, size_text, tell
from clt.explore.collect import collect
from clt.explore.direct import direct_logits, final_norm, softcap, token_texts
from clt.explore.files import ARRAYS, SUMMARY, Features, write_summary
from clt.explore.firings import Firings
from clt.explore.records import LOGITS, TOP, RecordInputs, write_records
from clt.export.records import FEATURES
from clt.lm.documents import Part
from clt.lm.fingerprint import fingerprints, pinned
from clt.lm.load import LanguageModel, load_language_model
from clt.memory import keep_freed_memory
from clt.model.transcoder import CrossLayerTranscoder
from clt.train import checkpoint
from clt.train.distributed import accumulate_in_float32, own_gpu
from clt.train.optim import autocast_dtype

_WORK = "firings"  # the directory, in that of the features, that is deleted when they are complete


def make_features(
    config: Config, run: Path, step: int, part: Part, tokens: int, progress: bool = True
) -> Features | None:
    """Make or finish the features of a run's checkpoint on the first `tokens` tokens of one part of the config's text.

    Whole windows are read. Under torchrun each rank reads a share of them; rank 0 makes the features of all, and the
    others return None. The files depend on neither interruptions nor the ranks. Raises UserError when they are there
    already of something else, when the language model does not fit, and as `collect`.
    """
    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    directory, device = run / FEATURES, own_gpu() if torch.cuda.is_available() else torch.device("cpu")
    dtype = autocast_dtype(config.train.precision, device)
    path = run / "checkpoints" / f"step_{step:08d}"
    windows = -(-tokens // config.lm.context)
    identity: dict[str, Any] = {
        "step": step,
        "checksums": (checkpoint.read_state(path)["checksums"] or {}).get(checkpoint.MODEL),
        "part": part,
        "text": dataclasses.asdict(config.text),
        "windows": windows,
        "lm.context": config.lm.context,
        "lm.batch_windows": config.lm.batch_windows,
        "precision": str(dtype).removeprefix("torch."),
        "device": device.type,
        **_fingerprints(config, part),
    }
    accumulate_in_float32()  # as in training
    if rank and (directory / SUMMARY).exists():
        return None
    place = directory / _WORK / f"rank_{rank}" if rank else directory
    place.mkdir(parents=True, exist_ok=True)
    with locked(place, "being made", "RUN"):
        if not (directory / SUMMARY).exists():
            lm = load_language_model(config.lm, device)
            transcoder = checkpoint.load_transcoder(path).to(device).requires_grad_(False)
            check(config, part, lm, transcoder)
            keep_freed_memory()
            if rank == 0:
                size = sum(tensor.nbytes for model in (lm.model, transcoder) for tensor in model.state_dict().values())
                count = transcoder.n_layers * transcoder.d_features
                tell(f"{count:,} features; the weights of both models take {size_text(size)}")
            text = pinned(config, part, identity)
            firings = collect(
                directory / _WORK, text, part, lm, transcoder, dtype, windows, identity, progress, rank, ranks
            )
            if firings is not None:
                _make(directory, firings, part, lm, transcoder, identity, f"{run.resolve().name}-{step}", progress)
        if rank:
            return None
        features = Features(directory)
        if odd := mismatches(features.summary["identity"], identity):
            raise UserError(f"{directory} holds features of something else: {odd}; delete it to make them again")
        shutil.rmtree(directory / _WORK, ignore_errors=True)
    return features


def _fingerprints(config: Config, part: Part) -> dict[str, str]:
    """Those of the run's store, where it is there and model and text are still the same; else as they are now."""
    store = Path(config.data.store) / part
    if not (store / INDEX).exists():
        tell(f"warning: {store} is not there, so whether model and text are those of the run is not checked")
        return fingerprints(config, part, ask_hub=True)
    index = read_index(store)
    check_files(index, config)
    return index.fingerprints or fingerprints(config, part, ask_hub=True)


def check(config: Config, part: Part, lm: LanguageModel, transcoder: CrossLayerTranscoder) -> None:
    """Raise UserError when the language model is not the one that the run was trained on."""
    found, wanted = (len(lm.layers), lm.d_model), (transcoder.n_layers, transcoder.d_acts)
    if found != wanted:
        raise UserError(
            f"{lm.name!r} has activations of (L, D) = {found}, the checkpoint was trained on {wanted}; "
            "set lm.model and lm.layers in the run's config.yaml back to what they were"
        )
    if ((store := Path(config.data.store) / part) / INDEX).exists():
        check_model(read_index(store), lm)


def _make(
    directory: Path,
    firings: Firings,
    part: Part,
    lm: LanguageModel,
    transcoder: CrossLayerTranscoder,
    identity: dict[str, Any],
    transcoder_id: str,
    progress: bool,
) -> None:
    L, F = transcoder.n_layers, transcoder.d_features
    workers = min(L, len(os.sched_getaffinity(0)))
    texts = token_texts(lm)
    counts = np.stack([of_layer.counts(F) for of_layer in firings.layers])
    source = RecordInputs(firings, counts, texts, transcoder_id, int(firings.keep.sum()))
    _write_all(directory, source, _direct(lm, transcoder), workers, progress)
    layers = [load_file(_made(directory, s)) for s in range(L)]
    summary = {
        "transcoder_id": transcoder_id,
        "step": identity["step"],
        "model": lm.name,
        "layers": lm.layers,
        "n_layers": L,
        "d_features": F,
        "part": part,
        "text": identity["text"],
        "context": firings.context,
        "tokens": source.tokens,
        "windows": len(firings.token) // firings.context,
        "documents": len(np.unique(firings.document)),
        "final_norm": final_norm(lm),
        "softcap": softcap(lm),
        "identity": identity,
    }
    arrays = {name: np.stack([layer[name] for layer in layers]) for name in ARRAYS}
    write_summary(directory, [layer["offsets"].tolist() for layer in layers], arrays, texts, summary)
    if summary["documents"] < TOP:
        tell(
            f"warning: the text has {summary['documents']} documents, and a list of examples has at most one of each: "
            "lists are longer with more tokens, or with a .jsonl file of shorter documents"
        )


def _made(directory: Path, layer: int) -> Path:
    return directory / _WORK / f"layer_{layer}.made"


def _direct(lm: LanguageModel, transcoder: CrossLayerTranscoder) -> Iterator[dict[str, np.ndarray]]:
    """What `write_records` takes as `direct`, layer by layer."""
    count = min(LOGITS, len(lm.tokenizer))
    for decoder, logits in zip(transcoder.W_dec, direct_logits(lm, transcoder, count)):
        yield {"norms": torch.linalg.vector_norm(decoder, dim=2).cpu().numpy(), **logits._asdict()}


def _write_all(
    directory: Path, source: RecordInputs, direct: Iterator[dict[str, np.ndarray]], workers: int, progress: bool
) -> None:
    """`write_records` of the layers that are not made yet, each by a process."""
    L, F = source.counts.shape
    work = [
        (directory, _made(directory, s), s, source, of_layer)
        for s, of_layer in enumerate(direct)
        if not _made(directory, s).exists()
    ]
    with tqdm(total=L * F, initial=(L - len(work)) * F, unit="feature", desc="records", disable=not progress) as bar:
        if workers == 1:
            for arguments in work:
                write_records(*arguments)
                bar.update(F)
            return
        # Ctrl-C ends the processes without a word each.
        quiet = {"initializer": signal.signal, "initargs": (signal.SIGINT, signal.SIG_DFL)}
        try:
            with ProcessPoolExecutor(workers, get_context("spawn"), **quiet) as pool:
                for future in as_completed([pool.submit(write_records, *arguments) for arguments in work]):
                    future.result()
                    bar.update(F)
        except BrokenProcessPool as error:
            raise UserError(
                "a process that wrote records was killed: was there too little memory? Run the same command again; "
                "finished layers are kept"
            ) from error
