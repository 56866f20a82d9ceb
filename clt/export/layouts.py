"""Directories of transcoders that others have trained, each as what `clt.export.importer` copies layer by layer.

Every layout's function looks at names and settings alone, and returns a Source whose `layer` reads one layer. All are
of transcoders without input normalisation. F features per layer, D residual width, L layers; x the input of a layer.

    circuit-tracer   see clt/export/circuit_tracer.py
    Gemma Scope 2    config.json, params_layer_{i}.safetensors: w_enc (D, F), b_enc, threshold (F,), w_dec (F, L, D) of
                     which the targets i.. count, b_dec (D,), affine_skip_connection (D, D): x @ it is added
    sparsify         {block}.{i}.mlp/cfg.json and sae.safetensors: encoder.weight (F, D), encoder.bias, the k largest
                     fire, W_dec (F, D), b_dec, W_skip: x @ W_skip.T is added. Of a cross-layer one W_decs.{j} (F, D),
                     b_decs.{j} and W_skips.{j} for the target i + j
    joint TopK       config.json with k, W_enc_{i}.safetensors, W_dec_{i}.safetensors as circuit-tracer's, no biases,
                     W_dec_norm.safetensors (L, F): the L * k largest of a * W_dec_norm of all layers fire
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor

from clt.errors import UserError, shown
from clt.files import read_object, reading, tensor_shapes
from clt.model.spec import CLTConfig, Sites
from clt.model.transcoder import check_values
from clt.ranges import NORM_OUTPUT, POSITIVE

REMEDY = "copy or download it again"
_INPUT_HOOKS = {"hook_resid_mid": None, "mlp.hook_in": NORM_OUTPUT}
_OUTPUT_HOOKS = ("hook_mlp_out", "mlp.hook_out")
_NORMS = ("ln_2", "post_attention_layernorm", "pre_feedforward_layernorm", "final_layer_norm")


class Reader:
    """Reads tensors of a directory's safetensors files. With `values` False they are on the meta device, of any size.

    Raises UserError, naming file and tensor, when one is missing, is of another shape, or holds nan or inf.
    """

    def __init__(self, folder: Path, *, values: bool = True) -> None:
        self.folder, self.values = folder, values
        self._headers: dict[str, dict[str, list[int]]] = {}

    def shapes(self, file: str) -> dict[str, list[int]]:
        """Of every tensor in a file."""
        if file not in self._headers:
            self._headers[file] = tensor_shapes(self.folder / file, REMEDY)
        return self._headers[file]

    def __call__(self, file: str, name: str, *shape: int) -> Tensor:
        """The tensor `name` of a file, which must be of this shape."""
        from safetensors import safe_open

        path, found = self.folder / file, self.shapes(file).get(name)
        if found is None:
            raise UserError(f"{path} has no tensor {name!r}: it is incomplete or of another layout; {REMEDY}")
        if found != list(shape):
            raise UserError(
                f"{path}: {name} is {found}, wanted {list(shape)} by the sizes of layer 0; all layers must have the "
                "same width and number of features"
            )
        with reading(path, REMEDY), safe_open(path, "pt") as opened:
            if not self.values:
                return torch.empty(shape, dtype=opened.get_slice(name)[:0].dtype, device="meta")
            tensor = opened.get_tensor(name)
            check_values(name, tensor)
        return tensor


@dataclass
class Source:
    """A transcoder in another layout."""

    layout: str
    folder: Path
    n_layers: int
    d_acts: int
    spec: CLTConfig
    sites: Sites
    layer: Callable[[Reader, int], dict[str, Tensor]]
    """W_enc (D, F), b_enc, threshold (F,), W_dec (F, T, D), b_dec (D,) and with `spec.skip` W_skip (D, D) of a layer.

    x @ W_skip is added to the output. Any may be left out and is zero."""
    remarks: list[str] = field(default_factory=list)
    """What the user should know of the source."""
    k: int | None = None
    """How many features of all layers fire: the largest of feature times `norms`; None: those that `spec` says."""
    norms: Callable[[Reader], Tensor] | None = None
    """(L, F), for `k`."""


def open_source(folder: Path) -> Source:
    """The transcoder in a directory of any known layout. Raises UserError when there is none, or it cannot be ours."""
    if (folder / "config.yaml").is_file():
        return _circuit_tracer(folder)
    if (folder / "W_dec_norm.safetensors").is_file():
        return _joint_topk(folder)
    if list(folder.glob("params_layer_*.safetensors")):
        return _gemma_scope(folder)
    if list(folder.glob("*.mlp/sae.safetensors")):
        return _sparsify(folder)
    names = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"
    raise UserError(
        f"{folder} holds no transcoder of a known layout (found {names}); wanted one of circuit-tracer (config.yaml), "
        "Gemma Scope 2 (params_layer_0.safetensors), sparsify (h.0.mlp/sae.safetensors) or a joint TopK "
        "(W_dec_norm.safetensors): give the directory that has these files"
    )


def _count(folder: Path, pattern: str) -> int:
    """The number of layers by the files' names, `pattern` with {}. Raises UserError when one is missing."""
    form = re.compile(re.escape(pattern).replace(r"\{\}", r"(\d+)"))
    paths = (str(path.relative_to(folder)) for path in folder.glob(pattern.format("*")))
    found = sorted(int(match[1]) for match in map(form.fullmatch, paths) if match)
    if not found or found != list(range(len(found))):
        missing = next(layer for layer in range(len(found) + 1) if layer not in found)
        raise UserError(f"{folder / pattern.format(missing)} is missing: layers are {found}; {REMEDY}")
    return len(found)


