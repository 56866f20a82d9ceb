"""AuxK: dead features learn from what the others leave (arXiv 2406.04093)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from clt.model.activations import fire
from clt.model.topk import per_token
from clt.model.transcoder import CrossLayerTranscoder


def auxk(
    clt: CrossLayerTranscoder, products: Sequence[Tensor], remainder: Tensor, unit: Tensor | None, dead: Tensor, k: int
) -> Tensor:
    """The mean square of what dead features leave of the remainder, times the mean over layers of min(1, dead / k).

    products: L of (F, B), pre-activations without their bias; remainder (B, L, D): the target without what y~ explains,
    in this unit of normalised target units; dead (L, F) bool. In each layer the k largest dead pre-activations of a
    token fire, by no threshold but 0, and write without b_dec. Gradients flow to them alone. The host waits for the
    numbers of dead features. On a feature shard: its equal part of the value, with the gradient of the whole.
    """
    y, share = torch.zeros_like(remainder), remainder.new_zeros(())
    for s, (product, weight) in enumerate(zip(products, clt.W_dec)):
        index = dead[s].nonzero().squeeze(1)
        pre = product[index] + clt.b_enc[s, index].unsqueeze(1)  # (dead, B)
        # All shards take part, with k + 1 rows each: zeros never fire.
        rows = torch.cat([pre.detach(), pre.new_zeros(k + 1, pre.shape[1])])
        features = fire(pre, per_token(rows, k, clt.gather_shards)).features
        written = features.to(product.dtype).t() @ weight[index].flatten(1).to(product.dtype)
        y[:, s : s + weight.shape[1]] += written.unflatten(1, weight.shape[1:])
        count = clt.sum_shards(remainder.new_full((), len(index)))
        share = share + (count / k).clamp_max(1) / clt.n_layers
    if clt.shards > 1:  # every shard has the same error, and its own part of y: the value is split, the gradient is not
        own = y * clt.shards
        y = clt.sum_shards(y.detach().clone()) + own - own.detach()
    if unit is not None:
        y = y * unit
    return share * (remainder - y).square().mean() / clt.shards
