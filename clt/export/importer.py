"""`clt import`: a transcoder in another format as `config.json` and safetensors of ours, copied one layer at a time."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from pathlib import Path

import torch
from torch import Tensor

from clt import hub
from clt.config import Config
from clt.data.index import write_json
from clt.errors import UserError, size_text
from clt.export import circuit_tracer, gemma_scope, joint_topk, sparsify
from clt.export.directory import new_directory
from clt.export.foreign import Foreign, Reader
from clt.lm.forward import forward_text
from clt.lm.load import LanguageModel
from clt.model.activations import NO_NORM
from clt.model.transcoder import CrossLayerTranscoder
from clt.ranges import NORM_OUTPUT
from clt.train import tensorfile
from clt.train.compare import language_model
from clt.train.tensorfile import TensorSlice

SHARD_BYTES = 5_000_000_000  # of a safetensors file; a larger tensor has a file of its own
_WANTED = ("config.json", "config.yaml", "W_*.safetensors", "layer_*.safetensors", "params_layer_*.safetensors",
           "*.mlp/cfg.json", "*.mlp/sae.safetensors")  # fmt: skip
_TOKENS = 8192  # that the threshold of a joint TopK is set on
_ROWS = 512  # of them that are encoded at once
_SIDE = {"W_enc": 0, "b_enc": 0, "threshold": 1, "b_dec": 0, "W_skip": 0}  # the dimension of layers
_MATRICES = ("W_enc", "W_dec", "W_skip")


def import_transcoder(source: str, directory: Path, config: Config | None = None) -> list[str]:
    """Write the transcoder in `source`, a directory or user/name[/folder][@revision] of the hub, into a new directory.

    config: a language model and its text, to set the threshold of a joint TopK on. Returns what there is to say of the
    result. Raises UserError for what cannot be imported, and when `directory` exists or the disk is too small; then it
    leaves nothing.
    """
    with new_directory(directory) as partial:
        found = open_foreign(Path(source).expanduser() if Path(source).expanduser().is_dir() else fetch(source))
        device, lm = torch.device("cuda" if torch.cuda.is_available() else "cpu"), None
        if found.k is not None:
            if config is None:
                raise UserError(
                    f"{source} has no thresholds: its {found.k} largest features of all layers fire, which are only "
                    "known when all layers have run, so that it cannot take the MLPs' places. Give a CONFIG of its "
                    f"language model and a text: clt import {source} {directory} CONFIG sets the threshold by which "
                    f"{found.k} fire on average"
                )
            lm = language_model(config, (found.n_layers, found.d_acts), found.sites, device)
            if lm.layers != list(range(lm.model.config.get_text_config().num_hidden_layers)):
                found.sites = dataclasses.replace(found.sites, layers=lm.layers)
        writer = _Writer(partial, found, _matrix_dtype(found))
        read = Reader(found.folder)
        for layer in range(found.n_layers):
            writer.write(found.layer(read, layer), layer)
        remarks = _remarks(found, writer)
        if lm is not None and config is not None:
            transcoder = CrossLayerTranscoder.from_pretrained(partial, lazy=True).to(device)
            thresholds, tokens = _thresholds(found, transcoder, config, lm)
            for layer, of_layer in enumerate(thresholds):
                writer.write({"threshold": of_layer}, layer)
            remarks.append(
                f"The source lets the {found.k} largest features fire for each token. Here a feature fires above a "
                f"threshold, by which {found.k} fire on average on {tokens:,} tokens of {config.text.source}"
            )
        CrossLayerTranscoder.from_pretrained(partial, lazy=True)
    return remarks


def open_foreign(folder: Path) -> Foreign:
    """The transcoder in a directory of any known format. Raises UserError when there is none, or it cannot be ours."""
    if (folder / "config.yaml").is_file():
        return circuit_tracer.read(folder)
    if (folder / "W_dec_norm.safetensors").is_file():
        return joint_topk.read(folder)
    if list(folder.glob("params_layer_*.safetensors")):
        return gemma_scope.read(folder)
    if list(folder.glob("*.mlp/sae.safetensors")):
        return sparsify.read(folder)
    names = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"
    raise UserError(
        f"{folder} holds no transcoder of a known format (found {names}); wanted one of circuit-tracer (config.yaml), "
        "Gemma Scope 2 (params_layer_0.safetensors), sparsify (h.0.mlp/sae.safetensors) or a joint TopK "
        "(W_dec_norm.safetensors): give the directory that has these files"
    )


def fetch(source: str) -> Path:
    """The local copy of `user/name[/folder][@revision]`: only files of known formats, none of which can run code.

    Raises UserError as `hub.fetch`.
    """
    match = re.fullmatch(r"([\w.-]+/[\w.-]+)((?:/(?!\.)[\w.-]+)*)(?:@([\w./-]+))?", source)
    if match is None:
        raise UserError(f"there is no directory {source}; wanted one, or user/name[/folder][@revision] of the hub")
    name, folder, revision = match[1], match[2].lstrip("/"), match[3]
    prefix = f"{folder}/" if folder else ""
    path = hub.fetch(name, revision, [f"{prefix}config.yaml"]) / folder
    if (path / "config.yaml").is_file() and circuit_tracer.LISTED in circuit_tracer.read_settings(path / "config.yaml"):
        return path  # which names the files that it wants
    path = hub.fetch(name, revision, [f"{prefix}{pattern}" for pattern in _WANTED]) / folder
    if not path.is_dir():
        raise UserError(f"{name} on the hub has no files of a transcoder in {folder or 'its main folder'}")
    return path


class _Writer:
    """The files of a transcoder, made in full at once and filled layer by layer; what is not written is 0."""

    def __init__(self, directory: Path, source: Foreign, dtype: torch.dtype) -> None:
        """dtype: of the matrices. Raises UserError when the disk is too small."""
        with torch.device("meta"):
            model = CrossLayerTranscoder(source.n_layers, source.d_acts, source.spec, sites=source.sites)
        self.dtypes = {
            name: dtype if name.partition(".")[0] in _MATRICES else torch.float32 for name in model.state_dict()
        }
        tensors = {name: tensor.to(self.dtypes[name]) for name, tensor in model.state_dict().items()}
        self.size = sum(tensor.nbytes for tensor in tensors.values())
        if (free := shutil.disk_usage(directory).free) < self.size * 1.01:
            raise UserError(
                f"{directory.parents[1]} has {size_text(free)} free, the transcoder takes {size_text(self.size)}; free "
                "space, or name a directory on another disk"
            )
        groups: list[dict[str, Tensor]] = [{}]
        for name, tensor in tensors.items():
            if groups[-1] and sum(t.nbytes for t in groups[-1].values()) + tensor.nbytes > SHARD_BYTES:
                groups.append({})
            groups[-1][name] = tensor
        names = [f"model-{i:05d}-of-{len(groups):05d}.safetensors" for i in range(1, len(groups) + 1)]
        names = names if len(groups) > 1 else ["model.safetensors"]
        self.files = {
            directory / name: {
                key: TensorSlice(tensor, tuple(tensor.shape), writes=False) for key, tensor in group.items()
            }
            for name, group in zip(names, groups)
        }
        for path, slices in self.files.items():
            tensorfile.create(path, slices)
        if len(groups) > 1:
            index = {key: name for name, group in zip(names, groups) for key in group}
            tree = {"metadata": {"total_size": self.size}, "weight_map": index}
            write_json(directory / "model.safetensors.index.json", tree)
        scales = {name: torch.ones(tensors[name].shape) for name in tensors if name.endswith("_sd")}
        self._put({name: TensorSlice(tensor, tuple(tensor.shape)) for name, tensor in scales.items()})
        (directory / "config.json").write_text(json.dumps(model.config, indent=2, allow_nan=False) + "\n")

    def write(self, tensors: dict[str, Tensor], layer: int) -> None:
        """Write tensors of one layer, named and shaped as in `Foreign.layer`."""
        slices = {}
        for name, tensor in tensors.items():
            key = f"W_dec.{layer}" if name == "W_dec" else name
            dim = _SIDE.get(name)
            for _ in range(0 if dim is None else dim + 1):
                tensor = tensor.unsqueeze(0)
            whole = next(blank[key].shape for blank in self.files.values() if key in blank)
            stored = tensor.to(self.dtypes[key]).contiguous()
            slices[key] = TensorSlice(stored, whole, dim, layer if dim is not None else 0)
        self._put(slices)

    def _put(self, slices: dict[str, TensorSlice]) -> None:
        for path, blank in self.files.items():
            if mine := {name: cut for name, cut in slices.items() if name in blank}:
                tensorfile.write(path, blank | mine)


def _matrix_dtype(source: Foreign) -> torch.dtype:
    """The source's, if it has one for all matrices, else float32. Compares the shapes of all layers on the way."""
    read = Reader(source.folder, values=False)
    if source.norms is not None:
        source.norms(read)
    layers = [source.layer(read, layer) for layer in range(source.n_layers)]
    found = {layer[name].dtype for layer in layers for name in layer if name in _MATRICES}
    (dtype, *others) = found
    return dtype if not others and dtype in (torch.bfloat16, torch.float16) else torch.float32