def _sizes(reader: Reader, file: str, name: str) -> tuple[int, int]:
    """The two sizes of layer 0's encoder."""
    found = reader.shapes(file).get(name, [])
    if len(found) != 2:
        raise UserError(f"{reader.folder / file}: {name} is {found or 'missing'}, wanted two dimensions; {REMEDY}")
    return found[0], found[1]


def _not_negative(reader: Reader, threshold: Tensor, where: str) -> Tensor:
    if reader.values and bool((threshold < 0).any()):
        raise UserError(
            f"{reader.folder / where} has {int((threshold < 0).sum())} thresholds below 0, by which features fire at "
            "negative values; ours never do. Train or export it with thresholds of 0 or more"
        )
    return threshold


def _circuit_tracer(folder: Path) -> Source:
    import yaml

    file = folder / "config.yaml"
    with reading(file, REMEDY):
        try:
            settings = yaml.safe_load(file.read_text())
        except yaml.YAMLError as error:
            raise ValueError(str(error).splitlines()[0]) from error
        if not isinstance(settings, dict):
            raise ValueError(f"found {shown(settings)}, wanted keys and values")
    kind, model = settings.get("model_kind"), settings.get("model_name")
    if kind not in ("cross_layer_transcoder", "transcoder_set"):
        raise UserError(
            f"{file} is of model_kind {shown(kind)}, wanted cross_layer_transcoder or transcoder_set: this is not a "
            "transcoder of circuit-tracer (a run of ours needs no import)"
        )
    if "transcoders" in settings:
        raise UserError(
            f"{file} lists transcoders that lie elsewhere; import the directory or the hub id that has their files"
        )
    if settings.get("activation") not in (None, "relu", "jumprelu", "jump_relu"):
        raise UserError(f"{file} has activation {shown(settings['activation'])}; wanted relu or jumprelu")
    sites = Sites(_hooked(file, settings), model=model if isinstance(model, str) else None)
    read = _cross_layer if kind == "cross_layer_transcoder" else _per_layer
    return read(folder, sites, relu=settings.get("activation") == "relu")


def _hooked(file: Path, settings: dict[str, Any]) -> str | None:
    """The input site of two of transformer-lens' hook names. Raises UserError for those that no site of ours is."""
    hooks = [settings.get(f"feature_{side}_hook") for side in ("input", "output")]
    sandwich = "gemma" in str(settings.get("model_name")).lower()  # mlp.hook_out is before Gemma's second norm
    if hooks[0] not in _INPUT_HOOKS or hooks[1] not in _OUTPUT_HOOKS or (sandwich and hooks[1] == "mlp.hook_out"):
        raise UserError(
            f"{file} has feature_input_hook {shown(hooks[0])} and feature_output_hook {shown(hooks[1])}; wanted "
            f"{' or '.join(_INPUT_HOOKS)}, and hook_mlp_out: other places of the model cannot be replaced"
        )
    return _INPUT_HOOKS[hooks[0]]


