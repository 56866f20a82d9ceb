"""The objective: squared error, sparsity and pre-activation loss, each a mean over tokens."""

from __future__ import annotations

import warnings
from typing import NamedTuple

import torch
from torch import Tensor, nn

from clt.model.activations import Rule
from clt.model.decode import SumOverShards
from clt.model.error import ErrorKernels, SquaredError, Target
from clt.model.normalization import Normalization
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
        self.kernels, self.error_kernels, self.normalized = Kernels(), ErrorKernels(), normalized
        if compile:
            # It says so of every pass from a float16 store to bf16; in between, the pass computes in float32.
            warnings.filterwarnings("ignore", "bf16 and fp16 are mixed in the scheduler node")
            self.kernels, self.error_kernels = self.kernels.compiled(), self.error_kernels.compiled()
            self.normalized = torch.compile(normalized, dynamic=False)

    def forward(self, activations: Tensor, sparsity: float) -> Terms:
        """activations (B, 2, L, D) of any float dtype; sparsity: lambda."""
        clt, norm, device = self.transcoder, self.transcoder.normalization, activations.device.type
        (B, _, L, D), exact = activations.shape, clt.b_dec.dtype
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else exact
        penalties, lows, actives = [], [], []
        with torch.autocast(device, enabled=False):
            x = self.normalized(norm, activations, dtype)
            y, features = x.new_empty(B, L, D), x.new_empty(B, L * clt.d_features)
            thresholds = clt.threshold[0].unbind()
            weights = zip(x.unbind(1), clt.W_enc.unbind(), clt.b_enc.unbind(), thresholds, clt.W_dec, clt.homes)
            for s, of_layer in enumerate(weights):
                y, penalty, low, active = SourceLayer.apply(  # type: ignore[misc]
                    y, *of_layer, features, clt.W_dec, s, self.sparsity_scale, self.rule, self.kernels
                )
                penalties.append(penalty)
                lows.append(low)
                actives.append(active)
            del features
            if clt.shards > 1:
                y = SumOverShards.apply(y.to(exact), clt.sum_shards)
            unit = norm.target_sd if self.target_scale == "none" else None
            target = Target(activations, norm.target_mean, norm.target_sd, unit)
            mse_per_layer = SquaredError.apply(y, clt.b_dec, target, self.error_kernels)  # type: ignore[misc]
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


def normalized(norm: Normalization, activations: Tensor, dtype: torch.dtype) -> Tensor:
    """x~ (B, L, D) of activations (B, 2, L, D)."""
    return norm.input(activations[:, 0]).to(dtype)
