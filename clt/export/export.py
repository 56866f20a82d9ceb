"""`clt export`: a trained transcoder in another tool's format, compared with the training forward as it is written.

What is exported has no normalisation, which is folded into the weights, and is relu or jumprelu.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clt.config import Config, DataConfig, LMConfig, load_config
from clt.data.index import INDEX, StoreIndex
from clt.errors import UserError, mismatches, size_text, tell
from clt.export import circuit_tracer, saelens
from clt.export.card import card
from clt.export.circuit_tracer import lens_name
from clt.export.compare import compare
from clt.export.convert import evenly, to_jumprelu
from clt.export.directory import new_directory
from clt.export.fits import PARALLEL, parallel, refusal
from clt.export.records import FEATURES, RECORDS_INDEX, records_file
from clt.files import read_object
from clt.model.spec import BY_K
from clt.model.transcoder import CrossLayerTranscoder
from clt.train import checkpoint, tensorfile
from clt.train.run import open_store

_ROWS_TO_CONVERT = 32_768  # of the training store
_ROWS_TO_COMPARE = 1024  # of the held-out store


@dataclass
class Trained:
    """A transcoder and the run that it is of."""

    transcoder: CrossLayerTranscoder
    path: Path
    """The directory of its weights."""
    config: Config
    index: StoreIndex | None
    """Of the held-out store; None when that is gone."""
    results: dict[str, Any] | None
    """Of the run's summary.json, {} where it tells of no such checkpoint; None when there is no run."""

    @property
    def model(self) -> str:
        """The language model's hub id, or of a local one the last part of its path."""
        name = self.config.lm.model
        local = self.index is not None and self.index.revision is None
        # A path stays private also where it leads nowhere any more: it may be another machine's.
        local = local or name.startswith(("/", "~", ".")) or name.count("/") > 1 or Path(name).exists()
        return Path(name).name.removesuffix(".gguf") if local else name

    @property
    def layers(self) -> list[int] | None:
        """The language model's layers that it is of; None: all."""
        if self.index is not None:
            return self.index.some_layers
        return self.transcoder.sites.layers or self.config.lm.layers


def find(source: Path) -> Trained:
    """A run's newest checkpoint, the transcoder in a directory inside a run, or one that `clt import` wrote.

    Raises UserError when there is none.
    """
    if (source / "config.yaml").is_file():
        steps = checkpoint.steps(source / "checkpoints")
        if not steps:
            raise UserError(f"{source} has no checkpoint; wanted a run that has written one")
        run, path = source, source / "checkpoints" / f"step_{steps[-1]:08d}"
    else:
        path = source.resolve()
        parents = [parent for parent in path.parents[:2] if (parent / "config.yaml").is_file()]
        if not (path / "config.json").is_file():
            raise UserError(f"{source} is neither a run (config.yaml) nor a checkpoint in one; wanted one of the two")
        if not parents:
            return _imported(path)
        run = parents[0]
    config = load_config(run / "config.yaml")
    if (path / "state.json").is_file():
        checkpoint.verify(path, checkpoint.MODEL)
    there = (Path(config.data.store) / "heldout" / INDEX).is_file()
    index = open_store(config, "heldout").index if there else None
    transcoder = CrossLayerTranscoder.from_pretrained(path, lazy=True)  # its weights are read a layer at a time
    return Trained(transcoder, path, config, index, _results(run, path))


def _results(run: Path, path: Path) -> dict[str, Any]:
    """The run's summary, if it is of the checkpoint `path`."""
    if not (run / "summary.json").is_file():
        return {}
    results = read_object(run / "summary.json", {"steps": int}, "finish the run with the command that started it")
    return results if path.name == f"step_{results['steps']:08d}" else {}


def _imported(path: Path) -> Trained:
    """A transcoder that is of no run."""
    transcoder = CrossLayerTranscoder.from_pretrained(path, lazy=True)
    sites = transcoder.sites
    if sites.model is None:
        raise UserError(
            f"{path} lies in no run (config.yaml), and its config.json names no language model; write there, as model, "
            "the hub id of the one that it was trained on"
        )
    lm = LMConfig(sites.model, layers=sites.layers, input_site=sites.input_site, output_site=sites.output_site)
    return Trained(transcoder, path, Config(lm=lm, data=DataConfig(store=str(path))), None, None)


