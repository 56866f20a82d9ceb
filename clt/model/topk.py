"""The thresholds of TopK and BatchTopK: the scores that just do not fire, found without sorting all of them.

A score is a pre-activation, or with `by_norm` its product with ||W_dec||, so that features compete by what they write.
A feature fires where its score is above the (k+1)-th largest: of its layer and token (`topk`, arXiv 2406.04093), or
the (k * B + 1)-th largest of all layers and all B tokens of the batch (`batchtopk`, arXiv 2412.06410). So features that
tie with that score do not fire, and a negative one never does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch import Tensor

# Thresholds that one pass over the scores counts: as fast as one, and it gives two bits of the result instead of one.
_POINTS = 3


class ScoreInputs(NamedTuple):
    """What one layer's scores are computed from: product + bias, times norm."""

    product: Tensor  # (F, B)
    bias: Tensor  # (F,)
    norm: Tensor | None  # (F,): ||W_dec|| with `by_norm`


def scores(layer: ScoreInputs) -> Tensor:
    """(F, B), in at least float32."""
    z = layer.product + layer.bias.unsqueeze(1)
    return z if layer.norm is None else z * layer.norm.unsqueeze(1)


def scores_and_maxima(layer: ScoreInputs, group: int) -> tuple[Tensor, Tensor]:
    """The scores (F, B), and the largest of every `group` features (F / group, B)."""
    z = scores(layer)
    return z, z.unflatten(0, (-1, group)).amax(1)


def maxima(layer: ScoreInputs, group: int) -> Tensor:
    """The largest score of every `group` features, (F / group, B)."""
    return scores(layer).unflatten(0, (-1, group)).amax(1)


def count_above(layer: ScoreInputs, points: Tensor) -> Tensor:
    """How many scores are above each of the points (n,), as float64 (n,)."""
    z = scores(layer)
    # Compares as floats, because CPU kernels on bools are not vectorised; a row's count is exact in float32.
    return torch.stack([(z > point).float().sum(1).double().sum() for point in points.unbind()])


def per_token(scores: Tensor, k: int, gather: Callable[[Tensor], Tensor]) -> Tensor:
    """The (k+1)-th largest of scores (n, B) for each token, (1, B); 0 where that is negative or there are only k.

    gather: puts the shards' (m, B) together, (shards * m, B).
    """
    top = gather(scores.topk(min(k + 1, len(scores)), 0, sorted=False).values)
    if len(top) <= k:
        return torch.zeros_like(top[:1])
    return top.topk(k + 1, 0).values[-1:].clamp_min(0)


def token_thresholds(
    layer: ScoreInputs, k: int, most: int, gather: Callable[[Tensor], Tensor], kernels: SimpleNamespace
) -> Tensor:
    """`per_token` of one layer's scores: (1, B). most: the largest k of the run, which the size of groups goes by.

    The k+1 groups of features with the largest maxima hold the k+1 largest scores: the others need not be looked at.
    """
    F = len(layer.bias)
    group = _divisor(F, limit=(F / (2 * (most + 1))) ** 0.5)  # one kernel however k falls
    z, largest = kernels.scores_and_maxima(layer, group)
    if group > 1:
        best = largest.topk(k + 1, 0, sorted=False).indices.unsqueeze(1).expand(-1, group, -1)
        z = z.unflatten(0, (-1, group)).gather(0, best).flatten(0, 1)  # ((k + 1) * group, B)
    return per_token(z, k, gather)


def batch_threshold(
    layers: Sequence[ScoreInputs], k: float, everyone: Callable[[Tensor], Tensor], shards: int, kernels: SimpleNamespace
) -> Tensor:
    """The smallest t >= 0 () above which there are at most k scores for each token of all ranks.

    everyone: sums a tensor over all ranks, in place; shards: how many of them hold the same tokens.
    """
    product = layers[0].product
    tokens = torch.full((), product.shape[1], dtype=torch.float64, device=product.device)
    tokens = everyone(tokens) / shards
    most = (k * tokens).round()

    def search(parts: Sequence[ScoreInputs]) -> Tensor:
        def count(points: Tensor) -> Tensor:
            return everyone(torch.stack([kernels.count_above(part, points) for part in parts]).sum(0))

        return _smallest(count, most, parts[0].bias)

    F = len(layers[0].bias)
    group = _divisor(F, limit=16)
    # On a GPU a size that depends on the data would have the host wait. Without groups nothing would be left out, and
    # to gather more than a quarter of the scores takes longer than to count all of them.
    if product.is_cuda or group == 1 or 4 * k * group > len(layers) * F * shards:
        return search(layers)
    # At most `most` groups of features have a score above `least`, so the result is at least that. All scores above the
    # result lie in these groups: the others need not be looked at again.
    largest = [kernels.maxima(layer, group) for layer in layers]
    least = search([_plain(of_layer) for of_layer in largest])
    candidates = [_members(layer, of_layer > least, group) for layer, of_layer in zip(layers, largest)]
    return torch.maximum(least, search([_plain(torch.cat(candidates))]))


def _members(layer: ScoreInputs, chosen: Tensor, group: int) -> Tensor:
    """The scores of the chosen groups of features, chosen (F / group, B): (chosen ones, group)."""
    of_feature, of_token = chosen.nonzero(as_tuple=True)
    product = layer.product.unflatten(0, (-1, group))[of_feature, :, of_token]
    z = product + layer.bias.view(-1, group)[of_feature]
    return z if layer.norm is None else z * layer.norm.view(-1, group)[of_feature]


def _plain(scores: Tensor) -> ScoreInputs:
    return ScoreInputs(scores, scores.new_zeros(len(scores)), None)


def _smallest(count: Callable[[Tensor], Tensor], most: Tensor, like: Tensor) -> Tensor:
    """The smallest t >= 0 (), of like's dtype, with count(t) <= most. Nothing waits for the device.

    Floats that are not negative are ordered as the integers of the same bits: the search halves these twice a pass.
    """
    bits = torch.int32 if like.dtype == torch.float32 else torch.int64
    low = torch.full((), -1, dtype=bits, device=like.device)  # count(low) > most, count(high) <= most
    high = torch.full((), torch.inf, dtype=like.dtype, device=like.device).view(bits)
    steps = torch.arange(1, _POINTS + 1, dtype=bits, device=like.device)
    for _ in range(16 if bits == torch.int32 else 32):
        points = torch.minimum(low + (high - low + _POINTS) // (_POINTS + 1) * steps, high)
        bounds = torch.cat([low.view(1), points, high.view(1)])
        at = (count(points.view(like.dtype)) > most).sum()
        low, high = bounds.index_select(0, torch.stack([at, at + 1])).unbind()  # plain indexing would wait for `at`
    return high.view(like.dtype)


def _divisor(features: int, limit: float) -> int:
    """The largest power of two, up to `limit`, that divides the number of features."""
    group = 1
    while group * 2 <= limit and features % (group * 2) == 0:
        group *= 2
    return group
