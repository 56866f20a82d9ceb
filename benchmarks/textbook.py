"""The step as the papers write it: a masked square decoder, einsum, separate norms. What ours must equal and outrun."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from clt.model.loss import Objective


class JumpReLU(torch.autograd.Function):
    """a = pre * 1[pre > max(theta, 0)] with the rectangle estimate of d/dtheta (arXiv 2407.14435), pre (B, L, F).

    through_pre: the estimate also goes to pre, with the opposite sign (Anthropic, January 2025).
    """

    @staticmethod
    def forward(ctx: Any, pre: Tensor, theta: Tensor, bandwidth: float, through_pre: bool) -> Tensor:
        ctx.save_for_backward(pre, theta)
        ctx.bandwidth, ctx.through_pre = bandwidth, through_pre
        return torch.where((pre > theta) & (pre > 0), pre, 0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        (grad,), (pre, theta) = grads, ctx.saved_tensors
        near = (pre - theta).abs() < ctx.bandwidth / 2
        through = torch.where(near, theta / ctx.bandwidth * grad, 0)
        grad_pre = torch.where((pre > theta) & (pre > 0), grad, 0) + through * ctx.through_pre
        return grad_pre.to(pre.dtype), -through.sum(0, dtype=theta.dtype).view_as(theta), None, None


class Textbook(nn.Module):
    """loss = MSE + lambda * sum tanh(c * ||W_dec|| * a), of the weights and statistics of an `Objective` (JumpReLU).

    W_enc (L, D, F), b_enc (L, F), threshold (1, L, F), W_dec (L, L, F, D) [source, target], b_dec (L, D).
    """

    def __init__(self, objective: Objective) -> None:
        super().__init__()
        clt = objective.transcoder
        assert clt.spec.activation == "jumprelu"
        assert not objective.loss.pre_activation
        self.bandwidth, self.through_pre = clt.spec.bandwidth, clt.spec.straight_through_pre
        self.scale = objective.loss.sparsity_scale
        self.W_enc, self.b_enc, self.threshold, self.b_dec = (
            nn.Parameter(weight.detach().clone()) for weight in (clt.W_enc, clt.b_enc, clt.threshold, clt.b_dec)
        )
        self.W_dec = nn.Parameter(clt.dense_decoder().detach())
        self.mask = self.W_dec.new_ones(clt.n_layers, clt.n_layers).triu()[:, :, None, None]
        self.statistics = dict(clt.normalization.named_buffers())

    def forward(self, activations: Tensor, sparsity: float) -> Tensor:
        """activations (B, 2, L, D) -> the loss ()."""
        known, dtype = self.statistics, self.b_dec.dtype
        x = (activations[:, 0].to(dtype) - known["input_mean"]) / known["input_sd"]
        y = (activations[:, 1].to(dtype) - known["target_mean"]) / known["target_sd"]
        pre = torch.einsum("bld,ldf->blf", x, self.W_enc) + self.b_enc
        features = JumpReLU.apply(pre, self.threshold, self.bandwidth, self.through_pre)
        assert isinstance(features, Tensor)
        decoder = self.W_dec * self.mask
        error = torch.einsum("bsf,stfd->btd", features, decoder) + self.b_dec - y
        norms = decoder.square().sum((1, 3)).sqrt()  # (L, F)
        penalty = torch.tanh(self.scale * norms * features).sum((1, 2)).mean()
        return error.square().mean() + sparsity * penalty