def export(source: Path, to: str, directory: Path, dtype: str, *, with_records: bool = True) -> dict[str, Any]:
    """Write the transcoder of a run or checkpoint into a new directory, in format `to`, and its README.md.

    For circuit-tracer, the records that `clt features` has made of this checkpoint go with it.

    Matrices are stored in `dtype`, biases and thresholds in float32. Returns what the README says. Raises UserError for
    what the format cannot hold or its tool would misread, and when the directory exists or the disk is too small; then,
    and when it is interrupted, it leaves nothing.
    """
    trained = find(source)
    if why := refusal(to, trained.transcoder.spec, trained.config.lm, trained.layers):
        raise UserError(why)
    with new_directory(directory) as partial:
        transcoder = _without_k(trained)
        records = _records(trained) if to == "circuit-tracer" and with_records else []
        _check_room(transcoder, records, partial, dtype)
        form = circuit_tracer if to == "circuit-tracer" else saelens
        for name, tensors in form.files(transcoder):
            _write(partial / name, tensors, getattr(torch, dtype))
            tensors.clear()  # before the next layer is read
        for name, text in _configs(trained, transcoder, to).items():
            (partial / name).write_text(text)
        for file in records:
            (partial / FEATURES).mkdir(exist_ok=True)
            shutil.copyfile(file, partial / FEATURES / file.name)
        facts = _facts(trained, transcoder, to, dtype, bool(records))
        if trained.index is not None:
            rows = evenly(open_store(trained.config, "heldout"), _ROWS_TO_COMPARE).float()
            read = lambda s: form.read_layer(partial, s)  # noqa: E731
            facts["comparison"] = compare(trained.transcoder, read, rows[:, 0], rows[:, 1])
        (partial / "README.md").write_text(_readme(trained, facts))
    return facts


def _without_k(trained: Trained) -> CrossLayerTranscoder:
    """The transcoder as relu or jumprelu."""
    transcoder, config = trained.transcoder, trained.config
    rule = transcoder.spec.activation
    if rule not in BY_K:
        assert rule in ("relu", "jumprelu"), f"no format has {rule}"  # a rule that is new here
        return transcoder
    if trained.results is None:
        raise UserError(
            f"the transcoder is {rule} and was imported, so there is no training store to set thresholds on"
        )
    if not (store := Path(config.data.store) / "train" / INDEX).is_file():
        raise UserError(
            f"{store} does not exist. Other tools have no {rule}: thresholds are set on rows of the run's training "
            "store; put it back, or extract it again with `clt extract RUN/config.yaml`"
        )
    return to_jumprelu(transcoder, evenly(open_store(config, "train"), _ROWS_TO_CONVERT)[:, 0].float())


def _records(trained: Trained) -> list[Path]:
    """The files of the records that `clt features` has made of this checkpoint; none when it has not."""
    path = trained.path
    directory = path.parents[1] / FEATURES
    if path.parent.name != "checkpoints" or not (directory / "summary.json").is_file():
        return []
    remedy = f"delete {directory} and run `clt features RUN` again"
    found = read_object(directory / "summary.json", {"identity": dict}, remedy)["identity"]
    state = checkpoint.read_state(path)
    wanted = {"step": state["step"], "checksums": (state["checksums"] or {}).get(checkpoint.MODEL)}
    if mismatches(found, wanted):
        tell(f"warning: {directory} is of another checkpoint than {path}, so the export gets no records of features")
        return []
    L = trained.transcoder.n_layers
    return [directory / name for name in (RECORDS_INDEX, *(records_file(layer) for layer in range(L)))]


def _check_room(transcoder: CrossLayerTranscoder, records: list[Path], directory: Path, dtype: str) -> None:
    L, D, F = transcoder.n_layers, transcoder.d_acts, transcoder.d_features
    targets = L * (L + 1) // 2 if transcoder.spec.cross_layer else L  # windows are filled up with zeros
    skip = 0 if transcoder.W_skip is None else L * D * D
    wanted = (L * D * F + targets * D * F + skip) * getattr(torch, dtype).itemsize
    wanted += sum(file.stat().st_size for file in records)
    if (free := shutil.disk_usage(directory).free) < wanted * 1.01:
        raise UserError(
            f"{directory.parents[1]} has {size_text(free)} free, the export takes {size_text(wanted)}; free space, or "
            "name a directory on another disk"
        )


