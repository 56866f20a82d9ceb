"""Per-layer normalisation of what the transcoder reads and writes, by the training set's statistics."""

from __future__ import annotations

import torch
from torch import Tensor, nn

TINY = 1e-6  # keeps a dimension that never varies (sd 0) finite
ALL = slice(None)


class Normalization(nn.Module):
    """x~ = (x - mu_in) / sd_in and yhat = y~ * sd_out + mu_out, with mu (L, D) and sd (L, D) or (L, 1) as buffers.

    kind: `layer` (mean vector and one sd per layer: the root of the mean variance over dimensions), `dim` (mean and sd
    per layer and dimension), `token` (each input vector by its own mean and sd, a LayerNorm without affine; targets,
    whose own statistics the transcoder cannot know, as `layer`), `none` (mean 0, sd 1).
    """

    def __init__(self, n_layers: int, d_acts: int, kind: str) -> None:
        super().__init__()
        self.kind = kind
        width = d_acts if kind == "dim" else 1
        for side in ("input", "target"):
            self.register_buffer(f"{side}_mean", torch.zeros(n_layers, d_acts))
            self.register_buffer(f"{side}_sd", torch.ones(n_layers, width))
        self.input_mean: Tensor
        self.input_sd: Tensor
        self.target_mean: Tensor
        self.target_sd: Tensor

    @torch.no_grad()
    def set(self, input_mean: Tensor, input_sd: Tensor, target_mean: Tensor, target_sd: Tensor) -> None:
        """Take statistics (L, D) per layer and dimension (float64, as stored with the data), reduced to this kind."""
        for side, mean, sd in (("input", input_mean, input_sd), ("target", target_mean, target_sd)):
            assert mean.shape == self.input_mean.shape, "the statistics are of other activations"
            if self.kind == "none" or (self.kind == "token" and side == "input"):
                continue
            if self.kind != "dim":
                sd = sd.square().mean(-1, keepdim=True).sqrt()
            getattr(self, f"{side}_mean").copy_(mean)
            getattr(self, f"{side}_sd").copy_(sd.clamp_min(TINY))

    def input(self, x: Tensor, layer: int | slice = ALL) -> Tensor:
        """x (..., L, D), or (..., D) of one layer, in model units -> x~, in at least float32."""
        mean, sd = self.input_mean[layer], self.input_sd[layer]
        x = x.to(mean.dtype)
        if self.kind == "token":
            x = x - x.mean(-1, keepdim=True)
            return x / x.square().mean(-1, keepdim=True).sqrt().clamp_min(TINY)
        return (x - mean) / sd

    def output(self, y: Tensor, layer: int | slice = ALL) -> Tensor:
        """y~ (..., L, D), or (..., D) of one layer -> yhat, in model units."""
        return y * self.target_sd[layer] + self.target_mean[layer]
