"""circuit-tracer's directories: `cross_layer_transcoder`, and `transcoder_set` of one transcoder per layer.

    config.yaml                            kind, language model, hook points
    W_enc_{i}.safetensors                  W_enc_{i} (F, D), b_enc_{i} (F,), b_dec_{i} (D,), W_skip_{i} (D, D), and of
                                           JumpReLU threshold_{i} (F,): a = pre * 1[pre > threshold], without a ReLU
    W_dec_{i}.safetensors                  W_dec_{i} (F, L - i, D)
    layer_{i}.safetensors                  of a set: W_enc (F, D), W_dec (F, D), b_enc, b_dec, W_skip transposed, and
                                           activation_function.threshold

    features/                              what its page shows of a feature: index.json.gz, and of each layer the
                                           records, layer_{i}.bin (clt/explore/files.py)

circuit-tracer casts all weights to one dtype as it loads them. It has no input normalisation.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import pad

from clt import hub
from clt.errors import UserError, shown
from clt.export import gemma_scope
from clt.export.compare import ForeignLayer
from clt.export.foreign import REMEDY, Foreign, Reader, everywhere, layer_files, sizes, spec_of
from clt.files import reading
from clt.model.spec import Sites
from clt.model.transcoder import CrossLayerTranscoder
from clt.ranges import NORM_OUTPUT

INPUT_HOOKS = {"hook_resid_mid": None, "mlp.hook_in": NORM_OUTPUT}
OUTPUT_HOOKS = {"hook_mlp_out": None, "mlp.hook_out": "{layer}.mlp"}
"""The sites at transformer-lens' hooks. Of Gemma the MLP's own output is not what is added to the residual stream."""
LISTED = "transcoders"
"""The key of config.yaml that names files on the hub, by layer, in place of those beside it."""
_ADDRESS = re.compile(
    r"hf://([\w.-]+/[\w.-]+)/((?:(?!\.)[\w.-]+/)*(?!\.)[\w.-]+\.safetensors)(?:\?revision=([\w./-]+))?"
)
_SET = {"b_enc": "b_enc", "b_dec": "b_dec", "threshold": "activation_function.threshold"}

SKIP_IS_NOT_READ = (
    "No circuit-tracer up to 0.5.0 reads W_skip_{i} from a cross_layer_transcoder directory: its model has the skip "
    "connection, its loader leaves it out without a word. docs/export.md says how to set it after loading."
)


def lens_name(model: str) -> str:
    """transformer-lens' name of a hub's model: it has GPT-2 by the name that it had at first, and no other."""
    return model.removeprefix("openai-community/")


def config(transcoder: CrossLayerTranscoder, model: str) -> str:
    """The text of config.yaml. Sites by paths are the residual stream before the norm, and what is added to it."""
    kind, sites = "cross_layer_transcoder" if transcoder.spec.cross_layer else "transcoder_set", transcoder.sites
    reads = next((hook for hook, site in INPUT_HOOKS.items() if site == sites.input_site), "hook_resid_mid")
    writes = next((hook for hook, site in OUTPUT_HOOKS.items() if site == sites.output_site), "hook_mlp_out")
    hooks = {"feature_input_hook": reads, "feature_output_hook": writes}
    return yaml.safe_dump({"model_kind": kind, "model_name": model, **hooks}, sort_keys=False)


def files(transcoder: CrossLayerTranscoder) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """The tensors of each file, in float32, one layer's at a time; the rule is relu or jumprelu."""
    for s in range(transcoder.n_layers):
        yield from _files_of_layer(transcoder, s)  # which keeps nothing of a layer while the next is read


def _files_of_layer(transcoder: CrossLayerTranscoder, s: int) -> Iterator[tuple[str, dict[str, Tensor]]]:
    layer = transcoder.fold_layer(s)
    layer["W_enc"] = layer["W_enc"].T
    layer["threshold"] = layer["threshold"].clamp_min(0)
    if transcoder.spec.activation == "relu":
        del layer["threshold"]
    if not transcoder.spec.cross_layer:
        layer["W_dec"] = layer["W_dec"][:, 0]
        if "W_skip" in layer:
            layer["W_skip"] = layer["W_skip"].T
        yield f"layer_{s}.safetensors", {_SET.get(name, name): tensor for name, tensor in layer.items()}
        return
    W_dec = layer.pop("W_dec")
    yield f"W_enc_{s}.safetensors", {f"{name}_{s}": tensor for name, tensor in layer.items()}
    beyond = transcoder.n_layers - s - W_dec.shape[1]  # the layers that a window leaves out
    yield f"W_dec_{s}.safetensors", {f"W_dec_{s}": pad(W_dec, (0, 0, 0, beyond))}


