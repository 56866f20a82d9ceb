"""One source layer of a training step, forward and backward: where the time goes."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from clt.model.activations import Gated, Gradients, Rule
from clt.model.decode import accumulate

_NO_NORM = 1e-30  # a decoder row that is shorter counts as zero


class Kernels(NamedTuple):
    """`activations.gate` and `gate_gradients`, as they are or compiled."""

    gate: Callable[..., Gated]
    gate_gradients: Callable[..., Gradients]


class SourceLayer(torch.autograd.Function):
    """Layer s reads x~[:, s], and its features write to y~[:, s:].

        pre = x @ W_enc + b_enc      a, penalty = gate(pre)      y[:, s:] += a @ W_dec

    y (B, L * D) accumulates in at least float32 and is changed in place; x (B, D); W_enc (D, F), b_enc and theta (F,),
    W_dec (F, T, D) with T = L - s targets (1 without cross-layer writes). Products run in x's dtype (bf16 under
    autocast). Returns y, the sums over rows and features of penalty () and pre-activation loss (), and on how many rows
    each feature is on (F,).

    Row f of W_dec is everything feature f writes, so that decoding is one product of (B, F) with (F, T * D) and the
    gradient of W_dec another. x gets no gradient. There is one such function per layer, not one for all, so that DDP
    can sum a layer's decoder gradient over the ranks while the earlier layers' are computed. (The encoder is one tensor
    for all layers, so its gradient comes last.)

    Where `home` (F, T, D) is given and W_dec has no gradient yet, it is written there instead of into new memory and
    becomes W_dec.grad; autograd gets none. In a bucket of DDP's, it is not copied again.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx,
        y: Tensor,
        x: Tensor,
        W_enc: Tensor,
        b_enc: Tensor,
        theta: Tensor,
        W_dec: Tensor,
        home: Tensor | None,
        first_column: int,
        c: float,
        rule: Rule,
        kernels: Kernels,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        pre = torch.addmm(b_enc.to(x.dtype), x, W_enc.to(x.dtype))  # (B, F)
        norm = torch.linalg.vector_norm(W_dec.flatten(1), dim=1)  # (F,)
        features, penalty, low, active = kernels.gate(pre, theta, c * norm, rule)
        decoder = W_dec.flatten(1).to(x.dtype)  # (F, T * D)
        accumulate(y[:, first_column:], features, decoder)
        ctx.save_for_backward(x, pre, features, theta, W_dec, decoder, norm)
        ctx.weight, ctx.home = (
            W_dec,
            home,
        )  # itself: what is saved comes back as another tensor under saved_tensors_hooks
        ctx.first_column, ctx.c, ctx.rule, ctx.kernels = first_column, c, rule, kernels
        ctx.mark_dirty(y)
        ctx.mark_non_differentiable(active)
        return y, penalty, low, active

    @staticmethod
    def backward(ctx, grad_y: Tensor, grad_penalty: Tensor, grad_low: Tensor, _):  # type: ignore[override]
        x, pre, features, theta, W_dec, decoder, norm = ctx.saved_tensors
        written = grad_y[:, ctx.first_column :][:, : decoder.shape[1]].to(x.dtype)  # (B, T * D)
        grad = ctx.kernels.gate_gradients(
            pre, theta, ctx.c * norm, ctx.rule, written @ decoder.t(), grad_penalty, grad_low
        )
        # A zero row's subgradient is 0; it must not come as 0 / tiny * a loss scale's overflow.
        through_norm = (ctx.c * grad.scale / norm).masked_fill_(norm < _NO_NORM, 0).view(-1, 1, 1)
        home = ctx.home if ctx.weight.grad is None else None  # to a gradient that is there, autograd adds
        grad_W_dec = torch.empty_like(W_dec) if home is None else home
        out = grad_W_dec.flatten(1) if x.dtype == W_dec.dtype else None
        product = torch.mm(features.t(), written, out=out).view_as(W_dec)
        torch.addcmul(product, W_dec, through_norm, out=grad_W_dec)  # one pass: both parts, in the weight's dtype
        if home is not None:
            ctx.weight.grad, grad_W_dec = home, None
        grad_W_enc = (x.t() @ grad.pre).to(W_dec.dtype)
        return grad_y, None, grad_W_enc, grad.bias, grad.threshold, grad_W_dec, None, None, None, None, None
