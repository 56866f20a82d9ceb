"""An exported transcoder against the one it was made from: what its files compute, by their format's formulas alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from clt.files import or_null
from clt.model.transcoder import CrossLayerTranscoder


class ForeignLayer(NamedTuple):
    """One layer of an exported transcoder: pre = x @ W_enc.T + b_enc, x and outputs in the units of the model."""

    W_enc: Tensor  # (F, D)
    b_enc: Tensor  # (F,)
    threshold: Tensor | None  # (F,): a = pre * 1[pre > threshold]; None: relu
    W_dec: Tensor  # (F, T, D), to this layer and the next T - 1
    b_dec: Tensor  # (D,)
    W_skip: Tensor | None  # (D, D): x @ W_skip is added to the output of this layer

    def encode(self, x: Tensor) -> Tensor:
        """x (B, D) -> features (B, F)."""
        pre = x @ self.W_enc.T + self.b_enc
        return pre.relu() if self.threshold is None else pre * (pre > self.threshold)

    def skip(self, x: Tensor) -> Tensor:
        """x (B, D) -> what is added to this layer's output whichever features fire, (B, D) or (D,)."""
        return self.b_dec if self.W_skip is None else x @ self.W_skip + self.b_dec


@torch.no_grad()
def compare(
    transcoder: CrossLayerTranscoder, read: Callable[[int], ForeignLayer], x: Tensor, y: Tensor
) -> dict[str, float | None]:
    """The transcoder and the exported layers that `read` gives, on inputs x and targets y, both (B, L, D).

    rows: B; fired: how often the transcoder's features fire on them; fired_otherwise: how often a feature fires in one
    of the two alone; fve, fve_exported: mean over layers of the explained variance of y, None where y does not vary;
    difference: the largest of the reconstructions in any layer, over the root mean square of that layer's outputs;
    feature_difference: the largest between features that fire in both, over the layer's largest feature.
    """
    ours, theirs = torch.zeros_like(x), torch.zeros_like(x)
    fired = fired_otherwise = 0
    feature_difference = torch.zeros(())
    for s in range(transcoder.n_layers):
        layer = read(s)
        features, exported = transcoder.encode_layer(x[:, s], s), layer.encode(x[:, s])
        on, on_exported = features > 0, exported != 0
        fired += int(on.sum())
        fired_otherwise += int((on ^ on_exported).sum())
        largest = features.max().clamp_min(torch.finfo().tiny)
        differences = (features - exported).abs() * (on & on_exported)
        feature_difference = torch.maximum(feature_difference, differences.max() / largest)
        _write(ours, features, transcoder.W_dec[s], s)
        _write(theirs, exported, layer.W_dec, s)
        theirs[:, s] += layer.skip(x[:, s])
        del layer  # before the next is read
    ours = transcoder.finish(ours, x)
    scale = ours.square().mean((0, 2)).sqrt().clamp_min(torch.finfo().tiny)
    return {
        "rows": len(x),
        "fired": fired,
        "fired_otherwise": fired_otherwise,
        "fve": or_null(_fve(ours, y)),
        "fve_exported": or_null(_fve(theirs, y)),
        "difference": float(((ours - theirs).abs().amax((0, 2)) / scale).max()),
        "feature_difference": float(feature_difference),
    }


def _write(outputs: Tensor, features: Tensor, W_dec: Tensor, s: int) -> None:
    """Add what the features (B, F) of layer s write, by W_dec (F, T, D), to outputs (B, L, D)."""
    reach = W_dec.shape[1]
    outputs[:, s : s + reach] += (features @ W_dec.flatten(1)).unflatten(1, (reach, -1))


def _fve(yhat: Tensor, y: Tensor) -> float:
    """The mean over layers of the share of y's variance that yhat explains, both (B, L, D); nan if y never varies."""
    error = (y - yhat).double().square().sum((0, 2))
    total = (y - y.mean(0)).double().square().sum((0, 2))
    varies = total > 0
    return float((1 - error[varies] / total[varies]).mean()) if varies.any() else math.nan
