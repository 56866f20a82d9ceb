"""The sparse step in torch: what the Triton kernels are compared with, and the CPU's path. It waits for the device."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag, pad

from clt.model.kernels import AdamSteps, ByToken, DecoderRows, Lists, PairGradients, RowGradient, sampling

CACHED = 2**18  # numbers of a tensor that a thread updates at once: few enough for a processor's cache


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
    counts: Tensor,
    capacity: int,
    sample: int | None,
) -> Lists:
    """The pairs of product (F, B) and bias (F,) above theta; with a bandwidth, also those near it, or a `sampling`.

    theta is limit (F,), or of_token (B,) / limit. The penalty is of scale (F,) * a. counts: what `count` found, (2, F).
    A nan counts as firing: it must reach the loss.
    """
    z, on, near = _look(product, bias, limit, of_token, bandwidth)
    others = near & ~on
    every, first = sampling(counts.sum(1), capacity, sample, product.shape[1])
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
    return Lists(offsets, tokens.int(), features.int(), values[:capacity], through, penalty, shrink, active)


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


def adam_rows(rows: DecoderRows, steps: AdamSteps, gradient: RowGradient, lazy: bool) -> None:
    """The newest step of Adam (arXiv 1412.6980) on decoder rows, in place, after those that a row has missed.

    lazy: rows whose gradient is zero miss this one, too. Also computes what the next step reads: norms, narrow copy.
    """
    if gradient.skip:
        return
    moved = torch.ones_like(rows.last, dtype=torch.bool)
    if lazy:
        moved = (gradient.grad.flatten(1) != 0).any(1) | (gradient.through_norm != 0)
    _update(rows, steps, moved, gradient)


def catch_up_rows(rows: DecoderRows, steps: AdamSteps, wanted: Tensor) -> None:
    """Have the wanted rows (F,) bool take all steps that they have missed, with a gradient of zero."""
    _update(rows, steps, wanted, None)


def _update(rows: DecoderRows, steps: AdamSteps, wanted: Tensor, gradient: RowGradient | None) -> None:
    """Bring the wanted rows up to date; with a gradient, it is that of the newest step."""
    newest, width = int(steps.newest), rows.weight[0].numel()
    missed = newest if gradient is None else newest - 1
    count = min(len(wanted), max(1, CACHED * torch.get_num_threads() // width))
    for chosen in _parts(rows.last, wanted, count):
        kept = (rows.weight, rows.mean, rows.square)
        weight, mean, square = (_take(tensor, chosen) for tensor in kept)
        last = rows.last[chosen]
        for number in range(int(last[0]) + 1, missed + 1):
            behind = int((last < number).sum())
            zero = torch.zeros_like(weight[:behind])
            _step(steps, number, weight[:behind], mean[:behind], square[:behind], zero)
        if gradient is not None:
            grad = weight * gradient.through_norm[chosen].unsqueeze(1)
            grad = grad.add_(_take(gradient.grad, chosen)).div_(gradient.divisor)
            _step(steps, newest, weight, mean, square, grad)
        weight, mean, square = (tensor[:, :width].contiguous() for tensor in (weight, mean, square))
        if isinstance(chosen, Tensor) or width % 16:  # else they are views
            for tensor, changed in zip(kept, (weight, mean, square)):
                tensor.flatten(1)[chosen] = changed
        rows.norms[chosen] = _norms(weight, count)
        rows.last[chosen] = newest
        if rows.narrow is not None:
            rows.narrow.flatten(1)[chosen] = weight.to(rows.narrow.dtype)


def _parts(last: Tensor, wanted: Tensor, count: int) -> Iterator[slice | Tensor]:
    """The wanted rows, at most `count` at once, those first that have missed most steps."""
    if wanted.all() and (last == last[0]).all():
        yield from (slice(start, start + count) for start in range(0, len(last), count))
    elif wanted.any():
        chosen = wanted.nonzero().squeeze(1)
        yield from chosen[last[chosen].argsort()].split(count)


def _take(tensor: Tensor, chosen: slice | Tensor) -> Tensor:
    """Rows of a tensor (F, T, D) as (n, N): N is a multiple of 16, so that none of them is at the end of a vector.

    There, a processor rounds otherwise, and bits would depend on which rows are taken together.
    """
    taken = tensor.flatten(1)[chosen]
    return taken if taken.shape[1] % 16 == 0 else pad(taken, (0, -taken.shape[1] % 16))


def _norms(weight: Tensor, count: int) -> Tensor:
    """The norms (n,) of rows (n, N). Zeros fill up to `count` rows: torch may add up a row otherwise among fewer."""
    of_rows = weight if len(weight) == count else pad(weight, (0, 0, 0, count - len(weight)))
    return torch.linalg.vector_norm(of_rows, dim=1)[: len(weight)]


def _step(steps: AdamSteps, number: int, weight: Tensor, mean: Tensor, square: Tensor, grad: Tensor) -> None:
    """Torch's own step of Adam."""
    beta1, beta2 = steps.betas
    lr = steps.sizes[number, 0].item() * (1 - beta1**number)
    torch._fused_adam_(  # type: ignore[reportPrivateImportUsage]
        [weight], [grad], [mean], [square], [], [torch.tensor(float(number))], lr=lr, beta1=beta1, beta2=beta2,
        weight_decay=0.0, eps=steps.eps, amsgrad=False, maximize=False,
    )  # fmt: skip


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