def read_layer(directory: Path, s: int) -> ForeignLayer:
    """One layer as circuit-tracer's formulas take it, in float32."""
    path = directory / f"layer_{s}.safetensors"
    if path.is_file():
        found = {name: tensor.float() for name, tensor in load_file(path).items()}
        skip = found["W_skip"].T if "W_skip" in found else None
        threshold = found.get("activation_function.threshold")
        return ForeignLayer(found["W_enc"], found["b_enc"], threshold, found["W_dec"][:, None], found["b_dec"], skip)
    encoder = load_file(directory / f"W_enc_{s}.safetensors")
    encoder |= load_file(directory / f"W_dec_{s}.safetensors")
    found = {name.removesuffix(f"_{s}"): tensor.float() for name, tensor in encoder.items()}
    threshold, skip = found.get("threshold"), found.get("W_skip")
    return ForeignLayer(found["W_enc"], found["b_enc"], threshold, found["W_dec"], found["b_dec"], skip)


def read(folder: Path) -> Foreign:
    """The transcoder in a directory, or in the files of the hub that its config.yaml lists.

    Raises UserError when it is incomplete, or is none that ours can be, and as `hub.fetch`.
    """
    file = folder / "config.yaml"
    settings = read_settings(file)
    kind, model = settings.get("model_kind"), settings.get("model_name")
    if kind not in ("cross_layer_transcoder", "transcoder_set"):
        raise UserError(
            f"{file} is of model_kind {shown(kind)}, wanted cross_layer_transcoder or transcoder_set: this is not a "
            "transcoder of circuit-tracer (a run of ours needs no import)"
        )
    sites = Sites(*_hooked(file, settings), model=model if isinstance(model, str) else None)
    rule = _rule(file, settings)
    if LISTED not in settings:
        source = _cross_layer(folder, sites) if kind == "cross_layer_transcoder" else _one_by_one(folder, sites)
    else:
        files, cross_layer = _fetched(file, settings[LISTED]), kind == "cross_layer_transcoder"
        if "w_enc" in Reader(folder, values=False).shapes(files[0]):
            source = gemma_scope.of_files(folder, files, sites, cross_layer=cross_layer)
        elif cross_layer:
            raise UserError(f"{file} lists files that have no w_enc; wanted those of Gemma Scope 2, or no list")
        else:
            source = _one_by_one(folder, sites, files)
    if rule not in (None, source.spec.activation):
        have = "no thresholds" if rule == "jumprelu" else "thresholds"
        raise UserError(f"{file} has activation {rule}, but the files have {have}; {REMEDY}")
    return source


def read_settings(file: Path) -> dict[str, Any]:
    """A config.yaml. Raises UserError when it is damaged."""
    with reading(file, REMEDY):
        try:
            settings = yaml.safe_load(file.read_text())
        except yaml.YAMLError as error:
            raise ValueError(str(error).splitlines()[0]) from error
        if not isinstance(settings, dict):
            raise ValueError(f"found {shown(settings)}, wanted keys and values")
    return settings


def _fetched(file: Path, listed: object) -> list[str]:
    """The local copies of the files that config.yaml lists by layer, as hf://user/name/FILE[?revision=REVISION]."""
    entries = listed if isinstance(listed, list) else [listed]
    found = [match.groups() for entry in entries if (match := _ADDRESS.fullmatch(str(entry)))]
    if not entries or len(found) != len(entries):
        odd = next((entry for entry in entries if not _ADDRESS.fullmatch(str(entry))), listed)
        raise UserError(
            f"{file} lists {shown(odd)} in {LISTED}; wanted hf://user/name/FILE.safetensors[?revision=REVISION] for "
            "each layer. Files of your own lie beside it, without a list; Gemma Scope's .npz files cannot be imported"
        )
    of_places: dict[tuple[str, str | None], list[str]] = {}
    for name, path, revision in found:
        of_places.setdefault((name, revision), []).append(path)
    places = {place: hub.fetch(*place, paths) for place, paths in of_places.items()}
    return [str(places[name, revision] / path) for name, path, revision in found]


