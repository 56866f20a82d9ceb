"""The transcoders of EleutherAI's sparsify and clt-training: TopK of the MLPs' inputs, of one layer or of several.

h.{i}.mlp/cfg.json               k, skip_connection, and what must be as here; h is the list of the model's layers
h.{i}.mlp/sae.safetensors        encoder.weight (F, D), encoder.bias (F,), W_dec (F, D), b_dec (D,), W_skip (D, D):
                                 x @ W_skip.T is added to the output
                                 of several targets i + j: W_decs.{j}, b_decs.{j} and W_skips.{j} for each
config.json                      of the training: hookpoints_in, where the inputs were read, if not at the MLPs
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor

from clt.errors import UserError, shown
from clt.export.foreign import REMEDY, Foreign, Reader, sizes
from clt.files import read_object
from clt.model.spec import CLTConfig, Sites
from clt.ranges import POSITIVE

_NORMS = ("ln_2", "post_attention_layernorm", "pre_feedforward_layernorm", "final_layer_norm")


def read(folder: Path) -> Foreign:
    """The transcoder in a directory. Raises UserError when it is incomplete, or computes what ours cannot."""
    names, layers = _hookpoints(folder)
    L, headers = len(layers), Reader(folder, values=False)
    files = [f"{name}/sae.safetensors" for name in names]
    F, D = sizes(headers, files[0], "encoder.weight")
    settings = [_settings(folder / name / "cfg.json") for name in names]
    if len({(each["k"], bool(each["skip_connection"])) for each in settings}) > 1:
        raise UserError(f"{folder}: k or skip_connection differ by layer; wanted the same in each cfg.json")
    targets = [max(1, sum(name.startswith("W_decs.") for name in headers.shapes(file))) for file in files]
    if targets != [min(targets[0], L - i) for i in range(L)] or (targets[0] > 1 and layers != list(range(L))):
        raise UserError(f"{folder}: the layers write to {targets} layers each, which are not their own and the next")
    skip, several = bool(settings[0]["skip_connection"]), targets[0] > 1

    def of_target(reader: Reader, file: str, name: str, j: int, *shape: int) -> Tensor:
        return reader(file, name if f"{name}s.{j}" not in reader.shapes(file) and j == 0 else f"{name}s.{j}", *shape)

    def layer(reader: Reader, i: int) -> dict[str, Tensor]:
        _check(reader, files[i])
        sources = [s for s in range(i + 1) if i - s < targets[s]]
        found = {
            "W_enc": reader(files[i], "encoder.weight", F, D).t(),
            "b_enc": reader(files[i], "encoder.bias", F),
            "W_dec": torch.stack([of_target(reader, files[i], "W_dec", j, F, D) for j in range(targets[i])], 1),
            "b_dec": torch.stack([of_target(reader, files[s], "b_dec", i - s, D).float() for s in sources]).sum(0),
        }
        if skip:
            found["W_skip"] = of_target(reader, files[i], "W_skip", 0, D, D).t()
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
    return Foreign("sparsify", folder, L, D, spec, _sites(folder, names[0], layers), layer)


def _hookpoints(folder: Path) -> tuple[list[str], list[int]]:
    """The names of the hooked MLPs, and their layers: ascending, not always all. Raises UserError for other names."""
    # Either file: a layer that was copied in part must not pass for one that was left out.
    found = {path.parent.name for name in ("cfg.json", "sae.safetensors") for path in folder.glob(f"*.mlp/{name}")}
    matches = [re.fullmatch(r"([\w.]+)\.(\d+)\.mlp", name) for name in found]
    numbers = {int(match[2]): match[0] for match in matches if match}
    if len({match and match[1] for match in matches}) != 1 or not numbers:
        raise UserError(f"{folder} has {', '.join(sorted(found))}; wanted MLPs of one list of layers: h.0.mlp, h.1.mlp")
    layers = sorted(numbers)
    return [numbers[layer] for layer in layers], layers


def _settings(file: Path) -> dict[str, Any]:
    """One cfg.json. Raises UserError for what no transcoder of ours computes."""
    settings = read_object(file, {"k": Annotated[int, POSITIVE], "skip_connection": bool | None}, REMEDY)
    wanted = {
        "embed_skip": False,
        "gram_lookup": False,
        "activation": "topk",
        "normalize_io": False,
        "divide_cross_layer": False,
    }
    wanted |= {"per_source_tied": False, "secondary_target_tied": False, "coalesce_topk": "none"}
    if settings.get("transcode") is not True:
        raise UserError(
            f"{file} has transcode {shown(settings.get('transcode', False))}; wanted True: otherwise it is an "
            "autoencoder, which encodes x - b_dec"
        )
    for name, value in wanted.items():
        if (found := settings.get(name, value)) != value:
            raise UserError(f"{file} has {name} {shown(found)}; wanted {shown(value)}: no other can be imported")
    return settings


def _check(reader: Reader, file: str) -> None:
    """Raise UserError for parts beside the transcoder that change what it computes."""
    for name, shape in reader.shapes(file).items():
        kind, _, target = name.partition(".")
        neutral = {"post_enc": 0, "post_encs": 0, "post_enc_scale": 1, "post_enc_scales": 1}.get(kind)
        if kind == "W_skips" and target != "0":  # of the input of an earlier layer
            neutral = 0
        if neutral is not None and reader.values and bool((reader(file, name, *shape) != neutral).any()):
            raise UserError(
                f"{reader.folder / file}: {name} is not {neutral} everywhere, so that a feature has other values for "
                "each target, or an input goes to later layers; transcoders of ours have neither"
            )


def _sites(folder: Path, hookpoint: str, layers: list[int]) -> Sites:
    """The hooked modules by their own names: an MLP's output is what it wrote, before any norm that follows.

    The inputs were read before the norms that the training's config.json names, else at the MLPs themselves.
    """
    file = folder / "config.json"
    settings = read_object(file, {}, REMEDY) if file.is_file() else {}
    model, hookpoints = settings.get("model"), settings.get("hookpoints_in")
    output = re.sub(r"\.\d+\.", ".{layer}.", hookpoint)
    sites = Sites(output, output, model=model if isinstance(model, str) else None, layers=layers)
    if not hookpoints:
        return sites
    reads = {re.sub(r"\.\d+\.", ".{layer}.", str(name)) for name in hookpoints}
    if len(reads) != 1 or next(iter(reads)).rpartition(".")[2] not in _NORMS:
        raise UserError(f"{file} has hookpoints_in {shown(hookpoints)}; wanted the norms before the MLPs, or none")
    return replace(sites, input_site=reads.pop())