def _write(path: Path, tensors: dict[str, Tensor], dtype: torch.dtype) -> None:
    """One safetensors file: matrices in `dtype`, vectors as they are. Raises UserError where dtype is too narrow."""
    slices = {}
    for name, tensor in tensors.items():
        stored = tensor.to(dtype if tensor.dim() > 1 else tensor.dtype).contiguous()
        if not stored.isfinite().all():
            raise UserError(
                f"{name} has values up to {tensor.abs().max():g}, beyond the range of --dtype {str(dtype)[6:]}; "
                "wanted bfloat16 or float32"
            )
        slices[name] = tensorfile.TensorSlice(stored, tuple(stored.shape))
    path.parent.mkdir(exist_ok=True)
    tensorfile.create(path, slices)
    tensorfile.write(path, slices)


def _configs(trained: Trained, transcoder: CrossLayerTranscoder, to: str) -> dict[str, str]:
    model = lens_name(trained.model)
    if to == "circuit-tracer":
        return {"config.yaml": circuit_tracer.config(transcoder, model)}
    layers, context = trained.layers or range(transcoder.n_layers), trained.config.lm.context
    return {f"layer_{s}/cfg.json": saelens.config(transcoder, model, layer, context) for s, layer in enumerate(layers)}


def _facts(trained: Trained, exported: CrossLayerTranscoder, to: str, dtype: str, with_records: bool) -> dict[str, Any]:
    """What there is to say of an export, but for the comparison: None where there are no rows to compare on."""
    spec, notes = trained.transcoder.spec, []
    if exported is not trained.transcoder:
        notes.append(
            f"Trained with {spec.activation} (k = {spec.k}). The export has a threshold per feature instead, by which "
            "each fires as often on training rows as before; on a single token it may fire otherwise."
        )
    window = spec.window or exported.n_layers
    if 1 < window < exported.n_layers:
        notes.append(f"Features write to at most {window} layers, their own included: later ones are stored as zeros.")
    if exported.W_skip is not None and to == "circuit-tracer" and spec.cross_layer:
        notes.append(circuit_tracer.SKIP_IS_NOT_READ)
    if with_records:
        notes.append(f"{FEATURES}/ has the records of the features, as circuit-tracer's page reads them.")
    if to == "circuit-tracer" and parallel(trained.index):
        notes.append(PARALLEL)
    return {
        "format": to,
        "model": trained.model,
        "revision": trained.index.revision if trained.index is not None else trained.config.lm.revision,
        "layers": exported.n_layers,
        "width": exported.d_acts,
        "features": exported.d_features,
        "cross_layer": spec.cross_layer,
        "activation": exported.spec.activation,
        "trained_activation": spec.activation,
        "dtype": dtype,
        "notes": notes,
        "comparison": None,
    }


def summary(facts: dict[str, Any]) -> str:
    """What an export is and how it compares, as lines of text."""
    kind = "cross-layer transcoder" if facts["cross_layer"] else "per-layer transcoders"
    size = f"{facts['layers']} layers, width {facts['width']}, {facts['features']} features a layer"
    lines = [f"{kind} of {facts['model']}: {size}, {facts['activation']}, {facts['dtype']}", *facts["notes"]]
    if (found := facts["comparison"]) is None:
        return "\n".join([*lines, "Not compared with the training forward: the run's held-out store is missing."])

    def number(value: float | None) -> str:
        return "none" if value is None else f"{value:.4g}"

    fve = f"{number(found['fve'])} and {number(found['fve_exported'])}"
    return "\n".join(
        [
            *lines,
            f"Compared with the training forward on {found['rows']:,} held-out rows:",
            f"  features that fire in one alone    {found['fired_otherwise']:,} of {found['fired']:,}",
            f"  largest difference of a feature    {found['feature_difference']:.2g} of the layer's largest",
            f"  largest difference of an output    {found['difference']:.2g} of the layer's root mean square",
            f"  fraction of variance explained     {fve}",
        ]
    )


def _readme(trained: Trained, facts: dict[str, Any]) -> str:
    if trained.results is not None:
        return card(trained.config, trained.results, trained.index, facts)
    return f"# Transcoder of {facts['model']}, in the format of {facts['format']}\n\n```\n{summary(facts)}\n```\n"
