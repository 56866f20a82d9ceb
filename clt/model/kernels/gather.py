"""Triton kernels that add up rows by a list: features' decoder rows per token, tokens' gradients per feature.

    out[i] = sum over j in offsets[i] .. offsets[i + 1] - 1 of weights[j] * source[index[j]]

A list is cut into pieces of fixed length. One program adds up one piece of a range of columns; the pieces of a longer
list are then added in order. There are no atomics: the same bits every time.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def add_rows(
    out, slots, source, own, own_scale, index, weights, dots,
    offsets, row_of, last_piece, last_slot, pieces,
    rows, width, out_stride, source_stride, capacity,
    PIECE: tl.constexpr, ADD: tl.constexpr, OWN: tl.constexpr, PAIRS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One piece: into out (rows, width), or into a slot (width,) when its list has more.

    ADD: to what is in out. OWN: also own (rows, width) * own_scale (rows,), and dots: this range of columns' addend to
    the products of each pair's source row with its own row.
    """
    program = tl.program_id(0)
    row = tl.load(row_of + program).to(tl.int64)
    if row >= rows:  # there are fewer pieces than programs
        return
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < width
    count = tl.load(pieces + row).to(tl.int32)
    number = program - tl.load(last_piece + row).to(tl.int32) + count  # of this piece in its list
    start = tl.load(offsets + row) + number * PIECE
    end = tl.minimum(tl.load(offsets + row + 1), start + PIECE)
    total = tl.zeros((PAIRS, COLUMNS), tl.float32)
    mine = tl.zeros((COLUMNS,), tl.float32)
    if OWN:  # noqa: SIM102 - one `if` is of a constant, the other of what was loaded
        if start < end:  # of a feature without pairs nothing is read: its gradient is zero
            mine = tl.load(own + row * width + columns, mask=inside, other=0.0).to(tl.float32)
    while start < end:
        pair = start + tl.arange(0, PAIRS)
        valid = pair < end
        other = tl.load(index + pair, mask=valid, other=0).to(tl.int64)
        weight = tl.load(weights + pair, mask=valid, other=0.0)
        place = source + other[:, None] * source_stride + columns[None, :]
        x = tl.load(place, mask=valid[:, None] & inside[None, :], other=0.0).to(tl.float32)
        total += weight[:, None] * x
        if OWN:
            dot = tl.sum(x * mine[None, :], 1)
            tl.store(dots + tl.program_id(1).to(tl.int64) * capacity + pair, dot, mask=valid)
        start += PAIRS
    result = tl.sum(total, 0)
    if count == 1:
        if OWN:
            result += mine * tl.load(own_scale + row)
        place = out + row * out_stride + columns
        if ADD:
            result += tl.load(place, mask=inside, other=0.0)
        tl.store(place, result, mask=inside)
    else:
        slot = tl.load(last_slot + row).to(tl.int64) - count + number
        tl.store(slots + slot * width + columns, result, mask=inside)


@triton.jit
def add_pieces(
    out, slots, own, own_scale, heavy_rows, last_slot, pieces, rows, width, out_stride,
    ADD: tl.constexpr, OWN: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Add the pieces of the lists that have several, in order."""
    row = tl.load(heavy_rows + tl.program_id(0)).to(tl.int64)
    if row >= rows:
        return
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < width
    end = tl.load(last_slot + row).to(tl.int64)
    slot = end - tl.load(pieces + row)
    result = tl.zeros((COLUMNS,), tl.float32)
    while slot < end:
        result += tl.load(slots + slot * width + columns, mask=inside, other=0.0)
        slot += 1
    if OWN:
        mine = tl.load(own + row * width + columns, mask=inside, other=0.0).to(tl.float32)
        result += mine * tl.load(own_scale + row)
    place = out + row * out_stride + columns
    if ADD:
        result += tl.load(place, mask=inside, other=0.0)
    tl.store(place, result, mask=inside)
