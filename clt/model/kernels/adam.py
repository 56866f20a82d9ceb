"""A Triton kernel that updates decoder rows by Adam, and does what else a step would go over them for."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _move(w, m, v, sizes, number, eps):
    """What a step of Adam makes of w, by its moments after it."""
    size, correction = tl.load(sizes + 2 * number), tl.load(sizes + 2 * number + 1)
    return w - size * m / (tl.sqrt(v) * correction + eps)


@triton.jit
def adam_rows(
    weight, mean, square, narrow, norms, last, wanted, grad, through_norm, scalars,
    newest, sizes, width, keep_mean, keep_square, take_mean, take_square, eps,
    STEP: tl.constexpr, LAZY: tl.constexpr, NARROW: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One row (width,) of weight and its moments, in place; its norm; with NARROW its copy in another dtype.

    First the steps that the row has missed, after last[row], with a gradient of zero. STEP: then the newest one, with
    (grad + weight * through_norm) / scalars[1], unless scalars[0] says to skip it; LAZY leaves rows without a gradient
    as they are. Without STEP: the newest was missed too, and only `wanted` rows are updated.
    """
    row = tl.program_id(0).to(tl.int64)
    missed = tl.load(newest)
    number, through, divisor = missed, 0.0, 1.0
    if STEP:
        if tl.load(scalars) != 0:
            return
        missed -= 1
        divisor, through = tl.load(scalars + 1), tl.load(through_norm + row)
        if LAZY:
            found = (tl.zeros((COLUMNS,), tl.float32) + through) != 0
            start = 0
            while start < width:
                column = start + tl.arange(0, COLUMNS)
                found = found | (tl.load(grad + row * width + column, mask=column < width, other=0.0) != 0)
                start += COLUMNS
            if tl.max(found.to(tl.int32), 0) == 0:
                return
    else:
        if tl.load(wanted + row) == 0:
            return
    first = tl.load(last + row) + 1
    total = tl.zeros((COLUMNS,), tl.float32)
    start = 0
    while start < width:
        column = start + tl.arange(0, COLUMNS)
        inside = column < width
        place = row * width + column
        w = tl.load(weight + place, mask=inside, other=0.0)
        m = tl.load(mean + place, mask=inside, other=0.0)
        v = tl.load(square + place, mask=inside, other=0.0)
        step = first
        while step <= missed:
            m *= keep_mean
            v *= keep_square
            w = _move(w, m, v, sizes, step, eps)
            step += 1
        if STEP:
            g = (tl.load(grad + place, mask=inside, other=0.0) + w * through) / divisor
            m = m * keep_mean + g * take_mean
            v = v * keep_square + g * g * take_square
            w = _move(w, m, v, sizes, number, eps)
        tl.store(mean + place, m, mask=inside)
        tl.store(square + place, v, mask=inside)
        tl.store(weight + place, w, mask=inside)
        if NARROW:
            tl.store(narrow + place, w.to(narrow.dtype.element_ty), mask=inside)
        total += w * w
        start += COLUMNS
    tl.store(norms + row, tl.sqrt(tl.sum(total, 0)))
    tl.store(last + row, number)
