"""Triton kernels: from a layer's products to the lists of pairs, and from the pairs' gradients to sums over tokens.

One program per feature goes over its tokens in order, so that lists and sums are the same every time.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _look(product, bias, limit, of_token, row, token, inside, stride, half, BY_TOKEN: tl.constexpr):
    """Pre-activations of one feature and some tokens, whether they fire, and whether they are near the threshold."""
    z = tl.load(product + row * stride + token, mask=inside, other=0.0).to(tl.float32) + tl.load(bias + row)
    theta = tl.load(limit + row) + tl.zeros_like(z)
    if BY_TOKEN:
        theta = tl.div_rn(tl.load(of_token + token, mask=inside, other=0.0), theta)
    on = inside & ~(z <= tl.maximum(theta, 0.0))  # a nan fires, and reaches the loss
    return z, on, inside & (tl.abs(z - theta) < half)


@triton.jit
def count_pairs(
    product, bias, limit, of_token, counts, tokens, stride, half,
    BY_TOKEN: tl.constexpr, NEAR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """counts (2, F): how many pairs of each feature fire, and how many others are near the threshold."""
    row = tl.program_id(0).to(tl.int64)
    fired = tl.zeros((BLOCK,), tl.int32)
    others = tl.zeros((BLOCK,), tl.int32)
    start = 0
    while start < tokens:
        token = start + tl.arange(0, BLOCK)
        _, on, near = _look(product, bias, limit, of_token, row, token, token < tokens, stride, half, BY_TOKEN)
        fired += on.to(tl.int32)
        if NEAR:
            others += (near & ~on).to(tl.int32)
        start += BLOCK
    tl.store(counts + row, tl.sum(fired, 0))
    tl.store(counts + tl.num_programs(0) + row, tl.sum(others, 0))


@triton.jit
def fill_pairs(
    product, bias, limit, of_token, scale, firsts, numbers, every,
    tokens_out, features_out, values_out, through_out, penalty_out, shrink_out, active_out,
    tokens, stride, half, capacity,
    BY_TOKEN: tl.constexpr, NEAR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The pairs of each feature from firsts (F,) on, those within the capacity; the sums of all of its pairs (F,).

    Those that do not fire are numbered from numbers (F,) on, and of them multiples of every () are listed.
    """
    row = tl.program_id(0).to(tl.int64)
    next_pair = tl.load(firsts + row)
    number = tl.load(numbers + row)
    one_of = tl.load(every)
    double_scale = 2 * tl.load(scale + row)
    slope_at_theta = tl.load(limit + row) / (2 * half) if NEAR else 0.0
    penalty = tl.zeros((BLOCK,), tl.float32)
    shrink = tl.zeros((BLOCK,), tl.float32)
    active = tl.zeros((BLOCK,), tl.int32)
    start = 0
    while start < tokens:
        token = start + tl.arange(0, BLOCK)
        z, on, near = _look(product, bias, limit, of_token, row, token, token < tokens, stride, half, BY_TOKEN)
        listed = on
        if NEAR:
            others = (near & ~on).to(tl.int32)
            place = number + tl.cumsum(others, 0) - others
            listed = on | ((others > 0) & (place % one_of == 0))
            number += tl.sum(others, 0)
        value = tl.where(on, z, 0.0)
        saturation = tl.sigmoid(double_scale * value)
        penalty += tl.where(on, 2 * saturation - 1, 0.0)
        shrink += tl.where(on, 4 * (1 - saturation) * saturation * value, 0.0)
        active += on.to(tl.int32)
        pair = next_pair + tl.cumsum(listed.to(tl.int32), 0) - 1
        kept = listed & (pair < capacity)
        tl.store(tokens_out + pair, token, mask=kept)
        tl.store(features_out + pair, row.to(tl.int32) + tl.zeros_like(token), mask=kept)
        tl.store(values_out + pair, value, mask=kept)
        if NEAR:
            through = slope_at_theta * tl.where(on, 1, one_of).to(tl.float32)
            tl.store(through_out + pair, tl.where(near, through, 0.0), mask=kept)
        next_pair += tl.sum(listed.to(tl.int32), 0)
        start += BLOCK
    tl.store(penalty_out + row, tl.sum(penalty, 0))
    tl.store(shrink_out + row, tl.sum(shrink, 0))
    tl.store(active_out + row, tl.sum(active, 0).to(tl.float32))


@triton.jit
def gate_pairs(
    offsets, values, through, addends, scale, grad_sparsity, pre_out, bias_out, threshold_out, capacity,
    ADDENDS: tl.constexpr, NEAR: tl.constexpr, THROUGH_PRE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Of each feature: the gradient to its pairs' pre-activations, and its sums, to bias and threshold (F,)."""
    row = tl.program_id(0).to(tl.int64)
    start, end = tl.load(offsets + row), tl.load(offsets + row + 1)
    of_row, of_penalty = tl.load(scale + row), tl.load(grad_sparsity)
    bias = tl.zeros((BLOCK,), tl.float32)
    threshold = tl.zeros((BLOCK,), tl.float32)
    while start < end:
        pair = start + tl.arange(0, BLOCK)
        inside = pair < end
        value = tl.load(values + pair, mask=inside, other=0.0)
        saturation = tl.sigmoid(2 * of_row * value)
        g = of_penalty * 4 * (1 - saturation) * saturation * of_row
        place = addends + pair
        for _ in tl.static_range(ADDENDS):  # pyright: ignore[reportGeneralTypeIssues]
            g += tl.load(place, mask=inside, other=0.0)
            place += capacity
        pre = tl.where(value != 0, g, 0.0)
        if NEAR:
            near = tl.load(through + pair, mask=inside, other=0.0) * g
            threshold -= near
            if THROUGH_PRE:
                pre += near
        tl.store(pre_out + pair, pre, mask=inside)
        bias += tl.where(inside, pre, 0.0)
        start += BLOCK
    tl.store(bias_out + row, tl.sum(bias, 0))
    tl.store(threshold_out + row, tl.sum(threshold, 0))
