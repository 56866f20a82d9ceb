"""ByteDance's cross-layer TopK transcoders: the L * k largest a * W_dec_norm of all layers fire, a = relu(x @ W_enc.T).

config.json                      k, per layer
W_enc_{i}.safetensors            W_enc_{i} (F, D); there are no biases
W_dec_{i}.safetensors            W_dec_{i} (F, L - i, D)
W_dec_norm.safetensors           W_dec_norm (L, F): not that of W_dec, into which its normalisation is folded
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from torch import Tensor

from clt.export.foreign import REMEDY, Foreign, Reader, layer_files, sizes, spec_of
from clt.files import read_object
from clt.model.spec import Sites
from clt.ranges import POSITIVE


def read(folder: Path) -> Foreign:
    """The transcoder in a directory. Raises UserError when it is incomplete."""
    settings = read_object(folder / "config.json", {"k": Annotated[int, POSITIVE]}, REMEDY)
    L = len(layer_files(folder, "W_enc_{}.safetensors"))
    F, D = sizes(Reader(folder, values=False), "W_enc_0.safetensors", "W_enc_0")

    def layer(reader: Reader, i: int) -> dict[str, Tensor]:
        return {
            "W_enc": reader(f"W_enc_{i}.safetensors", f"W_enc_{i}", F, D).t(),
            "W_dec": reader(f"W_dec_{i}.safetensors", f"W_dec_{i}", F, L - i, D),
        }

    def norms(reader: Reader) -> Tensor:
        return reader("W_dec_norm.safetensors", "W_dec_norm", L, F)

    return Foreign("joint TopK", folder, L, D, spec_of(F, True), Sites(), layer, settings["k"] * L, norms)
