"""A Triton kernel that updates decoder rows by Adam, and does what else a step would go over them for."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def adam_rows(
    weight, grad, mean, square, narrow, norms, through_norm, scalars, width, keep_mean, keep_square, eps,
    NARROW: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One row (width,) of weight and its moments, in place; its norm; with NARROW its copy in another dtype.

    The gradient is (grad + weight * through_norm) / scalars[1]. scalars: whether to skip the step, the divisor, the
    step size lr / (1 - beta1^t), and 1 / sqrt(1 - beta2^t).
    """
    row = tl.program_id(0).to(tl.int64)
    if tl.load(scalars) != 0:
        return
    divisor, size, correction = tl.load(scalars + 1), tl.load(scalars + 2), tl.load(scalars + 3)
    through = tl.load(through_norm + row)
    total = tl.zeros((COLUMNS,), tl.float32)
    start = 0
    while start < width:
        column = start + tl.arange(0, COLUMNS)
        inside = column < width
        place = row * width + column
        w = tl.load(weight + place, mask=inside, other=0.0)
        g = (tl.load(grad + place, mask=inside, other=0.0) + w * through) / divisor
        m = tl.load(mean + place, mask=inside, other=0.0)
        v = tl.load(square + place, mask=inside, other=0.0)
        m = g + (m - g) * keep_mean
        v = g * g + (v - g * g) * keep_square
        w -= size * m / (tl.sqrt(v) * correction + eps)
        tl.store(mean + place, m, mask=inside)
        tl.store(square + place, v, mask=inside)
        tl.store(weight + place, w, mask=inside)
        if NARROW:
            tl.store(narrow + place, w.to(narrow.dtype.element_ty), mask=inside)
        total += w * w
        start += COLUMNS
    tl.store(norms + row, tl.sqrt(tl.sum(total, 0)))
