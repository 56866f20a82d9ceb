"""TopK and BatchTopK transcoders as JumpReLU ones, which other tools can load and which need no other token."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from clt.config import Config
from clt.data.store import DiscBuffer
from clt.errors import UserError
from clt.model.spec import BY_K, CLTConfig
from clt.model.transcoder import CrossLayerTranscoder
from clt.train.evaluation import SavedRun
from clt.train.report import table
from clt.train.run import open_store

_FEATURES = 256  # whose pre-activations are sorted at once
_ROWS = 4096  # that are encoded at once


def convert_run(config: Config, directory: Path, step: int, rows: int) -> None:
    """Convert a run's checkpoint into its directory, with thresholds from `rows` training rows; print both's figures.

    Raises UserError as `SavedRun`, for a run of another rule, and when it has been converted already.
    """
    run = SavedRun(config, directory, step)
    if (rule := run.transcoder.spec.activation) not in BY_K:
        raise UserError(f"{directory} is a {rule} run; wanted one of clt.activation={' or '.join(BY_K)}")
    converted_directory = directory / f"jumprelu_step_{step:08d}"
    if converted_directory.exists():
        raise UserError(f"{converted_directory} exists already; delete it to convert again")
    if rows < 1:
        raise UserError(f"--rows is {rows}; wanted 1 or more")
    x = evenly(open_store(config, "train"), rows)[:, 0].to(run.transcoder.b_dec)
    converted = to_jumprelu(run.transcoder, x)
    for name, transcoder in ((rule, run.transcoder), ("jumprelu", converted)):
        numbers = run.evaluate(transcoder).numbers
        del numbers["dead_fraction"]  # is of the training run
        print(f"{name}:\n{table(numbers)}\n")
    converted.save_pretrained(converted_directory)
    print(f"The transcoder is in {converted_directory}; thresholds were set on {len(x):,} training rows")


def evenly(store: DiscBuffer, rows: int) -> Tensor:
    """At most `rows` rows of a store, evenly spaced over it: (n, 2, L, D)."""
    rows = min(rows, len(store))
    return store[[len(store) * i // rows for i in range(rows)]]


@torch.no_grad()
def to_jumprelu(transcoder: CrossLayerTranscoder, x: Tensor) -> CrossLayerTranscoder:
    """The same weights, shared, with thresholds by which each feature fires as often on x (n, L, D) as it does now.

    x are residual streams in model units, n rows. A threshold lies midway between the pre-activations of which one more
    and one fewer would fire; that of a feature which never fires on x is its largest pre-activation. Without
    normalization `token`, the result folds exactly.
    """
    plain = CLTConfig()
    rule = {name: getattr(plain, name) for name in ("k", "k_start", "by_norm", "threshold")}
    spec = replace(transcoder.spec, activation="jumprelu", **rule)
    with torch.device("meta"):
        converted = CrossLayerTranscoder(transcoder.n_layers, transcoder.d_acts, spec, sites=transcoder.sites)
    if not isinstance(transcoder.W_enc, Tensor):  # is read a layer at a time, as is W_dec
        del converted.W_enc, converted.W_dec
        converted.W_enc, converted.W_dec = transcoder.W_enc, transcoder.W_dec
    threshold = torch.empty_like(transcoder.threshold)
    converted.load_state_dict(transcoder.state_dict() | {"threshold": threshold}, assign=True)  # shares the others
    for layer, of_layer in enumerate(x.unbind(1)):
        fired = torch.zeros(transcoder.d_features, dtype=torch.int64, device=x.device)
        for rows in of_layer.split(_ROWS):
            fired += (transcoder.encode_layer(rows, layer) > 0).sum(0)
        inputs = transcoder.normalization.input(of_layer, layer)
        for first in range(0, transcoder.d_features, _FEATURES):
            part = slice(first, first + _FEATURES)
            pre = inputs @ transcoder.W_enc[layer][:, part] + transcoder.b_enc[layer, part]
            converted.threshold[0, layer, part] = _between(pre, fired[part])
    return converted


def _between(pre: Tensor, count: Tensor) -> Tensor:
    """Thresholds (f,) above which `count` (f,) of the values of each column of pre (n, f) are; never negative."""
    ordered = pre.sort(0, descending=True).values
    last_in = ordered.gather(0, (count - 1).clamp_min(0).unsqueeze(0))
    first_out = ordered.gather(0, count.clamp_max(len(pre) - 1).unsqueeze(0)).clamp_min(0)
    middle = torch.where(count == 0, last_in, (last_in + first_out) / 2)
    return torch.where(count == len(pre), 0, middle).clamp_min(0).squeeze(0)
