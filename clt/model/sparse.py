"""The sparse step: once few features fire, most of what the dense one multiplies are zeros.

    lists_s = the pairs (f, b) whose pre-activation is above theta, or within bw / 2 of a learned one
    y~[b]  += a[f, b] * W_dec[s][f], over the pairs of token b                              decode
    dW_dec[s][f] = sum a[f, b] * dy~[b], dW_enc[s][:, f] = sum dpre[f, b] * x~_s[b]         over the pairs of feature f

It computes the same numbers as clt/model/step.py. Products of the encoder are dense, and freed once the pairs are
known. A pair that is not listed has no gradient, so terms with one (`pre_activation`, `aux`) need the dense step.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from clt.model.activations import NO_NORM, theta
from clt.model.kernels import Lists, by_token, kernels_for
from clt.model.spec import CLTConfig
from clt.model.step import Step


def count(product: Tensor, bias: Tensor, threshold: Tensor, norm: Tensor, step: Step) -> Tensor:
    """How many pairs of each feature fire, and how many others are near their threshold, (2, F)."""
    rule = _rule(threshold, norm, step.clt)
    return kernels_for(product.device).count(product, bias, *rule)


def select(
    product: Tensor,
    bias: Tensor,
    threshold: Tensor,
    norm: Tensor,
    step: Step,
    counts: Tensor,
    capacity: int,
    sample: int | None,
) -> Lists:
    """The pairs of one layer: product (F, B); bias, norm (F,); threshold broadcasts against (F, B); counts of `count`.

    sample: of `draw`, where the pairs that do not fire are to be a sample that fits.
    """
    limit, of_token, bandwidth = _rule(threshold, norm, step.clt)
    kernels, scale = kernels_for(product.device), step.loss.sparsity_scale * norm
    return kernels.select(product, bias, limit, of_token, scale, bandwidth, counts, capacity, sample)


def draw(number: int, layer: int) -> int:
    """24 bits for the `sampling` of a layer in step `number`: multiples of the golden ratio, spread over all values."""
    return (number * 0x9E3779B1 + layer * 0x85EBCA6B) % 2**32 >> 8


def needed(found: Tensor, sampled: bool) -> Tensor:
    """Pairs that must have room, (..), of those found (.., 2): that fire, and others that are near their threshold."""
    fired, others = found.unbind(-1)
    return fired + (others.clamp_max(1) if sampled else others)


def _rule(threshold: Tensor, norm: Tensor, clt: CLTConfig) -> tuple[Tensor, Tensor | None, float | None]:
    """The arguments `limit`, `of_token` and `bandwidth` of the kernels."""
    if clt.activation == "topk":  # theta is of tokens, with `by_norm` divided by one of features
        limit = norm.clamp_min(NO_NORM) if clt.by_norm else torch.ones_like(norm)
        of_token = theta(clt, threshold, torch.ones_like(threshold)).reshape(-1)
    else:
        limit, of_token = theta(clt, threshold, norm.unsqueeze(1)).expand(len(norm), 1).reshape(-1), None
    return limit, of_token, clt.bandwidth if clt.activation == "jumprelu" else None


class SparseEncode(torch.autograd.Function):
    """x~ (B, L, D), W_enc (L, D, F) and the lists of all layers -> the pairs' values, L of (C,). x gets no gradient."""

    @staticmethod
    def forward(ctx, x: Tensor, W_enc: Tensor, lists: Sequence[Lists], step: Step) -> tuple[Tensor, ...]:  # type: ignore[override]
        ctx.save_for_backward(x)
        ctx.weight, ctx.lists, ctx.step = W_enc, lists, step
        return tuple(of_layer.values.detach() for of_layer in lists)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grad_pre: Tensor):  # type: ignore[override]
        (x,), memory = ctx.saved_tensors, ctx.step.gradient_memory(ctx.weight)
        grad_W_enc = torch.empty_like(ctx.weight) if memory is None else memory
        for out, of_layer, lists, grad in zip(grad_W_enc, x.unbind(1), ctx.lists, grad_pre):
            kernels_for(x.device).encoder_gradient(out, of_layer, lists, grad)
        return None, grad_W_enc if memory is None else None, None, None


class SparseWrite(torch.autograd.Function):
    """Adds what the features of layer s write to y~ (B, L, D), in place. Returns y~ and the sum of the penalty ().

    values (C,) are those of SparseEncode; b_enc (F,); threshold as in `select`; W_dec (F, T, D) is step.decoders[s].
    y~ is in b_enc's dtype. One function per layer, so that DDP sums a layer's decoder gradient while the earlier
    layers' are computed.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx,
        y: Tensor,
        values: Tensor,
        b_enc: Tensor,
        threshold: Tensor,
        W_dec: Tensor,
        lists: Lists,
        s: int,
        step: Step,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        kernels_for(y.device).decode(y[:, s : s + W_dec.shape[1]], W_dec, by_token(lists, len(y)))
        ctx.save_for_backward(threshold, W_dec, step.norms[s])
        ctx.weight, ctx.lists, ctx.s, ctx.step, ctx.dtype = W_dec, lists, s, step, dtype
        ctx.mark_dirty(y)
        return y, lists.penalty.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y: Tensor, grad_sparsity: Tensor):  # type: ignore[override]
        threshold, W_dec, norm = ctx.saved_tensors
        lists, step, kernels = ctx.lists, ctx.step, kernels_for(grad_y.device)
        scale = step.loss.sparsity_scale
        through_norm = (scale * grad_sparsity * lists.shrink / norm).masked_fill_(norm < NO_NORM, 0)
        memory = step.gradient_memory(ctx.weight)
        grad_W_dec = torch.empty_like(W_dec) if memory is None else memory
        written = grad_y[:, ctx.s : ctx.s + W_dec.shape[1]].to(ctx.dtype).flatten(1)  # (B, T * D)
        grad_features = kernels.decoder_gradients(grad_W_dec, W_dec, through_norm, written, lists)
        grad = kernels.pair_gradients(lists, grad_features, scale * norm, grad_sparsity, step.clt.straight_through_pre)
        grad_theta = grad.threshold.view_as(threshold) if ctx.needs_input_grad[3] else None
        return grad_y, grad.pre, grad.bias, grad_theta, grad_W_dec if memory is None else None, None, None, None, None
