"""The model card of a transcoder: README.md of a hub repository and of an export.

Nothing that names a place or a person on this machine goes in: of a config only what stands in _RECIPE, and the names
of a model and a text only when they are public.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import yaml

from clt.config import Config
from clt.data.index import StoreIndex
from clt.errors import UserError
from clt.export.circuit_tracer import lens_name
from clt.export.fits import parallel, refusal
from clt.lm.fingerprint import TEXT_REVISION
from clt.train.report import table

_RECIPE = {
    "lm": ("dtype", "context"),
    "data": ("dtype", "train_tokens", "heldout_tokens"),
    "clt": None,  # the whole section
    "loss": None,
    "optim": None,
    "train": ("steps", "batch_tokens", "accumulate", "precision"),
    "run": ("seed",),
}
PLACE = "DIRECTORY"
"""Stands for where the card will be, until that is known."""
_IN_TRACER = "In circuit-tracer, if transformer-lens knows the language model (a directory goes by its absolute path)"
_PLOTS = {
    "training": "loss and L0 in training",
    "layers": "variance explained and L0 by layer",
    "density": "how often features fire",
}


def card(
    config: Config,
    summary: dict[str, Any],
    index: StoreIndex | None,
    facts: dict[str, Any] | None = None,
    *,
    name: str | None = None,
    license: str | None = None,
) -> str:
    """The text of the card of a run's transcoder.

    summary: of summary.json, {} when there is none; index: of a store that the run read, which knows what came from a
    hub; facts: of an export to another tool's format, as `clt.export.export` gives them; name: where it will be on the
    hub; license: an identifier of the hub's list, e.g. mit.
    """
    model, commit = public_model(config, index)
    hub_model = model if commit else None
    parts = [
        _header(hub_model, public_text(index), license),
        f"# {_kind(config)} of {model or 'a local language model'}",
        f"It reads {_reads(config)} of a language model. Its sparse features write the MLP outputs of "
        f"{_reach(config)}.",
        _data(config, index),
        *_figures(summary),
        *([] if facts is None else _comparison(facts)),
        f"## Recipe\n\nOf the config that it was trained with:\n\n```yaml\n{_recipe(config)}```",
        *([] if facts else _plots(summary)),
        _loading(config, hub_model, index, facts, name),
        "## Licence\n\n" + (f"{license}." if license else "The author has not stated one."),
    ]
    return "\n\n".join(parts) + "\n"


def public_model(config: Config, index: StoreIndex | None) -> tuple[str | None, str | None]:
    """The language model's name and, if it is on the hub, its commit; None for a name of this machine's."""
    name = config.lm.model
    if name == "embedded":
        return "the embedded language model", None
    if name.startswith("package:"):
        return name, None
    return (index.model, index.revision) if index is not None and index.revision else (None, None)


def public_text(index: StoreIndex | None) -> str | None:
    """The hub's name of the text's data set; None for a text on this machine and for the embedded one."""
    if index is None or not any(found.startswith(TEXT_REVISION) for found in (index.fingerprints or {}).values()):
        return None
    return index.text["source"]


def _kind(config: Config) -> str:
    return "Cross-layer transcoder" if config.clt.cross_layer else "Per-layer transcoders"


def _reads(config: Config) -> str:
    match config.lm.input_site:
        case "norm.output":
            return "the output of the norm before each MLP"
        case site if site is not None and site.endswith(".output"):
            return "the output of the module that the config names"
    which = "each MLP" if config.lm.layers is None else f"the MLPs of layers {config.lm.layers}"
    return f"the residual stream before {which}"


def _reach(config: Config) -> str:
    clt = config.clt
    if not clt.cross_layer:
        return "their own layer"
    return "their own and all later layers" if clt.window is None else f"their own and the next {clt.window - 1} layers"


def _header(model: str | None, text: str | None, license: str | None) -> str:
    """What the hub reads."""
    tree: dict[str, Any] = {"library_name": "clt-trainer", "tags": ["transcoder", "cross-layer-transcoder"]}
    tree |= {"license": license} if license else {}
    tree |= {"base_model": model} if model else {}
    tree |= {"datasets": [text]} if text else {}
    return f"---\n{yaml.safe_dump(tree, sort_keys=False)}---"


def _data(config: Config, index: StoreIndex | None) -> str:
    """The table of the language model, the text and the tokens."""
    (model, commit), text = public_model(config, index), public_text(index)
    source = text or ("the embedded text" if config.text.source == "embedded" else "a text that is not public")
    if text:
        subset = f", {config.text.subset}" if config.text.subset else ""
        source = f"[{text}](https://huggingface.co/datasets/{text}){subset}, split {config.text.split}"
    lm = f"[{model}](https://huggingface.co/{model}), commit {commit}" if commit else model or "a local model"
    rows = {"language model": lm}
    if index is not None:
        layers = f"all {index.n_layers}" if index.some_layers is None else ", ".join(map(str, index.layers))
        rows |= {"layers": layers, "width": f"{index.d_acts:,}"}
        rows |= {"first input": index.input_sites[0], "first output": index.output_sites[0]}
    rows["features"] = f"{config.clt.d_features:,} a layer, {config.clt.activation}"
    rows["text"] = source
    tokens, data = config.train.steps * config.train.batch_tokens, config.data
    rows["tokens"] = f"{tokens:,} in training; {data.train_tokens:,} extracted, and {data.heldout_tokens:,} held out"
    lines = [f"| {key} | {value} |" for key, value in rows.items()]
    return "\n".join(["## What it was trained on", "", "| | |", "|---|---|", *lines])


def _figures(summary: dict[str, Any]) -> list[str]:
    if not summary:
        return []
    made = f"{summary['steps']:,} steps on {summary['world_size']} x {summary['device']}, {summary['precision']}"
    return [f"## Figures\n\n{made}, torch {summary['torch_version']}:\n\n```\n{table(summary)}\n```"]


def _comparison(facts: dict[str, Any]) -> list[str]:
    """What an export is, and how it compares with the training forward."""
    first = f"In the format of {facts['format']}: {facts['activation']}, matrices in {facts['dtype']}."
    lines = [first, *facts["notes"]]
    found = facts["comparison"]
    if found is None:
        return ["## The export\n\n" + "\n\n".join([*lines, "It was not compared with the training forward."])]
    numbers = {
        "features that fire in one alone": f"{found['fired_otherwise']:,} of {found['fired']:,}",
        "largest difference of a feature, of its layer's largest": f"{found['feature_difference']:.2g}",
        "largest difference of an output, of its layer's root mean square": f"{found['difference']:.2g}",
        "fraction of variance explained, trained": _number(found["fve"]),
        "fraction of variance explained, exported": _number(found["fve_exported"]),
    }
    rows = ["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in numbers.items())]
    lines.append(f"Compared with the training forward on {found['rows']:,} held-out rows:")
    return ["## The export\n\n" + "\n\n".join([*lines, "\n".join(rows)])]


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.4g}"


def _recipe(config: Config) -> str:
    tree = {
        section: {key: value for key, value in fields.items() if _RECIPE[section] is None or key in _RECIPE[section]}
        for section, fields in asdict(config).items()
        if section in _RECIPE
    }
    return yaml.safe_dump(tree, sort_keys=False)


def _plots(summary: dict[str, Any]) -> list[str]:
    """Of a run that has finished: `report/` lies beside the card."""
    if not summary:
        return []
    return ["## Plots\n\n" + "\n\n".join(f"![{what}](report/{plot}.png)" for plot, what in _PLOTS.items())]


def _loading(
    config: Config, model: str | None, index: StoreIndex | None, facts: dict[str, Any] | None, name: str | None
) -> str:
    """Three lines in this code's package and in the other tool's, which is left out where it cannot load it."""
    place = name or PLACE
    here = [
        "from clt.model.transcoder import CrossLayerTranscoder",
        "",
        f'transcoder = CrossLayerTranscoder.from_pretrained("{place}")',
        f"features = transcoder.encode(x)  # x: (tokens, layers, width), {_reads(config)}",
    ]
    tracer = [
        "from circuit_tracer import ReplacementModel, attribute",
        "",
        f'model = ReplacementModel.from_pretrained("{lens_name(model or "LANGUAGE MODEL")}", '
        f'"{place if facts else "EXPORT"}")',
        'graph = attribute("The capital of France is", model)',
    ]
    saelens = [
        "from sae_lens import Transcoder",
        "",
        f'layer = Transcoder.load_from_disk("{place if facts else "EXPORT"}/layer_0")',
        "features = layer.encode(x)",
    ]
    others = {"circuit-tracer": (_IN_TRACER, tracer), "saelens": ("In SAELens, one layer", saelens)}
    if facts is None:
        blocks = [("In the trainer that it comes from:", here)]
        for to, (where, code) in others.items():
            if _loads(to, config, index):
                blocks.append((f"{where}, from an `EXPORT` that `clt export RUN --to {to} EXPORT` writes:", code))
    else:
        where, code = others[facts["format"]]
        blocks = [(f"{where}:", code)] if _loads(facts["format"], config, index) else []
    if not blocks:
        return "## Load it\n\nNot without what is said above."
    return "## Load it\n\n" + "\n\n".join(f"{head}\n\n```python\n" + "\n".join(code) + "\n```" for head, code in blocks)


def _loads(to: str, config: Config, index: StoreIndex | None) -> bool:
    """Whether a tool can use the transcoder's export as it is."""
    layers = config.lm.layers if index is None else index.some_layers
    try:
        if refusal(to, config.clt, config.lm, layers) is not None:
            return False
    except UserError:  # the sites cannot be checked here
        return False
    return to == "saelens" or not (parallel(index) or (config.clt.skip and config.clt.cross_layer))