def _rule(file: Path, settings: dict[str, Any]) -> str | None:
    """The rule that config.yaml names, None where the thresholds alone say it. Raises UserError for others."""
    rules = {None: None, "relu": "relu", "jumprelu": "jumprelu", "jump_relu": "jumprelu"}
    if (found := settings.get("activation")) not in list(rules):  # a list: it may be unhashable
        raise UserError(
            f"{file} has activation {shown(found)}; wanted relu or jumprelu (circuit-tracer's topk lets features fire "
            "at negative values, ours never do)"
        )
    return rules[found]


def _hooked(file: Path, settings: dict[str, Any]) -> tuple[str | None, str | None]:
    """The sites of two of transformer-lens' hook names. Raises UserError for those that no site of ours is."""
    reads, writes = (settings.get(f"feature_{side}_hook") for side in ("input", "output"))
    if reads not in list(INPUT_HOOKS) or writes not in list(OUTPUT_HOOKS):  # lists: a hook may be unhashable
        raise UserError(
            f"{file} has feature_input_hook {shown(reads)} and feature_output_hook {shown(writes)}; wanted "
            f"{' or '.join(INPUT_HOOKS)}, and {' or '.join(OUTPUT_HOOKS)}: no module of the model reads or writes at "
            "other places (ln2.hook_normalized, of Gemma Scope's first transcoders, is the norm before its weight)"
        )
    return INPUT_HOOKS[reads], OUTPUT_HOOKS[writes]


def _cross_layer(folder: Path, sites: Sites) -> Foreign:
    files, headers = layer_files(folder, "W_enc_{}.safetensors"), Reader(folder, values=False)
    L, (F, D) = len(files), sizes(headers, files[0], "W_enc_0")
    jump, skip = (everywhere(headers, files, name) for name in ("threshold_{}", "W_skip_{}"))

    def layer(reader: Reader, i: int) -> dict[str, Tensor]:
        found = {
            "W_enc": reader(files[i], f"W_enc_{i}", F, D).t(),
            "b_enc": reader(files[i], f"b_enc_{i}", F),
            "W_dec": reader(f"W_dec_{i}.safetensors", f"W_dec_{i}", F, L - i, D),
            "b_dec": reader(files[i], f"b_dec_{i}", D),
        }
        if jump:
            found["threshold"] = _not_negative(reader, reader(files[i], f"threshold_{i}", F), files[i])
        if skip:
            found["W_skip"] = reader(files[i], f"W_skip_{i}", D, D)
        return found

    return Foreign("circuit-tracer's cross-layer transcoder", folder, L, D, spec_of(F, jump, skip=skip), sites, layer)


def _one_by_one(folder: Path, sites: Sites, files: list[str] | None = None) -> Foreign:
    """files: of each layer, where they do not lie in the directory."""
    files, headers = files or layer_files(folder, "layer_{}.safetensors"), Reader(folder, values=False)
    F, D = sizes(headers, files[0], "W_enc")
    names = (_SET["threshold"], "W_skip")
    jump, skip = (everywhere(headers, files, name) for name in names)
    known = {"W_enc", "W_dec", "b_enc", "b_dec", *names}
    for file in files:
        if odd := headers.shapes(file).keys() - known:  # as circuit-tracer does: log_thresholds, say, are a rule
            raise UserError(f"{folder / file} has {', '.join(sorted(odd))}; wanted no more than {', '.join(known)}")

    def layer(reader: Reader, i: int) -> dict[str, Tensor]:
        found = {
            "W_enc": reader(files[i], "W_enc", F, D).t(),
            "b_enc": reader(files[i], "b_enc", F),
            "W_dec": reader(files[i], "W_dec", F, D).unsqueeze(1),
            "b_dec": reader(files[i], "b_dec", D),
        }
        if jump:
            found["threshold"] = _not_negative(reader, reader(files[i], _SET["threshold"], F), files[i])
        if skip:
            found["W_skip"] = reader(files[i], "W_skip", D, D).t()
        return found

    spec = spec_of(F, jump, skip=skip, cross_layer=False)
    return Foreign("circuit-tracer's transcoder set", folder, len(files), D, spec, sites, layer)


def _not_negative(reader: Reader, threshold: Tensor, where: str) -> Tensor:
    if reader.values and bool((threshold < 0).any()):
        raise UserError(
            f"{reader.folder / where} has {int((threshold < 0).sum())} thresholds below 0, by which features fire at "
            "negative values; ours never do. Train or export it with thresholds of 0 or more"
        )
    return threshold
