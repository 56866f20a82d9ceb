"""What `clt import` reads: a transcoder of another format, layer by layer, by a function that each format's module has.

F features per layer, D residual width, L layers. Names, shapes and settings are checked before values are read.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from clt.errors import UserError
from clt.files import reading, tensor_shapes
from clt.model.spec import CLTConfig, Sites
from clt.model.transcoder import check_values

REMEDY = "copy or download it again"


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
            raise UserError(f"{path} has no tensor {name!r}: it is incomplete or of another format; {REMEDY}")
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
class Foreign:
    """A transcoder in another format."""

    format: str
    folder: Path
    n_layers: int
    d_acts: int
    spec: CLTConfig
    sites: Sites
    layer: Callable[[Reader, int], dict[str, Tensor]]
    """W_enc (D, F), b_enc, threshold (F,), W_dec (F, T, D), b_dec (D,) and with `spec.skip` W_skip (D, D) of a layer.

    x @ W_skip is added to the output. Any may be left out and is zero."""
    k: int | None = None
    """How many features of all layers fire: the largest of feature times `norms`; None: those that `spec` says."""
    norms: Callable[[Reader], Tensor] | None = None
    """(L, F), for `k`."""


def layer_files(folder: Path, pattern: str) -> list[str]:
    """The names of the layers' files, `pattern` with the layer for {}. Raises UserError when one is missing."""
    form = re.compile(re.escape(pattern).replace(r"\{\}", r"(\d+)"))
    paths = (str(path.relative_to(folder)) for path in folder.glob(pattern.format("*")))
    found = sorted(int(match[1]) for match in map(form.fullmatch, paths) if match)
    if not found or found != list(range(len(found))):
        missing = next(layer for layer in range(len(found) + 1) if layer not in found)
        raise UserError(f"{folder / pattern.format(missing)} is missing: layers are {found}; {REMEDY}")
    return [pattern.format(layer) for layer in found]


def sizes(reader: Reader, file: str, name: str) -> tuple[int, int]:
    """The two sizes of layer 0's encoder."""
    found = reader.shapes(file).get(name, [])
    if len(found) != 2:
        raise UserError(f"{reader.folder / file}: {name} is {found or 'missing'}, wanted two dimensions; {REMEDY}")
    return found[0], found[1]


def everywhere(reader: Reader, files: list[str], name: str) -> bool:
    """Whether each layer's file has a tensor, of a name with {} for the layer. Raises UserError when some lack it."""
    missing = [i for i, file in enumerate(files) if name.format(i) not in reader.shapes(file)]
    if 0 < len(missing) < len(files):
        raise UserError(
            f"{reader.folder / files[missing[0]]} has no {name.format(missing[0])}, other layers do; {REMEDY}"
        )
    return not missing


def spec_of(d_features: int, jump: bool, *, skip: bool = False, cross_layer: bool = True) -> CLTConfig:
    """A transcoder that was not trained here: JumpReLU, or else ReLU."""
    rule = "jumprelu" if jump else "relu"
    return CLTConfig(d_features, rule, skip=skip, cross_layer=cross_layer, normalization="none")
