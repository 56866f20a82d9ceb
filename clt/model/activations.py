"""What happens to one source layer's pre-activations, element by element, and the gradient of it.

To try another activation function or sparsity penalty, change the pair `gate` and `gate_gradients`. They read every
element once, so that torch.compile makes each a single pass over memory. Pre-activations come as (F, B): a feature's
sums over the tokens are then sums along memory.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Rule(NamedTuple):
    """The activation function and the losses on it."""

    activation: str
    """jumprelu or relu"""
    bandwidth: float
    through_pre: bool
    floor: str
    """of the pre-activation loss relu(floor - pre): none (no such loss), zero or threshold"""


class Gated(NamedTuple):
    """features (F, B) in the product's dtype, and sums in at least float32."""

    features: Tensor
    penalty: Tensor  # (): of tanh(scale * a)
    low: Tensor  # (): of relu(floor - pre)
    active: Tensor  # (F,): for how many tokens each feature is on


class Gradients(NamedTuple):
    """pre (F, B) in the product's dtype, and the features again; three (F,), summed over tokens in at least float32."""

    pre: Tensor
    bias: Tensor
    threshold: Tensor
    scale: Tensor
    features: Tensor


def is_on(pre: Tensor, threshold: Tensor | float) -> Tensor:
    """Which features fire, above their threshold and above zero: 1 or 0 in pre's dtype.

    A mask of floats, because CPU kernels on bools are not vectorised: this is ten times faster than `where`.
    """
    return pre.clone().gt_(threshold.clamp_min(0) if isinstance(threshold, Tensor) else threshold)


def gate(product: Tensor, bias: Tensor, threshold: Tensor, scale: Tensor, rule: Rule) -> Gated:
    """a = pre * 1[pre > theta and pre > 0], the penalty tanh(c ||W_dec|| a) and the pre-activation loss on it.

    pre = product + bias, in at least float32: product (F, B), of inputs and encoder; bias and threshold (F,);
    scale (F,): c times the norm of each feature's write vector.
    """
    z, threshold, scale = product + bias.unsqueeze(1), threshold.unsqueeze(1), scale.unsqueeze(1)
    on = is_on(z, threshold if rule.activation == "jumprelu" else 0.0)
    features = z * on
    penalty = _saturation(scale, features).mul_(2).sub_(1).sum(1).sum()
    low = torch.relu(_floor(threshold, rule) - z).sum(1).sum() if rule.floor != "none" else torch.zeros_like(penalty)
    return Gated(features.to(product.dtype), penalty, low, on.sum(1))


def gate_gradients(
    product: Tensor,
    bias: Tensor,
    threshold: Tensor,
    scale: Tensor,
    rule: Rule,
    grad_features: Tensor,
    grad_penalty: Tensor,
    grad_low: Tensor,
) -> Gradients:
    """The gradients of `gate`. The step's is replaced by a rectangle of width bw (Rajamanoharan et al. 2024):

        d/dtheta = -(theta / bw) * 1[|pre - theta| < bw / 2] * g, summed over the batch (arXiv 2407.14435)
        d/dpre   = 1[on] * g   (+ (theta / bw) * 1[|pre - theta| < bw / 2] * g with `through_pre`)

    where g is the whole gradient to the features: that of what they write plus that of the penalty.
    """
    z, threshold, scale = product + bias.unsqueeze(1), threshold.unsqueeze(1), scale.unsqueeze(1)
    on = is_on(z, threshold if rule.activation == "jumprelu" else 0.0)
    features = z * on
    saturation = _saturation(scale, features)
    slope = (1 - saturation).mul_(saturation).mul_(4 * grad_penalty)  # 1 - tanh^2
    g = torch.addcmul(grad_features.to(z.dtype), slope, scale)
    grad_scale = slope.mul_(features).sum(1)
    grad_pre = g * on
    grad_threshold = torch.zeros_like(scale[:, 0])
    if rule.activation == "jumprelu":
        near = (z - threshold).abs_().lt_(rule.bandwidth / 2)
        through = near.mul_(g).mul_(threshold / rule.bandwidth)
        grad_threshold = -through.sum(1)
        if rule.through_pre:
            grad_pre = grad_pre + through
    if rule.floor != "none":
        below = (_floor(threshold, rule) - z).gt_(0) * grad_low
        grad_pre = grad_pre - below
        if rule.floor == "threshold":
            grad_threshold = grad_threshold + below.sum(1)
    dtype = product.dtype
    return Gradients(grad_pre.to(dtype), grad_pre.sum(1), grad_threshold, grad_scale, features.to(dtype))


def _saturation(scale: Tensor, features: Tensor) -> Tensor:
    """(1 + tanh(scale * features)) / 2. Compiled for a CPU, tanh takes longer than all the rest of a pass."""
    return (2 * scale * features).sigmoid_()


def _floor(threshold: Tensor, rule: Rule) -> Tensor:
    return threshold if rule.floor == "threshold" else torch.zeros_like(threshold)
