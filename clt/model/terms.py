"""The terms of the loss beside the squared error, each a mean over tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from clt.model.activations import fire
from clt.model.spec import LossConfig
from clt.model.topk import per_token
from clt.model.transcoder import CrossLayerTranscoder


class TermInputs(NamedTuple):
    """What a term may use. On a feature shard, it covers this shard's features only."""

    transcoder: CrossLayerTranscoder
    loss: LossConfig
    tokens: int
    products: tuple[Tensor, ...]  # L of (F, B): pre-activations without their bias; gradients flow
    sparsity: Tensor  # (L,): of tanh(c * ||W_dec|| * a), summed over features and tokens; gradients flow
    pre_activation: Tensor  # (L,): of ||W_dec|| * relu(least - pre), likewise
    remainder: Tensor | None  # (B, L, D): what the features leave of the target, in `unit`; only with `aux`
    unit: Tensor | None  # of the error, as in Target
    dead: Tensor | None  # (L, F) bool


def sparsity(inputs: TermInputs) -> Tensor:
    """sum_{l,f} tanh(c * ||W_dec,(l,f)|| * a), the norm that of the whole write vector (Anthropic, 2025)."""
    return inputs.sparsity.sum() / inputs.tokens


def pre_activation(inputs: TermInputs) -> Tensor:
    """sum_{l,f} ||W_dec,(l,f)|| * relu(theta - pre) (Anthropic, January 2025), or of relu(-pre) for `negative`."""
    return inputs.pre_activation.sum() / inputs.tokens


def aux(inputs: TermInputs) -> Tensor:
    """AuxK: mean square of what dead features leave of the remainder, times the mean over layers of min(1, dead / k).

    In each layer the k largest dead pre-activations of a token fire, by no threshold but 0, and write without b_dec.
    Gradients flow to them alone. The host waits for the numbers of dead features. On a feature shard: its equal part of
    the value, with the gradient of the whole. (arXiv 2406.04093)
    """
    clt, remainder, k = inputs.transcoder, inputs.remainder, inputs.loss.aux_k
    if not inputs.loss.aux or inputs.dead is None or remainder is None:
        return inputs.sparsity.new_zeros(())
    y, share = torch.zeros_like(remainder), remainder.new_zeros(())
    for s, (product, weight) in enumerate(zip(inputs.products, clt.W_dec)):
        index = inputs.dead[s].nonzero().squeeze(1)
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
    if inputs.unit is not None:
        y = y * inputs.unit
    return share * (remainder - y).square().mean() / clt.shards


TERMS: dict[str, Callable[[TermInputs], Tensor]] = {"sparsity": sparsity, "pre_activation": pre_activation, "aux": aux}
"""The terms beside the squared error, each a mean over tokens (); LossConfig has the coefficient under the same name.

To add one, write the function here and the field there: the loss, the metrics, the check for numbers that are not
finite and the sum over ranks follow.
One that reads `products` or W_dec itself is to be refused where `aux` is, in clt/train/spec.py: the sparse step has no
products, and the clipping of `optim.decoder=fused` does not know of such a gradient.
"""


Coefficients = dict[str, float | Tensor]
"""What each of TERMS is multiplied by; a tensor () on the device where it is steered."""


def value_names() -> list[str]:
    """The names of `Losses.values`."""
    return ["mse", *TERMS]
