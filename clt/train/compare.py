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
from clt.hub import local_directory
from clt.lm.capture import capture
from clt.lm.load import LanguageModel, chosen_layers, load_language_model
from clt.lm.sites import at_sites, find_sites
from clt.lm.text import Window
from clt.model.spec import Sites
from clt.model.transcoder import CrossLayerTranscoder
from clt.train.distributed import accumulate_in_float32
from clt.train.evaluation import Evaluation, evaluate_activations
from clt.train.optim import autocast_dtype
from clt.train.replacement import evaluate_replacement, heldout_windows

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
    found, lm, windows, places = {}, None, [], _places(directories)
    # All are opened first: a wrong name then fails before hours of work.
    opened = {name: CrossLayerTranscoder.from_pretrained(place, lazy=True) for name, place in places.items()}
    for directory in places:
        transcoder = opened.pop(directory).to(device)  # which lets go of the one before, and of the layers that it read
        sites = dataclasses.replace(transcoder.sites, layers=transcoder.sites.layers or _of_run(places[directory]))
        lm = language_model(config, (transcoder.n_layers, transcoder.d_acts), sites, device, lm)
        windows = windows or heldout_windows(config, lm)
        found[directory] = _evaluate(config, transcoder, lm, windows)
    return found


def _places(names: Sequence[str]) -> dict[str, Path]:
    """By name, the directory of each transcoder. Raises UserError for one that is named twice."""
    places: dict[str, Path] = {}
    for name in names:
        place = local_directory(name)
        if twins := [other for other in places if places[other].resolve() == place.resolve()]:
            raise UserError(f"{twins[0]} and {name} are the same transcoder; name it once")
        places[name] = place
    return places


def _of_run(directory: Path) -> list[int] | None:
    """The `lm.layers` of the run that a transcoder lies in, which an older one does not say itself; None outside."""
    for run in (directory, *directory.resolve().parents[:2]) if directory.is_dir() else ():
        if (run / "config.yaml").is_file() and (run / "checkpoints").is_dir():
            return load_config(run / "config.yaml").lm.layers
    return None


def language_model(
    config: Config, size: tuple[int, int], sites: Sites, device: torch.device, lm: LanguageModel | None = None
) -> LanguageModel:
    """The config's language model (`lm`, where it is loaded already), hooked where a transcoder of (L, D) = `size` is.

    Of a transcoder that does not say its layers they are all, or those of the config if it is not of so many. Raises
    UserError when the two do not fit.
    """
    wanted = at_sites(config.lm, sites.input_site, sites.output_site)
    lm = lm or load_language_model(dataclasses.replace(wanted, layers=None), device)
    count = lm.model.config.get_text_config().num_hidden_layers
    chosen = sites.layers or (None if size[0] == count else config.lm.layers)
    layers = chosen_layers(dataclasses.replace(wanted, layers=chosen), count)
    if size != (len(layers), lm.d_model):
        of = f" (it was trained on {sites.model})" if sites.model else ""
        raise UserError(
            f"the transcoder has {size[0]} layers of width {size[1]}{of}, {lm.name!r} has {len(layers)} of width "
            f"{lm.d_model}; set lm.model to the one that it was trained on, or lm.layers to its layers"
        )
    hooked = find_sites(lm.model, layers, wanted.input_site, wanted.output_site)
    return dataclasses.replace(lm, layers=layers, sites=hooked)


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
        "layers": lm.layers,
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
        for part in which[s].nonzero()[:, 0].split(1024):
            weight = transcoder.W_dec[s][part]  # (f, T, D); the whole is bound to no name, which would outlive it
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
            y = evaluation.tensors[key].tolist()
            axes.plot(evaluation.numbers["layers"] if xlabel == "layer" else range(len(y)), y, marker=".", label=name)
        axes.set(xlabel=xlabel, title=title)
        axes.axhline(0, color="black", linewidth=0.8)
        axes.xaxis.get_major_locator().set_params(integer=True)
    panels[-1].legend(loc="upper right", fontsize="small")
    figure.savefig(file, dpi=120)


def check_new(directory: Path) -> None:
    """Raise UserError when `report_comparison` would write over another evaluation in `directory`."""
    if found := [name for name in ("evaluation.json", "comparison.png") if (directory / name).exists()]:
        raise UserError(f"{directory} has {found[0]} of another evaluation; delete it, or name a directory with --out")


def report_comparison(evaluations: dict[str, Evaluation], directory: Path) -> None:
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
