"""The objective: squared error and the named terms, each a mean over tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from clt.model.activations import thresholds
from clt.model.spec import LossConfig
from clt.model.step import Encode, Skip, SquaredError, Step, Target, Write, make_kernels
from clt.model.transcoder import CrossLayerTranscoder


class Batch(NamedTuple):
    """What a term may use. On a feature shard, it covers this shard's features only."""

    transcoder: CrossLayerTranscoder
    loss: LossConfig
    tokens: int
    products: tuple[Tensor, ...]  # L of (F, B): pre-activations without their bias; gradients flow
    sparsity: Tensor  # (L,): of tanh(c * ||W_dec|| * a), summed over features and tokens; gradients flow
    pre_activation: Tensor  # (L,): of relu(floor - pre), likewise


def sparsity(batch: Batch) -> Tensor:
    """sum_{l,f} tanh(c * ||W_dec,(l,f)|| * a), the norm that of the whole write vector (Anthropic, 2025)."""
    return batch.sparsity.sum() / batch.tokens


def pre_activation(batch: Batch) -> Tensor:
    """sum_{l,f} relu(theta - pre), or relu(-pre) with `pre_activation_kind="negative"`."""
    return batch.pre_activation.sum() / batch.tokens


TERMS: dict[str, Callable[[Batch], Tensor]] = {"sparsity": sparsity, "pre_activation": pre_activation}
"""The terms beside the squared error, each a mean over tokens (); LossConfig has the coefficient under the same name.

To add one, write the function here and the field there: the loss, the metrics, the check for numbers that are not
finite and the sum over ranks follow.
"""


def value_names() -> list[str]:
    """The names of `Losses.values`."""
    return ["mse", *TERMS]


class Losses(NamedTuple):
    """What one batch costs. All are means over its tokens; scalars unless a shape is given."""

    total: Tensor
    values: dict[str, Tensor]  # the squared error as `mse`, and each of TERMS, without their coefficients
    mse_per_layer: Tensor  # (L,)
    l0_per_layer: Tensor  # (L,)
    fired: Tensor  # (L, F) bool: features that fired at least once


class SumOverShards(torch.autograd.Function):
    """Adds up, in place, the partial reconstructions of all shards.

    Every shard then computes the same loss from the same sum, so that the gradient to its own part is the sum's.
    """

    @staticmethod
    def forward(ctx, y: Tensor, sum_shards: Callable[[Tensor], Tensor]) -> Tensor:  # type: ignore[override]
        ctx.mark_dirty(y)
        return sum_shards(y)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        return grad, None


class Objective(nn.Module):
    """loss = MSE + the sum over TERMS of coefficient * value.

    MSE is over tokens, layers and dimensions, in normalised target units (`target_scale="layer"`) or in the model's
    (`"none"`). `compile` compiles what works element by element; matrix products are libraries' calls either way.
    """

    def __init__(self, transcoder: CrossLayerTranscoder, loss: LossConfig, *, compile: bool = False) -> None:
        super().__init__()
        self.transcoder, self.loss = transcoder, loss
        self.kernels = make_kernels(compile)
        self.gradient_memory: Callable[[Tensor], Tensor | None] = lambda parameter: None  # autograd makes it

    def forward(self, activations: Tensor, coefficients: dict[str, float]) -> Losses:
        """activations (B, 2, L, D) of any float dtype; coefficients: of each of TERMS in this step."""
        clt, norm, device = self.transcoder, self.transcoder.normalization, activations.device.type
        (B, _, L, D), exact = activations.shape, clt.b_dec.dtype
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else exact
        with torch.autocast(device, enabled=False):
            x = self.kernels.normalized(norm, activations, dtype)
            features = x.new_empty(B, L * clt.d_features)
            step = Step(clt.spec, self.loss, self.kernels, self.gradient_memory, list(clt.W_dec))
            products = Encode.apply(x, clt.W_enc, step)
            theta = thresholds(clt.spec, clt.threshold[0].unsqueeze(2))  # (L, F, 1)
            y, sums = x.new_empty(B, L, D, dtype=exact if clt.shards > 1 else dtype), []
            weights = zip(products, clt.b_enc.unbind(), theta.unbind(), clt.W_dec)  # type: ignore[arg-type]
            for s, of_layer in enumerate(weights):
                y, *sums_of_layer = Write.apply(y, *of_layer, features, s, step)  # type: ignore[misc]
                sums.append(sums_of_layer)
            del features
            if clt.shards > 1:
                y = SumOverShards.apply(y, clt.sum_shards)
            if clt.W_skip is not None:
                y = Skip.apply(y, x, clt.W_skip, step)
            unit = norm.target_sd if self.loss.target_scale == "none" else None
            target = Target(activations, norm.target_mean, norm.target_sd, unit)
            mse_per_layer = SquaredError.apply(y, clt.b_dec, target, self.kernels)  # type: ignore[misc]
        penalties, lows, active = (torch.stack(of_layers) for of_layers in zip(*sums))
        mse, batch = mse_per_layer.mean(), Batch(clt, self.loss, B, products, penalties, lows)  # type: ignore[arg-type]
        total, values = mse, {"mse": mse.detach()}
        for name, term in TERMS.items():
            value = term(batch)
            total, values[name] = total + coefficients[name] * value, value.detach()
        return Losses(total, values, mse_per_layer.detach(), active.sum(1) / B, active > 0)
