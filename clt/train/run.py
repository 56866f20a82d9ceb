"""A run's parts, built from its config: what train_ddp.py and `clt eval` share."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from clt.config import Config, identity, load_config
from clt.data.extract import check_store, extract_all
from clt.data.index import write_whole
from clt.data.store import DiscBuffer
from clt.errors import UserError
from clt.model.decode import SumShards, whole
from clt.model.loss import Objective
from clt.model.transcoder import CrossLayerTranscoder
from clt.parsing import to_yaml
from clt.train.evaluation import Progress, Reduce, alone, evaluate_activations, evaluate_replacement, silent

if TYPE_CHECKING:
    from clt.lm.documents import Part
    from clt.lm.load import LanguageModel
    from clt.lm.text import Window
    from clt.server.remote import ServerStore


def make_stores(config: Config, progress: bool = True) -> None:
    """Extract the stores that are missing; of a run that reads from a server, fetch the held-out rows."""
    if config.data.source == "server":
        from clt.server.remote import fetch_heldout

        return fetch_heldout(config)
    extract_all(config, progress)


def open_stores(config: Config) -> tuple[DiscBuffer | ServerStore, DiscBuffer]:
    """The training store, or the server in its place, and the held-out store.

    Raises UserError when they are not of one model, as `open_store`, and when the server does not answer.
    """
    if config.data.source == "server":
        from clt.server.remote import open_server

        train = open_server(config)
    else:
        train = open_store(config, "train")
    heldout = open_store(config, "heldout")
    names = ("n_layers", "d_acts", "layers", "input_sites", "output_sites", "revision", "tokenizer_hash")
    pairs = {name: (getattr(train.index, name), getattr(heldout.index, name)) for name in names}
    odd = [f"{name} is {ours!r} and {theirs!r}" for name, (ours, theirs) in pairs.items() if ours != theirs]
    if odd:
        raise UserError(
            f"the stores {train.path} and {heldout.path} are not of one language model: {'; '.join(odd)}; "
            "delete the wrong one to extract it again, or set data.store to another directory"
        )
    return train, heldout


def open_store(config: Config, part: Part) -> DiscBuffer:
    """The store of one part. Raises UserError when it is missing, damaged or of another config."""
    store = DiscBuffer(Path(config.data.store) / part)
    check_store(store.index, config)
    return store


def build(
    config: Config,
    store: DiscBuffer | ServerStore,
    shard: tuple[int, int] = (0, 1),
    sum_shards: SumShards = whole,
) -> Objective:
    """The transcoder, or a shard of it, in its objective: weights drawn from `run.seed`, the rest from the store."""
    if config.clt.d_features % shard[1]:
        raise UserError(
            f"clt.d_features={config.clt.d_features} cannot be split into parallel.feature_shards={shard[1]} equal "
            "shards: choose a multiple of it"
        )
    torch.manual_seed(config.run.seed)
    index, statistics = store.index, store.statistics
    transcoder = CrossLayerTranscoder(
        index.n_layers,
        index.d_acts,
        config.clt.d_features,
        activation=config.clt.activation,
        cross_layer=config.clt.cross_layer,
        threshold=config.clt.threshold,
        bandwidth=config.clt.bandwidth,
        straight_through_pre=config.clt.straight_through_pre,
        normalization=config.clt.normalization,
        shard=shard,
        sum_shards=sum_shards,
    )
    transcoder.normalization.set(
        statistics.input_mean, statistics.input_sd, statistics.target_mean, statistics.target_sd
    )
    return Objective(
        transcoder,
        sparsity_scale=config.loss.sparsity_scale,
        pre_activation=config.loss.pre_activation,
        pre_activation_kind=config.loss.pre_activation_kind,
        target_scale=config.loss.target_scale,
        compile=config.train.compile,
    )


def check_run_dir(config: Config) -> None:
    """Raise UserError when `run.dir` holds a run of another config, or one that must not be resumed."""
    path = Path(config.run.dir) / "config.yaml"
    if not path.exists():
        return
    found, wanted = identity(load_config(path)), identity(config)
    differences = [f"{key}: found {found[key]!r}, wanted {wanted[key]!r}" for key in found if found[key] != wanted[key]]
    if differences:
        raise UserError(
            f"run directory {config.run.dir} holds a run of another config ({'; '.join(differences)}); "
            "choose another run.dir, or delete this one"
        )
    if not config.checkpoint.resume:
        raise UserError(
            f"run directory {config.run.dir} already holds this run and checkpoint.resume is false; "
            "choose another run.dir, delete this one, or set checkpoint.resume=true"
        )


def claim_run_dir(config: Config) -> None:
    """Create `run.dir` with its resolved config.yaml, the mark that `check_run_dir` reads."""
    directory = Path(config.run.dir)
    directory.mkdir(parents=True, exist_ok=True)
    write_whole(directory / "config.yaml", to_yaml(config).encode())


def evaluate(
    transcoder: CrossLayerTranscoder,
    heldout: DiscBuffer,
    mean_output: Tensor,
    lm: LanguageModel | None,
    windows: Sequence[Window],
    *,
    autocast: torch.dtype,
    run: Any = None,
    rank: int = 0,
    world: int = 1,
    all_sum: Reduce = alone,
    progress: Progress = silent,
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Quality as plain numbers for logs and summary.json, and the tensors of `evaluate_activations` for plots.

    mean_output: (L, D), what mean ablation writes; lm: None leaves the replacement model out; windows: held-out text.
    """
    share: dict[str, Any] = {"rank": rank, "world": world, "all_sum": all_sum, "progress": progress}
    tensors = evaluate_activations(transcoder, heldout, autocast=autocast, **share)
    numbers: dict[str, Any] = {key: value.tolist() for key, value in tensors.items() if key != "density"}
    if lm is not None:
        numbers |= evaluate_replacement(lm, transcoder, mean_output.to(lm.device), windows, run=run, **share)
    return numbers, tensors


def heldout_windows(config: Config, lm: LanguageModel) -> list[Window]:
    """The first windows of held-out text, `eval.replacement_tokens` in all (rounded up to whole windows)."""
    from itertools import islice

    from clt.lm.text import windows

    count = -(-config.eval.replacement_tokens // config.lm.context)
    found = list(islice(windows(config.text, "heldout", lm, config.lm.context), count))
    if not found:
        raise UserError(
            f"the held-out text is shorter than one window of lm.context={config.lm.context} tokens; "
            "lower lm.context, name more held-out text, or set eval.replacement_tokens=0"
        )
    if not any((window.keep[:-1] & window.keep[1:]).any() for window in found):
        raise UserError(
            f"no window of lm.context={config.lm.context} held-out tokens has two neighbours that are not special "
            "tokens, so there is nothing to predict: raise lm.context, or set eval.replacement_tokens=0"
        )
    return found
