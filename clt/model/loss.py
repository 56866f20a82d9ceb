"""The objective: squared error, sparsity and pre-activation loss, each a mean over tokens."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from clt.model.activations import Rule, gate, gate_gradients
from clt.model.decode import SumOverShards
from clt.model.source import Kernels, SourceLayer
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

    `compile` compiles what works element by element; matrix products are libraries' calls either way.
    """

    def __init__(
        self,
        transcoder: CrossLayerTranscoder,
        *,
        sparsity_scale: float = 0.1,
        pre_activation: float = 0.0,
        pre_activation_kind: str = "below_threshold",
        target_scale: str = "layer",
        compile: bool = False,
    ) -> None:
        super().__init__()
        self.transcoder = transcoder
        self.sparsity_scale = sparsity_scale
        self.pre_activation = pre_activation
        self.target_scale = target_scale
        floor = "threshold" if pre_activation_kind == "below_threshold" else "zero"
        self.rule = Rule(
            transcoder.activation,
            transcoder.bandwidth,
            transcoder.straight_through_pre,
            floor if pre_activation else "none",
        )
        self.kernels = Kernels(gate, gate_gradients)
        self.squared_error = squared_error
        if compile:
            self.kernels = Kernels(torch.compile(gate, dynamic=False), torch.compile(gate_gradients, dynamic=False))
            self.squared_error = torch.compile(squared_error, dynamic=False)

    def forward(self, activations: Tensor, sparsity: Tensor) -> Terms:
        """activations (B, 2, L, D) of any float dtype; sparsity: lambda as a 0-d tensor (a float would recompile)."""
        clt, norm, device = self.transcoder, self.transcoder.normalization, activations.device.type
        (B, _, L, D), exact = activations.shape, clt.b_dec.dtype
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else exact
        x = norm.input(activations[:, 0]).to(dtype)  # (B, L, D)
        y = x.new_zeros(B, L * D, dtype=exact)
        penalties, lows, actives = [], [], []
        weights = zip(clt.W_enc.unbind(), clt.b_enc.unbind(), clt.threshold[0].unbind(), clt.W_dec, clt.homes)
        with torch.autocast(device, enabled=False):
            for s, of_layer in enumerate(weights):
                y, penalty, low, active = SourceLayer.apply(  # type: ignore[misc]
                    y, x[:, s], *of_layer, s * D, self.sparsity_scale, self.rule, self.kernels
                )
                penalties.append(penalty)
                lows.append(low)
                actives.append(active)
            y = SumOverShards.apply(y, clt.sum_shards)
            unit = norm.target_sd if self.target_scale == "none" else None
            mse_per_layer = self.squared_error(y.view(B, L, D), clt.b_dec, norm.target(activations[:, 1]), unit)
        mse, active = mse_per_layer.mean(), torch.stack(actives)
        penalty, pre_activation = torch.stack(penalties).sum() / B, torch.stack(lows).sum() / B
        return Terms(
            loss=mse + sparsity * penalty + self.pre_activation * pre_activation,
            mse=mse.detach(),
            sparsity=penalty.detach(),
            pre_activation=pre_activation.detach(),
            mse_per_layer=mse_per_layer.detach(),
            l0_per_layer=active.sum(1) / B,
            fired=active > 0,
        )


def squared_error(y: Tensor, b_dec: Tensor, target: Tensor, unit: Tensor | None) -> Tensor:
    """The mean square of (y~ + b_dec - target), in `unit`s (L, 1) or (L, D) if given: (B, L, D) -> (L,)."""
    error = y + b_dec - target
    if unit is not None:
        error = error * unit
    return error.square().mean((0, 2))