def _cross_layer(folder: Path, sites: Sites, *, relu: bool) -> Source:
    L, headers = _count(folder, "W_enc_{}.safetensors"), Reader(folder, values=False)
    F, D = _sizes(headers, "W_enc_0.safetensors", "W_enc_0")
    names = headers.shapes("W_enc_0.safetensors")
    jump, skip = "threshold_0" in names and not relu, "W_skip_0" in names

    def layer(read: Reader, i: int) -> dict[str, Tensor]:
        file = f"W_enc_{i}.safetensors"
        found = {
            "W_enc": read(file, f"W_enc_{i}", F, D).t(),
            "b_enc": read(file, f"b_enc_{i}", F),
            "W_dec": read(f"W_dec_{i}.safetensors", f"W_dec_{i}", F, L - i, D),
            "b_dec": read(file, f"b_dec_{i}", D),
        }
        if jump:
            found["threshold"] = _not_negative(read, read(file, f"threshold_{i}", F), file)
        if skip:
            found["W_skip"] = read(file, f"W_skip_{i}", D, D)
        return found

    return Source("circuit-tracer's cross-layer transcoder", folder, L, D, _spec(F, jump, skip=skip), sites, layer)


def _per_layer(folder: Path, sites: Sites, *, relu: bool) -> Source:
    L, headers = _count(folder, "layer_{}.safetensors"), Reader(folder, values=False)
    F, D = _sizes(headers, "layer_0.safetensors", "W_enc")
    names = headers.shapes("layer_0.safetensors")
    jump, skip = "activation_function.threshold" in names and not relu, "W_skip" in names

    def layer(read: Reader, i: int) -> dict[str, Tensor]:
        file = f"layer_{i}.safetensors"
        found = {
            "W_enc": read(file, "W_enc", F, D).t(),
            "b_enc": read(file, "b_enc", F),
            "W_dec": read(file, "W_dec", F, D).unsqueeze(1),
            "b_dec": read(file, "b_dec", D),
        }
        if jump:
            found["threshold"] = _not_negative(read, read(file, "activation_function.threshold", F), file)
        if skip:
            found["W_skip"] = read(file, "W_skip", D, D).t()
        return found

    spec = _spec(F, jump, skip=skip, cross_layer=False)
    return Source("circuit-tracer's transcoder set", folder, L, D, spec, sites, layer)


def _gemma_scope(folder: Path) -> Source:
    file = folder / "config.json"
    settings = read_object(file, {"model_name": str | None}, REMEDY)
    if (hook := settings.get("hf_hook_point_in")) is not None and "pre_feedforward_layernorm.output" not in str(hook):
        raise UserError(f"{file} has hf_hook_point_in {shown(hook)}; wanted the output of pre_feedforward_layernorm")
    L, headers = _count(folder, "params_layer_{}.safetensors"), Reader(folder, values=False)
    D, F = _sizes(headers, "params_layer_0.safetensors", "w_enc")
    skip = "affine_skip_connection" in headers.shapes("params_layer_0.safetensors")

    def layer(read: Reader, i: int) -> dict[str, Tensor]:
        file = f"params_layer_{i}.safetensors"
        found = {
            "W_enc": read(file, "w_enc", D, F),
            "b_enc": read(file, "b_enc", F),
            "threshold": read(file, "threshold", F),  # below 0 is as 0: its formula has a ReLU too
            "W_dec": read(file, "w_dec", F, L, D)[:, i:],
            "b_dec": read(file, "b_dec", D),
        }
        if skip:
            found["W_skip"] = read(file, "affine_skip_connection", D, D)
        return found

    sites = Sites(NORM_OUTPUT, model=settings["model_name"])
    return Source("Gemma Scope 2", folder, L, D, _spec(F, True, skip=skip), sites, layer)


def _joint_topk(folder: Path) -> Source:
    settings = read_object(folder / "config.json", {"k": Annotated[int, POSITIVE]}, REMEDY)
    L, headers = _count(folder, "W_enc_{}.safetensors"), Reader(folder, values=False)
    F, D = _sizes(headers, "W_enc_0.safetensors", "W_enc_0")

    def layer(read: Reader, i: int) -> dict[str, Tensor]:
        return {
            "W_enc": read(f"W_enc_{i}.safetensors", f"W_enc_{i}", F, D).t(),
            "W_dec": read(f"W_dec_{i}.safetensors", f"W_dec_{i}", F, L - i, D),
        }

    def norms(read: Reader) -> Tensor:
        return read("W_dec_norm.safetensors", "W_dec_norm", L, F)

    return Source("joint TopK", folder, L, D, _spec(F, True), Sites(), layer, [], settings["k"] * L, norms)


