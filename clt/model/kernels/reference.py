"""The sparse step in torch: what the Triton kernels are compared with, and the CPU's path. It waits for the device."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from clt.model.kernels import AdamSteps, ByToken, Lists, PairGradients, RowGradient, Rows, sampling


def count(product: Tensor, bias: Tensor, limit: Tensor, of_token: Tensor | None, bandwidth: float | None) -> Tensor:
    """How many pairs of each feature fire, and how many others `select` finds, (2, F)."""
    _, on, near = _look(product, bias, limit, of_token, bandwidth)
    return torch.stack([on.sum(1), (near & ~on).sum(1)])


def select(
    product: Tensor,
    bias: Tensor,
    limit: Tensor,
    of_token: Tensor | None,
    scale: Tensor,
    bandwidth: float | None,
    capacity: int,
    sample: int | None,
) -> Lists:
    """The pairs of product (F, B) and bias (F,) above theta; with a bandwidth, also those near it, or a `sampling`.

    theta is limit (F,), or of_token (B,) / limit. The penalty is of scale (F,) * a. A nan counts as firing, so that it
    reaches the loss.
    """
    z, on, near = _look(product, bias, limit, of_token, bandwidth)
    others = near & ~on
    found = torch.stack([on.sum(), others.sum()])
    every, first = sampling(found, capacity, sample)
    if sample is not None:
        others &= (others.flatten().cumsum(0).view_as(others) - 1 + first) % every == 0
    features, tokens = (on | others).nonzero(as_tuple=True)
    values = (z * on)[features, tokens]
    # The sums are of all pairs, as the kernels' are: what has no room is left out below.
    saturation = (2 * scale[features] * values).sigmoid()
    penalty = _row_sums(features, 2 * saturation - 1, len(bias))
    shrink = _row_sums(features, 4 * (1 - saturation) * saturation * values, len(bias))
    active = _row_sums(features, (values != 0).to(values.dtype), len(bias))
    features, tokens = features[:capacity], tokens[:capacity]
    offsets = torch.searchsorted(features, torch.arange(len(bias) + 1), out_int32=True)
    through = None
    if bandwidth is not None:
        stands_for = torch.where(on[features, tokens], 1, every)
        through = near[features, tokens] * (limit / bandwidth)[features] * stands_for
    return Lists(offsets, tokens.int(), features.int(), values[:capacity], through, penalty, shrink, active, found)


def decode(y: Tensor, W_dec: Tensor, pairs: ByToken) -> None:
    """Add to y (B, T, D) what the pairs write by W_dec (F, T, D)."""
    y += _bags(pairs.features, W_dec.flatten(1), pairs.offsets, pairs.values).view_as(y)


def decoder_gradients(out: Tensor, W_dec: Tensor, through_norm: Tensor, written: Tensor, lists: Lists) -> Tensor:
    """The gradient to W_dec (F, T, D) into out, and to the features of all pairs as addends (n, C).

    written (B, T * D): the gradient to y~; through_norm (F,): what times W_dec is the gradient through its norm.
    """
    weight, written = W_dec.flatten(1), written.to(W_dec.dtype)
    out.copy_(_bags(lists.tokens, written, lists.offsets, lists.values).view_as(out))
    out.addcmul_(W_dec, through_norm.view(-1, 1, 1))
    pieces = zip(lists.features.split(1024), lists.tokens.split(1024))
    dots = [(weight[features] * written[tokens]).sum(1) for features, tokens in pieces]
    return torch.cat([*dots, weight.new_zeros(0)]).unsqueeze(0)


def pair_gradients(
    lists: Lists, grad_features: Tensor, scale: Tensor, grad_sparsity: Tensor, through_pre: bool
) -> PairGradients:
    """As `gate_gradients`, of the pairs: grad_features are addends (n, C), grad_sparsity () is that to the penalty."""
    saturation = (2 * scale[lists.features] * lists.values).sigmoid()
    slope = 4 * (1 - saturation) * saturation
    g = grad_features.sum(0) + grad_sparsity * slope * scale[lists.features]
    pre, threshold = g * (lists.values != 0), torch.zeros_like(g)
    if lists.through is not None:
        threshold = -lists.through * g
        pre = pre - threshold if through_pre else pre
    bias, threshold = (_row_sums(lists.features, each, len(scale)) for each in (pre, threshold))
    return PairGradients(pre, bias, threshold)


def encoder_gradient(out: Tensor, x: Tensor, lists: Lists, grad_pre: Tensor) -> None:
    """The gradient to W_enc (D, F) into out, of x~ (B, D) and the gradient to the pairs' pre-activations (C,)."""
    out.copy_(_bags(lists.tokens, x.to(out.dtype), lists.offsets, grad_pre).t())


