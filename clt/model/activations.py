"""What happens to one layer's pre-activations, element by element, and the gradient of it.

`fire` is the only activation function: training, encoding, evaluation and replacement all call it. (With
`train.kernels` sparse or sampled, `_look` in kernels/reference.py and kernels/lists.py list what fires.) To try another
one, or another penalty, change `fire` or the pair `gate` and `gate_gradients`. Each of the pair reads every element
once, so that torch.compile makes it a single pass over memory. Pre-activations come as (F, B): a feature's sums over
the tokens are then sums along memory.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from clt.model.spec import CLTConfig, LossConfig

THRESHOLD_FLOOR = 0.01
"""Learned thresholds stay at or above it. The straight-through estimate of d/dtheta has the sign of theta: a threshold
that has become negative is pushed further down, by the penalty too, and its feature fires on nearly all tokens."""

NO_NORM = 1e-30  # a decoder row that is shorter counts as zero


class Fired(NamedTuple):
    """The features a, and da/dpre; both in the shape and dtype of pre."""

    features: Tensor
    slope: Tensor  # 1 where a feature fires, else 0


def fire(pre: Tensor, threshold: Tensor) -> Fired:
    """phi: a = pre * 1[pre > theta and pre > 0], of a threshold that broadcasts against pre."""
    # The mask is of floats, because CPU kernels on bools are not vectorised: `where` takes ten times longer.
    slope = pre.clone().gt_(threshold.clamp_min(0))
    return Fired(pre * slope, slope)


def theta(clt: CLTConfig, threshold: Tensor, norm: Tensor | None) -> Tensor:
    """What pre-activations are compared with, of the threshold of scores; norm: ||W_dec||, needed with `by_norm`."""
    if not clt.by_norm:
        return threshold
    assert norm is not None
    # pre > t / norm and pre * norm > t differ by rounding. A score that is above t by rounding alone must not fire.
    return threshold * (1 + 4 * torch.finfo(threshold.dtype).eps) / norm.clamp_min(NO_NORM)


class Gated(NamedTuple):
    """features (F, B) in the product's dtype, and sums over features and tokens in at least float32."""

    features: Tensor
    sparsity: Tensor  # (): of tanh(c * norm * a)
    pre_activation: Tensor  # (): of norm * relu(least - pre)
    active: Tensor  # (F,): for how many tokens each feature fires


class Gradients(NamedTuple):
    """To pre (F, B) in the product's dtype, and to three (F,), summed over tokens in at least float32; the features."""

    pre: Tensor
    bias: Tensor
    threshold: Tensor
    norm: Tensor
    features: Tensor
    dots: Tensor | None = None
    """(F,), if wanted: each decoder row's dot product with its gradient, without the part through the row's norm."""


def gate(
    product: Tensor,
    bias: Tensor,
    threshold: Tensor,
    norm: Tensor,
    dead: Tensor | None,
    clt: CLTConfig,
    loss: LossConfig,
) -> Gated:
    """The features a = fire(pre, theta), the sum of the penalty tanh(c ||W_dec|| a) and of the pre-activation loss.

    pre = product + bias, in at least float32: product (F, B), of inputs and encoder; bias (F,); threshold, of scores,
    broadcasts against (F, B); norm (F,): of each feature's write vector; dead (F,) bool, for the kind `dead`.
    """
    z, norm = product + bias.unsqueeze(1), norm.unsqueeze(1)
    threshold = theta(clt, threshold, norm)
    features, slope = fire(z, threshold)
    penalty = _saturation(loss.sparsity_scale * norm, features).mul_(2).sub_(1).sum(1).sum()
    low = torch.zeros_like(penalty)
    if loss.pre_activation:
        low = _below(z, threshold, dead, loss).mul_(norm).sum(1).sum()
    return Gated(features.to(product.dtype), penalty, low, slope.sum(1))


def gate_gradients(
    product: Tensor,
    bias: Tensor,
    threshold: Tensor,
    norm: Tensor,
    dead: Tensor | None,
    clt: CLTConfig,
    loss: LossConfig,
    grad_features: Tensor,
    grad_sparsity: Tensor,
    grad_pre_activation: Tensor,
    dots: bool = False,
) -> Gradients:
    """The gradients of `gate`. A rectangle of width bw stands for the derivative of the step (arXiv 2407.14435):

        d/dtheta = -(theta / bw) * 1[|pre - theta| < bw / 2] * g, summed over the batch
        d/dpre   = 1[pre fires] * g   (+ (theta / bw) * 1[|pre - theta| < bw / 2] * g with `straight_through_pre`)

    where g is the whole gradient to the features: that of what they write plus that of the penalty. The pre-activation
    loss has no gradient to theta: it would lower theta of every feature that seldom fires, until it is a ReLU.
    """
    z, norm = product + bias.unsqueeze(1), norm.unsqueeze(1)
    threshold = theta(clt, threshold, norm)
    features, on = fire(z, threshold)
    scale = loss.sparsity_scale * norm
    saturation = _saturation(scale, features)
    slope = (1 - saturation).mul_(saturation).mul_(4 * grad_sparsity)  # 1 - tanh^2
    g = torch.addcmul(grad_features.to(z.dtype), slope, scale)
    grad_norm = loss.sparsity_scale * slope.mul_(features).sum(1)
    grad_pre = g * on
    grad_threshold = torch.zeros_like(norm[:, 0])
    if clt.activation == "jumprelu":
        near = (z - threshold).abs_().lt_(clt.bandwidth / 2)
        through = near.mul_(g).mul_(threshold / clt.bandwidth)
        grad_threshold = -through.sum(1)
        if clt.straight_through_pre:
            grad_pre.add_(through)
    if loss.pre_activation:
        below = _below(z, threshold, dead, loss)
        grad_norm = grad_norm + grad_pre_activation * below.sum(1)
        grad_pre = grad_pre - below.gt_(0) * (norm * grad_pre_activation)
    dtype = product.dtype
    # Of row f, sum_b a[f, b] * written[b] is the gradient, and grad_features[f, b] its product with written[b].
    products = (features * grad_features).sum(1) if dots else None
    return Gradients(grad_pre.to(dtype), grad_pre.sum(1), grad_threshold, grad_norm, features.to(dtype), products)


def _saturation(scale: Tensor, features: Tensor) -> Tensor:
    """(1 + tanh(scale * features)) / 2. Compiled for a CPU, tanh takes longer than all the rest of a pass."""
    return (2 * scale * features).sigmoid_()


def _below(z: Tensor, threshold: Tensor, dead: Tensor | None, loss: LossConfig) -> Tensor:
    """How far pre-activations are below what the pre-activation loss wants, (F, B)."""
    least = torch.zeros_like(threshold) if loss.pre_activation_kind == "negative" else threshold
    below = torch.relu(least - z)
    if loss.pre_activation_kind == "dead":
        assert dead is not None
        below = below * dead.unsqueeze(1)
    return below
