"""Gemma Scope 2's transcoders: JumpReLU with a skip connection, of the output of the norm before the MLP.

config.json                      model_name, hf_hook_point_in
params_layer_{i}.safetensors     w_enc (D, F), b_enc, threshold (F,), w_dec (F, L, D) of which the targets i.. count,
                                 b_dec (D,), affine_skip_connection (D, D): x @ it is added to the output
"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from clt.errors import UserError, shown
from clt.export.foreign import REMEDY, Foreign, Reader, everywhere, layer_files, sizes, spec_of
from clt.files import read_object
from clt.model.spec import Sites
from clt.ranges import NORM_OUTPUT


def read(folder: Path) -> Foreign:
    """The transcoder in a directory. Raises UserError when it is incomplete, or reads elsewhere."""
    file = folder / "config.json"
    settings = read_object(file, {"model_name": str | None}, REMEDY)
    if (hook := settings.get("hf_hook_point_in")) is not None and "pre_feedforward_layernorm.output" not in str(hook):
        raise UserError(f"{file} has hf_hook_point_in {shown(hook)}; wanted the output of pre_feedforward_layernorm")
    files = layer_files(folder, "params_layer_{}.safetensors")
    return of_files(folder, files, Sites(NORM_OUTPUT, model=settings["model_name"]))


def of_files(folder: Path, files: list[str], sites: Sites, *, cross_layer: bool = True) -> Foreign:
    """The transcoder in one file a layer; if not `cross_layer`, w_dec (F, D) writes to its own layer alone."""
    L, headers = len(files), Reader(folder, values=False)
    D, F = sizes(headers, files[0], "w_enc")
    skip = everywhere(headers, files, "affine_skip_connection")

    def layer(reader: Reader, i: int) -> dict[str, Tensor]:
        file = files[i]
        found = {
            "W_enc": reader(file, "w_enc", D, F),
            "b_enc": reader(file, "b_enc", F),
            "threshold": reader(file, "threshold", F),  # below 0 is as 0: its formula has a ReLU too
            "W_dec": reader(file, "w_dec", F, L, D)[:, i:] if cross_layer else reader(file, "w_dec", F, D).unsqueeze(1),
            "b_dec": reader(file, "b_dec", D),
        }
        if skip:
            found["W_skip"] = reader(file, "affine_skip_connection", D, D)
        return found

    return Foreign("Gemma Scope 2", folder, L, D, spec_of(F, True, skip=skip, cross_layer=cross_layer), sites, layer)