def _sparsify(folder: Path) -> Source:
    block = next(path.parent.name for path in folder.glob("*.mlp/sae.safetensors")).rpartition(".mlp")[0]
    hookpoint = block.rpartition(".")[0] + ".{}.mlp"
    L, headers = _count(folder, hookpoint + "/sae.safetensors"), Reader(folder, values=False)
    files = [f"{hookpoint.format(i)}/sae.safetensors" for i in range(L)]
    F, D = _sizes(headers, files[0], "encoder.weight")
    settings = [_sparsify_settings(folder / hookpoint.format(i) / "cfg.json") for i in range(L)]
    if len({(each["k"], bool(each["skip_connection"])) for each in settings}) > 1:
        raise UserError(f"{folder}: k or skip_connection differ by layer; wanted the same in each cfg.json")
    targets = [max(1, sum(name.startswith("W_decs.") for name in headers.shapes(file))) for file in files]
    if targets != [min(targets[0], L - i) for i in range(L)]:
        raise UserError(f"{folder}: the layers write to {targets} layers each, which are not their own and the next")
    skip, several = bool(settings[0]["skip_connection"]), targets[0] > 1

    def of_target(read: Reader, file: str, name: str, j: int, *shape: int) -> Tensor:
        return read(file, name if f"{name}s.{j}" not in read.shapes(file) and j == 0 else f"{name}s.{j}", *shape)

    def layer(read: Reader, i: int) -> dict[str, Tensor]:
        _check_sparsify(read, files[i])
        sources = [s for s in range(i + 1) if i - s < targets[s]]
        found = {
            "W_enc": read(files[i], "encoder.weight", F, D).t(),
            "b_enc": read(files[i], "encoder.bias", F),
            "W_dec": torch.stack([of_target(read, files[i], "W_dec", j, F, D) for j in range(targets[i])], 1),
            "b_dec": torch.stack([of_target(read, files[s], "b_dec", i - s, D).float() for s in sources]).sum(0),
        }
        if skip:
            found["W_skip"] = of_target(read, files[i], "W_skip", 0, D, D).t()
        return found

    spec = CLTConfig(
        d_features=F,
        activation="topk",
        k=settings[0]["k"],
        cross_layer=several,
        window=targets[0] if 1 < targets[0] < L else None,
        skip=skip,
        normalization="none",
    )
    return Source("sparsify", folder, L, D, spec, Sites(_sparsify_input(folder)), layer)


def _sparsify_settings(file: Path) -> dict[str, Any]:
    """One cfg.json. Raises UserError for what no transcoder of ours computes."""
    settings = read_object(file, {"k": Annotated[int, POSITIVE], "skip_connection": bool | None}, REMEDY)
    wanted = {"transcode": True, "activation": "topk", "normalize_io": False, "divide_cross_layer": False}
    wanted |= {"per_source_tied": False, "secondary_target_tied": False, "coalesce_topk": "none"}
    for name, value in wanted.items():
        if (found := settings.get(name, value)) != value:
            raise UserError(f"{file} has {name} {shown(found)}; wanted {shown(value)}: no other can be imported")
    return settings


def _check_sparsify(read: Reader, file: str) -> None:
    """Raise UserError for parts beside the transcoder that change what it computes."""
    for name, shape in read.shapes(file).items():
        kind, _, target = name.partition(".")
        neutral = {"post_enc": 0, "post_encs": 0, "post_enc_scale": 1, "post_enc_scales": 1}.get(kind)
        if kind == "W_skips" and target != "0":  # of the input of an earlier layer
            neutral = 0
        if neutral is not None and read.values and bool((read(file, name, *shape) != neutral).any()):
            raise UserError(
                f"{read.folder / file}: {name} is not {neutral} everywhere, so that a feature has other values for "
                "each target, or an input goes to later layers; transcoders of ours have neither"
            )


def _sparsify_input(folder: Path) -> str | None:
    """Where the MLPs' inputs were read: `hookpoints_in` of the training's config.json, else the MLPs themselves."""
    file = folder / "config.json"
    hookpoints = read_object(file, {}, REMEDY).get("hookpoints_in") if file.is_file() else None
    if not hookpoints:
        return NORM_OUTPUT
    if not all(str(name).rpartition(".")[2] in _NORMS for name in hookpoints):
        raise UserError(f"{file} has hookpoints_in {shown(hookpoints)}; wanted the norms before the MLPs, or none")
    return None


def _spec(d_features: int, jump: bool, *, skip: bool = False, cross_layer: bool = True) -> CLTConfig:
    rule = "jumprelu" if jump else "relu"
    return CLTConfig(d_features, rule, skip=skip, cross_layer=cross_layer, normalization="none")
