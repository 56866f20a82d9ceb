"""The cross-layer decoder: one matrix product per source layer over the packed weights."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

SumShards = Callable[[Tensor], Tensor]


class Decode(torch.autograd.Function):
    """y~[b, t] = sum_{s <= t} a[s, b] @ W_dec[s -> t], without ever forming one term per (source, target) pair.

    features (L, B, F) and one W_dec.{s} (F, T_s, D) per source layer, which writes to layers s .. s + T_s - 1
    (T_s = L - s, or 1 without cross-layer writes), give y~ (B, L, D).

    Because row f of W_dec.{s} is everything feature f writes, source s is a single product of (B, F) with
    (F, T_s * D), added into columns s*D .. of y~ seen as (B, L * D); the backward pass is the two transposed products.
    Products run in the features' dtype (bf16 under autocast); y~ accumulates in at least float32.

    `sum_shards` adds up, in place, the y~ of all shards of a transcoder. Every shard then computes the same loss from
    the same y~, so the sum's gradient is the identity and the backward pass needs no communication.
    """

    @staticmethod
    def forward(ctx, sum_shards: SumShards, features: Tensor, *weights: Tensor) -> Tensor:  # type: ignore[override]
        (L, B, _), D = features.shape, weights[0].shape[-1]
        exact = features.dtype in (torch.float32, torch.float64)
        out = features.new_zeros(B, L * D, dtype=features.dtype if exact else torch.float32)
        for s, weight in enumerate(weights):
            block = weight.flatten(1).to(features.dtype)  # (F, T_s * D)
            columns = out[:, s * D : s * D + block.shape[1]]
            if exact:
                columns.addmm_(features[s], block)
            else:
                columns.add_(features[s] @ block)
        ctx.save_for_backward(features, *weights)
        return sum_shards(out.view(B, L, D))

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        features, *weights = ctx.saved_tensors
        D = weights[0].shape[-1]
        grad = grad.flatten(1).to(features.dtype)  # (B, L * D)
        grad_features = torch.empty_like(features)
        grad_weights = []
        for s, weight in enumerate(weights):
            block = weight.flatten(1).to(features.dtype)
            columns = grad[:, s * D : s * D + block.shape[1]]
            torch.mm(columns, block.t(), out=grad_features[s])
            grad_weights.append((features[s].t() @ columns).to(weight.dtype).view_as(weight))
        return None, grad_features, *grad_weights


def whole(partial: Tensor) -> Tensor:
    """The sum over shards of a transcoder that is not sharded."""
    return partial


def decode(features: Tensor, weights: list[Tensor], sum_shards: SumShards = whole) -> Tensor:
    """`Decode` as a function: features (L, B, F), weights[s] (F, T_s, D) -> (B, L, D)."""
    result = Decode.apply(sum_shards, features, *weights)
    assert isinstance(result, Tensor)
    return result
