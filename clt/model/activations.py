"""What happens to one source layer's pre-activations, element by element, and the gradient of it.

To try another activation function or sparsity penalty, change the pair `gate` and `gate_gradients`. They are pure and
read every element once, so that torch.compile makes each a single pass over memory.
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
    """features (B, F) in pre's dtype, and sums in at least float32."""

    features: Tensor
    penalty: Tensor  # (): of tanh(scale * a)
    low: Tensor  # (): of relu(floor - pre)
    active: Tensor  # (F,): on how many rows each feature is on


class Gradients(NamedTuple):
    """pre (B, F) in its dtype; the others (F,), summed over the rows, in at least float32."""

    pre: Tensor
    bias: Tensor
    threshold: Tensor
    scale: Tensor


def is_on(pre: Tensor, threshold: Tensor | float) -> Tensor:
    """Which features fire, above their threshold and above zero: 1 or 0 in pre's dtype.

    A mask of floats, because CPU kernels on bools are not vectorised: this is ten times faster than `where`.
    """
    return pre.clone().gt_(threshold.clamp_min(0) if isinstance(threshold, Tensor) else threshold)


def gate(pre: Tensor, threshold: Tensor, scale: Tensor, rule: Rule) -> Gated:
    """a = pre * 1[pre > theta and pre > 0], the penalty tanh(c ||W_dec|| a) and the pre-activation loss on it.

    pre (B, F); threshold (F,); scale (F,): c times the norm of each feature's write vector.
    """
    z = pre.to(torch.promote_types(pre.dtype, torch.float32))
    on = is_on(z, threshold if rule.activation == "jumprelu" else 0.0)
    features = z * on
    penalty = torch.tanh(scale * features).sum()
    low = torch.relu(_floor(threshold, rule) - z).sum() if rule.floor != "none" else torch.zeros_like(penalty)
    return Gated(features.to(pre.dtype), penalty, low, on.sum(0))


def gate_gradients(
    pre: Tensor,
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
    z = pre.to(torch.promote_types(pre.dtype, torch.float32))
    on = is_on(z, threshold if rule.activation == "jumprelu" else 0.0)
    features = z * on
    slope = (1 - torch.tanh(scale * features).square()) * grad_penalty
    g = torch.addcmul(grad_features.to(z.dtype), slope, scale)
    grad_scale = (slope * features).sum(0)
    grad_pre = g * on
    grad_threshold = torch.zeros_like(scale)
    if rule.activation == "jumprelu":
        near = (z - threshold).abs_().lt_(rule.bandwidth / 2)
        through = near * g * (threshold / rule.bandwidth)
        grad_threshold = -through.sum(0)
        if rule.through_pre:
            grad_pre = grad_pre + through
    if rule.floor != "none":
        below = (_floor(threshold, rule) - z).gt_(0) * grad_low
        grad_pre = grad_pre - below
        if rule.floor == "threshold":
            grad_threshold = grad_threshold + below.sum(0)
    return Gradients(grad_pre.to(pre.dtype), grad_pre.sum(0), grad_threshold, grad_scale)


def _floor(threshold: Tensor, rule: Rule) -> Tensor:
    return threshold if rule.floor == "threshold" else torch.zeros_like(threshold)
