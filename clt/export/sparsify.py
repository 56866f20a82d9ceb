"""The transcoders of EleutherAI's sparsify and clt-training: TopK of the MLPs' inputs, of one layer or of several.

h.{i}.mlp/cfg.json               k, skip_connection, and what must be as here; h is the list of the model's layers
h.{i}.mlp/sae.safetensors        encoder.weight (F, D), encoder.bias (F,), W_dec (F, D), b_dec (D,), W_skip (D, D):
                                 x @ W_skip.T is added to the output
                                 of several targets i + j: W_decs.{j}, b_decs.{j} and W_skips.{j} for each
config.json                      of the training: hookpoints_in, where the inputs were read, if not at the MLPs
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor

from clt.errors import UserError, shown
from clt.export.source import REMEDY, Reader, Source, count_layers, sizes
from clt.files import read_object
from clt.model.spec import CLTConfig, Sites
from clt.ranges import NORM_OUTPUT, POSITIVE

_NORMS = ("ln_2", "post_attention_layernorm", "pre_feedforward_layernorm", "final_layer_norm")


def read(folder: Path) -> Source:
    """The transcoder in a directory. Raises UserError when it is incomplete, or computes what ours cannot."""
    block = next(path.parent.name for path in folder.glob("*.mlp/sae.safetensors")).rpartition(".mlp")[0]
    hookpoint = block.rpartition(".")[0] + ".{}.mlp"
    L, headers = count_layers(folder, hookpoint + "/sae.safetensors"), Reader(folder, values=False)
    files = [f"{hookpoint.format(i)}/sae.safetensors" for i in range(L)]
    F, D = sizes(headers, files[0], "encoder.weight")
    settings = [_settings(folder / hookpoint.format(i) / "cfg.json") for i in range(L)]
    if len({(each["k"], bool(each["skip_connection"])) for each in settings}) > 1:
        raise UserError(f"{folder}: k or skip_connection differ by layer; wanted the same in each cfg.json")
    targets = [max(1, sum(name.startswith("W_decs.") for name in headers.shapes(file))) for file in files]
    if targets != [min(targets[0], L - i) for i in range(L)]:
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
    return Source("sparsify", folder, L, D, spec, _sites(folder), layer)


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


def _sites(folder: Path) -> Sites:
    """The model and where the MLPs' inputs were read, by the training's config.json; else the MLPs themselves."""
    file = folder / "config.json"
    settings = read_object(file, {}, REMEDY) if file.is_file() else {}
    model, hookpoints = settings.get("model"), settings.get("hookpoints_in")
    model = model if isinstance(model, str) else None
    if "gemma" in (model or "").lower():
        raise UserError(
            f"{file} is of {model}: its targets are the MLPs' outputs before Gemma's second norm, and not what "
            "the MLPs add to the residual stream; they cannot be replaced there"
        )
    if not hookpoints:
        return Sites(NORM_OUTPUT, model=model)
    if not all(str(name).rpartition(".")[2] in _NORMS for name in hookpoints):
        raise UserError(f"{file} has hookpoints_in {shown(hookpoints)}; wanted the norms before the MLPs, or none")
    return Sites(model=model)