def adam_rows(rows: Rows, steps: AdamSteps, gradient: RowGradient, lazy: bool) -> None:
    """The newest step of Adam (arXiv 1412.6980) on decoder rows, in place, after those that a row has missed.

    lazy: rows whose gradient is zero miss this one, too. Also renews what the next step reads: norms, narrow copy.
    """
    if gradient.skip:
        return
    through, newest = gradient.through_norm.view(-1, 1, 1), int(steps.newest)
    moved = torch.ones_like(rows.last, dtype=torch.bool)
    if lazy:
        moved = (gradient.grad.flatten(1) != 0).any(1) | (gradient.through_norm != 0)
    _replay(rows, steps, moved, newest - 1)
    _move(rows, steps, moved, newest, (gradient.grad + rows.weight * through) / gradient.divisor)
    _renew(rows, moved, newest)


def replay_rows(rows: Rows, steps: AdamSteps, wanted: Tensor) -> None:
    """Bring the wanted rows (F,) bool up to date: all steps that they have missed, with a gradient of zero."""
    _replay(rows, steps, wanted, int(steps.newest))
    _renew(rows, wanted, int(steps.newest))


def _replay(rows: Rows, steps: AdamSteps, wanted: Tensor, until: int) -> None:
    first = int(rows.last[wanted].min()) + 1 if wanted.any() else until + 1
    for number in range(first, until + 1):
        _move(rows, steps, wanted & (rows.last < number), number)


def _move(rows: Rows, steps: AdamSteps, which: Tensor, number: int, grad: Tensor | None = None) -> None:
    # Each operation rounds by itself, so that the bits do not depend on which other rows are moved.
    (keep_mean, keep_square), (size, correction) = steps.betas, steps.sizes[number]
    weight, mean, square = (tensor[which] for tensor in (rows.weight, rows.mean, rows.square))
    g = torch.zeros_like(weight) if grad is None else grad[which]
    mean = mean * keep_mean + g * (1 - keep_mean)
    square = square * keep_square + g * g * (1 - keep_square)
    rows.mean[which], rows.square[which] = mean, square
    rows.weight[which] = weight - size * mean / (square.sqrt() * correction + steps.eps)


def _renew(rows: Rows, which: Tensor, number: int) -> None:
    norms = torch.linalg.vector_norm(rows.weight.flatten(1), dim=1)
    rows.norms.copy_(torch.where(which, norms, rows.norms))
    rows.last.masked_fill_(which, number)
    if rows.narrow is not None:
        rows.narrow.copy_(torch.where(which.view(-1, 1, 1), rows.weight.to(rows.narrow.dtype), rows.narrow))


def _look(
    product: Tensor, bias: Tensor, limit: Tensor, of_token: Tensor | None, bandwidth: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Pre-activations, which of them fire, and which are near their threshold, (F, B)."""
    z = product + bias.unsqueeze(1)
    theta = limit.unsqueeze(1) if of_token is None else of_token / limit.unsqueeze(1)
    on = ~(z <= theta.clamp_min(0))
    return z, on, torch.zeros_like(on) if bandwidth is None else (z - theta).abs() < bandwidth / 2


def _bags(index: Tensor, rows: Tensor, offsets: Tensor, weights: Tensor) -> Tensor:
    """For each i: the sum over j in offsets[i] .. offsets[i + 1] - 1 of weights[j] * rows[index[j]]."""
    count = int(offsets[-1])
    weights = weights[:count].to(rows.dtype)
    return embedding_bag(index[:count], rows, offsets, mode="sum", per_sample_weights=weights, include_last_offset=True)


def _row_sums(features: Tensor, values: Tensor, n: int) -> Tensor:
    return values.new_zeros(n).index_add_(0, features, values)
