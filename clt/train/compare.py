"""Any transcoders, of ours or imported, on one language model and one text: the figures of `clt eval`, side by side.

Each is read a layer at a time, and at the sites that it was trained at.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clt.config import Config, load_config
from clt.data.statistics import Moments, Statistics
from clt.errors import UserError
from clt.files import or_null
from clt.lm.capture import capture
from clt.lm.load import LanguageModel, load_language_model
from clt.lm.sites import at_sites, find_sites
from clt.lm.text import Window
from clt.model.spec import Sites
from clt.model.transcoder import CrossLayerTranscoder
from clt.train.distributed import accumulate_in_float32
from clt.train.evaluation import Evaluation, evaluate_activations, evaluate_replacement, heldout_windows
from clt.train.optim import autocast_dtype

DENSE = 0.1
"""Share of the tokens above which a feature counts as dense."""
_FEATURES = 1 << 28  # of one layer, over all tokens that are encoded at once


def evaluate_transcoders(config: Config, directories: Sequence[str]) -> dict[str, Evaluation]:
    """The figures of each transcoder on `eval.replacement_tokens` held-out tokens of the config's text.

    Raises UserError when one cannot be read, or does not fit the language model.
    """
    if not config.eval.replacement_tokens:
        raise UserError("eval.replacement_tokens is 0; wanted the number of held-out tokens to evaluate on")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    accumulate_in_float32()  # as in training
    found, lm, windows = {}, None, []
    # All are opened first, so that a wrong name is told before hours of work.
    opened = {directory: CrossLayerTranscoder.from_pretrained(directory, lazy=True) for directory in directories}
    for directory in directories:
        _check_layers(config, Path(directory))
    for directory, transcoder in opened.items():
        transcoder = transcoder.to(device)
        lm = language_model(config, (transcoder.n_layers, transcoder.d_acts), transcoder.sites, device, lm)
        windows = windows or heldout_windows(config, lm)
        found[directory] = _evaluate(config, transcoder, lm, windows)
    return found


def _check_layers(config: Config, directory: Path) -> None:
    """Raise UserError when a transcoder is of a run on other layers of a language model."""
    for run in (directory, *directory.resolve().parents[:2]):
        if (file := run / "config.yaml").is_file() and (run / "checkpoints").is_dir():
            if (trained := load_config(file).lm.layers) != config.lm.layers:
                raise UserError(
                    f"{directory} was trained on lm.layers={trained}, lm.layers here is {config.lm.layers}; set it to "
                    "the same"
                )
            return


def language_model(
    config: Config, size: tuple[int, int], sites: Sites, device: torch.device, lm: LanguageModel | None = None
) -> LanguageModel:
    """The config's language model (`lm`, where it is loaded already), hooked where a transcoder of (L, D) = `size` is.

    Raises UserError when the two do not fit.
    """
    wanted = at_sites(config.lm, sites.input_site, sites.output_site)
    lm = lm or load_language_model(wanted, device)
    if size != (len(lm.layers), lm.d_model):
        of = f" (it was trained on {sites.model})" if sites.model else ""
        raise UserError(
            f"the transcoder has {size[0]} layers of width {size[1]}{of}, {lm.name!r} has {len(lm.layers)} of width "
            f"{lm.d_model}; set lm.model to the one that it was trained on, or lm.layers to its layers"
        )
    hooked = find_sites(lm.model, lm.layers, wanted.input_site, wanted.output_site)
    return dataclasses.replace(lm, sites=hooked)


class LiveRows:
    """The activations of the kept tokens of some windows, computed as slices of rows are asked for."""

    def __init__(self, lm: LanguageModel, windows: Sequence[Window]) -> None:
        self.lm, self.windows = lm, windows
        self.starts = np.cumsum([0, *(int(window.keep.sum()) for window in windows)])  # each window's first row

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, rows: slice) -> Tensor:
        """Rows [start, stop) as float32 (n, 2, L, D)."""
        start, stop, _ = rows.indices(len(self))
        first = int(np.searchsorted(self.starts, start, "right")) - 1
        end = int(np.searchsorted(self.starts, stop, "left"))
        chosen = self.windows[first:end]
        tokens, keep = (np.stack([getattr(w, name) for w in chosen]) for name in ("tokens", "keep"))
        found = capture(self.lm, torch.from_numpy(tokens).long(), keep, torch.float32)
        return found[start - self.starts[first] : stop - self.starts[first]]


def _evaluate(
    config: Config, transcoder: CrossLayerTranscoder, lm: LanguageModel, windows: Sequence[Window]
) -> Evaluation:
    device, rows = transcoder.b_dec.device, LiveRows(lm, windows)
    dtype = autocast_dtype(config.train.precision, device)
    batch = max(256, min(8192, _FEATURES // transcoder.d_features))
    moments = Moments.zero(transcoder.n_layers, transcoder.d_acts).to(device)
    for start in range(0, len(rows), batch):
        moments.add(rows[start : start + batch])
    statistics = moments.statistics()
    tensors = evaluate_activations(transcoder, rows, autocast=dtype, batch=batch)
    density = tensors["density"]
    tensors["decoder_mass"] = decoder_mass(transcoder, statistics, density > 0)
    shares = {
        "dense_fraction": (density > DENSE).double().mean().item(),
        "never_fired": (density == 0).double().mean().item(),
        "decoder_mass": [100 * share for share in tensors["decoder_mass"].tolist()],
    }
    mean = statistics.target_mean.to(device, torch.float32)
    replaced = evaluate_replacement(lm, transcoder, mean, windows)
    return Evaluation.of(tensors, shares | {key: or_null(value) for key, value in replaced.items()})


def decoder_mass(transcoder: CrossLayerTranscoder, statistics: Statistics, which: Tensor) -> Tensor:
    """How much features write by distance: (L,), [d] to the d-th layer after their own; they add up to 1.

    Of each feature the squared norms of what it writes to each layer, in units of that layer's standard deviation in
    `statistics`, as shares of their sum; then the mean over the features `which` (L, F). All 0 when there are none.
    """
    device = transcoder.b_dec.device
    sd = statistics.target_sd.square().mean(-1, keepdim=True).sqrt().clamp_min(1e-30).to(device, torch.float32)
    scale = transcoder.normalization.target_sd / sd  # (L, 1) or (L, D)
    mass = torch.zeros(transcoder.n_layers, dtype=torch.float64, device=device)
    for s in range(transcoder.n_layers):
        whole = transcoder.W_dec[s]
        for part in which[s].nonzero()[:, 0].split(1024):
            weight = whole[part]  # (f, T, D)
            squares = (weight * scale[s : s + weight.shape[1]]).square().sum(-1).double()
            shares = squares / squares.sum(1, keepdim=True).clamp_min(1e-300)
            mass[: weight.shape[1]] += shares.sum(0)
    return mass / which.sum().clamp_min(1)


def plot(evaluations: dict[str, Evaluation], file: Path) -> None:
    """Write a PNG: explained variance and L0 by layer, and decoder mass by distance, of each transcoder."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 3.8), layout="constrained")
    titles = {
        "fve_per_layer": ("layer", "Fraction of variance explained, held out"),
        "l0_per_layer": ("layer", "L0 per layer, held out"),
        "decoder_mass": ("layers after a feature's own", "Share of decoder mass"),
    }
    panels = figure.subplots(1, 3)
    for axes, (key, (xlabel, title)) in zip(panels, titles.items()):
        for name, evaluation in evaluations.items():
            axes.plot(evaluation.tensors[key].tolist(), marker=".", label=name)
        axes.set(xlabel=xlabel, title=title)
        axes.axhline(0, color="black", linewidth=0.8)
        axes.xaxis.get_major_locator().set_params(integer=True)
    panels[-1].legend(loc="upper right", fontsize="small")
    figure.savefig(file, dpi=120)


def conclude(evaluations: dict[str, Evaluation], directory: Path) -> None:
    """Write evaluation.json and comparison.png into `directory`, and print the table."""
    from clt.data.index import write_json
    from clt.train.report import remarks, table

    directory.mkdir(parents=True, exist_ok=True)
    numbers: dict[str, Any] = {name: evaluation.numbers for name, evaluation in evaluations.items()}
    write_json(directory / "evaluation.json", numbers)  # first: a plot that fails must not cost them
    plot(evaluations, directory / "comparison.png")
    told = {text for each in numbers.values() if (text := remarks(each))}
    print(f"{table(*numbers.values(), names=list(numbers))}\n{''.join(sorted(told))}")
    print(f"The results are in {directory}: evaluation.json, comparison.png")