@torch.no_grad()
def _thresholds(
    source: Foreign, transcoder: CrossLayerTranscoder, config: Config, lm: LanguageModel
) -> tuple[Tensor, int]:
    """Thresholds (L, F) above which `source.k` features a token fire on average, and on how many tokens.

    transcoder: the source with thresholds of 0. A score is a feature times its norm; one threshold is for all scores,
    as that of BatchTopK (arXiv 2412.06410).
    """
    assert source.k is not None
    assert source.norms is not None
    device, norms = transcoder.b_dec.device, source.norms(Reader(source.folder)).float()
    wide = dataclasses.replace(config, data=dataclasses.replace(config.data, dtype="float32"))
    pieces, tokens = [], 0
    for _, rows in forward_text(wide, "train", lm):
        pieces.append(rows.activations[:, 0].cpu())
        tokens += len(pieces[-1])
        if tokens >= _TOKENS:
            break
    x = torch.cat(pieces)[:_TOKENS]  # (n, L, D)
    most = source.k * len(x)
    largest = torch.zeros(0, device=device)
    for layer in range(source.n_layers):
        for rows in x[:, layer].split(_ROWS):
            scores = transcoder.encode_layer(rows.to(device), layer) * norms[layer].to(device)
            largest = torch.cat([largest, scores[scores > 0]])
            if len(largest) > most:
                largest = largest.topk(most + 1, sorted=False).values
    tau = float(largest.min()) if len(largest) > most else 0.0
    return tau / norms.clamp_min(NO_NORM), len(x)


def _remarks(source: Foreign, writer: _Writer) -> list[str]:
    spec, sites = source.spec, source.sites
    rule = f"{spec.activation}, k {spec.k}" if spec.k else spec.activation
    dtype = str(writer.dtypes["W_enc"]).removeprefix("torch.")
    size = f"{source.n_layers} layers, width {source.d_acts}, {spec.d_features:,} features a layer"
    places = {None: "the residual stream before the MLP's norm", NORM_OUTPUT: "the norm's output"}
    reads = places.get(sites.input_site, f"the input of {sites.input_site}")
    lines = [f"{source.format}{f' of {sites.model}' if sites.model else ''}: {size}, {rule}{', skip' * spec.skip}"]
    lines.append(f"It reads {reads}; matrices are in {dtype}, {size_text(writer.size)} in all")
    lines.append(
        "The source has no statistics of its training data: inputs and outputs are in the language model's units, "
        "without normalisation"
    )
    if spec.activation == "relu":
        lines.append("The source has no thresholds: features fire above 0")
    return lines
