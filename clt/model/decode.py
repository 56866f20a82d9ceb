"""The cross-layer decoder outside the training step: one matrix product per source layer over the packed weights."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

SumShards = Callable[[Tensor], Tensor]


def decode(features: Tensor, weights: list[Tensor]) -> Tensor:
    """y~[b, t] = sum_{s <= t} a[s, b] @ W_dec[s -> t], without ever forming one term per (source, target) pair.

    features (L, B, F) and one W_dec.{s} (F, T_s, D) per source layer, which writes to layers s .. s + T_s - 1
    (T_s = L - s, or 1 without cross-layer writes), give y~ (B, L, D).

    Products run in the features' dtype (bf16 under autocast); y~ accumulates in at least float32.
    """
    (L, B, _), D = features.shape, weights[0].shape[-1]
    y = features.new_zeros(B, L * D, dtype=torch.promote_types(features.dtype, torch.float32))
    for s, weight in enumerate(weights):
        written = weight.flatten(1).to(features.dtype)  # (F, T_s * D)
        columns = y[:, s * D : s * D + written.shape[1]]
        if y.dtype == features.dtype:
            columns.addmm_(features[s], written)
        else:
            columns.add_(features[s] @ written)
    return y.view(B, L, D)


class SumOverShards(torch.autograd.Function):
    """Adds up, in place, the partial reconstructions of all shards of a transcoder.

    Every shard then computes the same loss from the same sum, so the sum's gradient is the identity and the backward
    pass needs no communication.
    """

    @staticmethod
    def forward(ctx, y: Tensor, sum_shards: SumShards) -> Tensor:  # type: ignore[override]
        ctx.mark_dirty(y)
        return sum_shards(y)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        return grad, None


def unsharded(y: Tensor) -> Tensor:
    """The sum over shards of a transcoder that has one shard."""
    return y
