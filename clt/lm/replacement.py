"""The replacement model: the language model with the chosen MLPs swapped for a transcoder, attention left live."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from clt.errors import UserError
from clt.lm.capture import hooked, put_back, residual
from clt.lm.load import LanguageModel


class Transcoder(Protocol):
    """What a replacement needs. Layers are indices 0..L-1 among the chosen ones; vectors are in model units."""

    def encode_layer(self, x: Tensor, layer: int) -> Tensor:
        """(N, D) raw residual stream -> (N, F) features of one layer."""
        ...

    def write_layer(self, features: Tensor, y: Tensor, layer: int) -> None:
        """Add what the features (N, F) of a layer write, to it and to later ones, to y (N, L, D), in place."""
        ...

    def finish(self, y: Tensor, x: Tensor, layer: int) -> Tensor:
        """What all features wrote to `layer`, y (N, D), and its own x (N, D) -> (N, D) output of its MLP."""
        ...

    def decode_layer(self, features: Sequence[Tensor], x: Tensor, layer: int) -> Tensor:
        """Features [(N, F)] of layers 0..layer, and `layer`'s own x (N, D) -> (N, D) output of its MLP."""
        ...


@torch.no_grad()
def run_with_mlps(
    lm: LanguageModel, input_ids: Tensor, keep: Tensor, replace: Callable[[int, Tensor], Tensor]
) -> Tensor:
    """Logits (N, T, V) of the model with all chosen MLPs replaced at once.

    `replace` takes a layer index and that layer's x (N, T, D) in float32 and returns the MLP output (N, T, D). Layers
    come in order, x from the stream that the earlier replacements already changed. Where `keep` (N, T) is False
    (position 0, special tokens) the model's own MLP output stays: a transcoder is never trained there.

    Raises UserError as `hooked` does.
    """
    input_ids, mask = input_ids.to(lm.device), keep.to(lm.device)[..., None]
    entering: dict[int, Tensor] = {}

    def on_output(layer: int, original: Tensor) -> Tensor:
        return _merged(original, mask, replace(layer, entering.pop(layer).float()))

    with hooked(lm, input_ids.shape, entering.__setitem__, on_output):
        return lm.model(input_ids=input_ids, use_cache=False).logits


def _merged(original: Tensor, mask: Tensor, replaced: Tensor) -> Tensor:
    """(N, T, D): `replaced` where `mask` (N, T, 1), `original` elsewhere."""
    assert replaced.shape == original.shape, f"a replaced MLP wrote {replaced.shape}, wanted {original.shape}"
    return torch.where(mask, replaced.to(original.dtype), original)


class Replaced(NamedTuple):
    """One run of a replacement model."""

    logits: Tensor  # (N, T, V)
    features: list[Tensor]  # L of (N, T, F), after any intervention; at positions that are not kept they write nothing


Intervene = Callable[[int, Tensor], Tensor]
"""Layer index and its features (N, T, F) -> the features that are decoded in their place.

This layer and all later ones read the changed features.
"""


def replaced_logits(
    lm: LanguageModel, transcoder: Transcoder, input_ids: Tensor, keep: Tensor, intervene: Intervene | None = None
) -> Tensor:
    """Logits (N, T, V) with every chosen MLP computed by the transcoder from the live residual stream."""
    n_layers = len(lm.sites)
    written = torch.zeros(input_ids.numel(), n_layers, lm.d_model, device=lm.device)

    def replace(layer: int, x: Tensor) -> Tensor:
        # No layer's features are kept: those of a wide transcoder would take gigabytes.
        rows = x.flatten(0, 1)
        features = transcoder.encode_layer(rows, layer)
        if intervene is not None:
            features = intervene(layer, features.unflatten(0, x.shape[:2])).flatten(0, 1)
        transcoder.write_layer(features, written, layer)
        return transcoder.finish(written[:, layer].contiguous(), rows, layer).view_as(x)

    return run_with_mlps(lm, input_ids, keep, replace)


def run_replaced(
    lm: LanguageModel, transcoder: Transcoder, input_ids: Tensor, keep: Tensor, intervene: Intervene | None = None
) -> Replaced:
    """Logits and features of (N, T) ids, the MLPs replaced where `keep` (N, T)."""
    features: list[Tensor] = []

    def kept(layer: int, of_layer: Tensor) -> Tensor:
        features.append(of_layer if intervene is None else intervene(layer, of_layer))
        return features[-1]

    return Replaced(replaced_logits(lm, transcoder, input_ids, keep, kept), features)


def ablated_logits(lm: LanguageModel, mean: Tensor, input_ids: Tensor, keep: Tensor) -> Tensor:
    """Logits (N, T, V) with every chosen MLP output replaced by its training-set mean (L, D): the floor to beat."""
    mean = mean.to(lm.device)
    return run_with_mlps(lm, input_ids, keep, lambda layer, x: mean[layer].expand_as(x))


class ReplacementModel:
    """The replacement model as an nnsight model, to look into and to intervene on.

    It computes what `run_replaced` does, in the caller's grad mode. `self.nnsight` is the wrapped model: every other
    nnsight operation (reading attention, editing the residual stream) works on it.
    """

    def __init__(self, lm: LanguageModel, transcoder: Transcoder) -> None:
        """Raises UserError when nnsight is not installed."""
        try:
            from nnsight import NNsight  # noqa: TID251
        except ImportError as error:
            raise UserError("ReplacementModel needs nnsight: pip install 'clt-trainer[nnsight]'") from error
        self.lm, self.transcoder, self.nnsight = lm, transcoder, NNsight(lm.model)

    def run(self, input_ids: Tensor, keep: Tensor, intervene: Intervene | None = None) -> Replaced:
        """Logits and features of (N, T) ids, the MLPs replaced where `keep` (N, T)."""
        input_ids, mask = input_ids.to(self.lm.device), keep.to(self.lm.device)[..., None]
        features: list[Tensor] = []  # L x (N, T, F)
        logits: Any = None
        with self.nnsight.trace(input_ids=input_ids, use_cache=False):
            # Inside a trace nnsight runs this body along with the forward pass: modules are visited in its order.
            for layer, site in enumerate(self.lm.sites):
                reads = self.nnsight.get(site.input_module)
                x = reads.output if site.reads_output else reads.input
                x = residual(self.lm, input_ids.shape, site.input_path, x)
                target = self.nnsight.get(site.output_path)
                rows = x.float().flatten(0, 1)
                encoded = self.transcoder.encode_layer(rows, layer).unflatten(0, x.shape[:2])
                features.append(encoded if intervene is None else intervene(layer, encoded))
                written = self.transcoder.decode_layer([f.flatten(0, 1) for f in features], rows, layer).view_as(x)
                output = target.output
                original = residual(self.lm, input_ids.shape, site.output_path, output)
                target.output = put_back(output, _merged(original, mask, written))
            logits = self.nnsight.output.logits.save()
        return Replaced(logits, features)


def nnsight_logits(lm: LanguageModel, transcoder: Transcoder, input_ids: Tensor, keep: Tensor) -> Tensor:
    """`replaced_logits` through nnsight."""
    return ReplacementModel(lm, transcoder).run(input_ids, keep).logits
