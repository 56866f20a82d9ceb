"""The objective: squared error, sparsity and pre-activation loss, each a mean over tokens."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from clt.model.transcoder import CrossLayerTranscoder


class Terms(NamedTuple):
    """What one batch costs. All are means over its tokens; scalars unless a shape is given."""

    loss: Tensor
    mse: Tensor
    sparsity: Tensor
    pre_activation: Tensor
    mse_per_layer: Tensor  # (L,)
    l0_per_layer: Tensor  # (L,)
    fired: Tensor  # (L, F) bool: features that were on at least once


class Objective(nn.Module):
    """loss = MSE + lambda * sum_{l,f} tanh(c * ||W_dec,(l,f)|| * a) + lambda_P * sum_{l,f} relu(theta - pre)

    MSE is over tokens, layers and dimensions, in normalised target units (`target_scale="layer"`) or in the model's
    (`"none"`). The tanh penalty on the norm of the whole write vector is that of Anthropic's "Circuit Tracing" (2025);
    the pre-activation loss is relu(-pre) with `pre_activation_kind="negative"`.
    """

    def __init__(
        self,
        transcoder: CrossLayerTranscoder,
        *,
        sparsity_scale: float = 0.1,
        pre_activation: float = 0.0,
        pre_activation_kind: str = "below_threshold",
        target_scale: str = "layer",
    ) -> None:
        super().__init__()
        self.transcoder = transcoder
        self.sparsity_scale = sparsity_scale
        self.pre_activation, self.pre_activation_kind = pre_activation, pre_activation_kind
        self.target_scale = target_scale

    def forward(self, activations: Tensor, sparsity: Tensor) -> Terms:
        """activations (B, 2, L, D) of any float dtype; sparsity: lambda as a 0-d tensor (a float would recompile)."""
        clt = self.transcoder
        pre = clt.preactivations(clt.normalization.input(activations[:, 0]))  # (L, B, F)
        features = clt.activate(pre)
        error = clt.reconstruct(features) - clt.normalization.target(activations[:, 1])  # (B, L, D) float32
        if self.target_scale == "none":
            error = error * clt.normalization.target_sd
        mse_per_layer = error.square().mean((0, 2))
        scale = self.sparsity_scale * clt.decoder_norms().unsqueeze(1)  # (L, 1, F)
        penalty = sum_features(torch.tanh(scale * features))
        if self.pre_activation:
            floor = clt.threshold.view(-1, 1, clt.d_features) if self.pre_activation_kind == "below_threshold" else 0.0
            pre_activation = sum_features(torch.relu(floor - pre))
        else:
            pre_activation = penalty.new_zeros(())
        mse = mse_per_layer.mean()
        on = features.detach().clone().gt_(0)  # floats, as in `is_on`
        return Terms(
            loss=mse + sparsity * penalty + self.pre_activation * pre_activation,
            mse=mse.detach(),
            sparsity=penalty.detach(),
            pre_activation=pre_activation.detach(),
            mse_per_layer=mse_per_layer.detach(),
            l0_per_layer=on.sum((1, 2), dtype=torch.float32) / on.shape[1],
            fired=on.amax(1) > 0,
        )


def sum_features(values: Tensor) -> Tensor:
    """Sum over layers and features, mean over the batch, in float32: (L, B, F) -> ()."""
    return values.sum((0, 2), dtype=torch.promote_types(values.dtype, torch.float32)).mean()
