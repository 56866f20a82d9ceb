"""Launches the Triton kernels. Functions, arguments and results are those of `reference`, in float32; nothing waits."""

# A launch is typed as a call of the kernel, whose constants are of a type of their own.
# pyright: reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from clt.model.kernels import AdamSteps, ByToken, DecoderRows, Lists, PairGradients, RowGradient, sampling
from clt.model.kernels.adam import adam_rows as adam_kernel
from clt.model.kernels.gather import add_pieces, add_rows
from clt.model.kernels.lists import count_pairs, fill_pairs, gate_pairs

PIECE = 256  # pairs that one program adds up
COLUMNS = 1024  # of a row, that one program adds up
PAIRS = 4  # that it reads at once
FUSION = {"enable_fp_fusion": True}  # a * b + c rounds once; the default differs between versions of Triton
TOKENS = 512  # that a program of `select` reads at once


def count(product: Tensor, bias: Tensor, limit: Tensor, of_token: Tensor | None, bandwidth: float | None) -> Tensor:
    """As the reference's."""
    inputs, sizes, shape = _launch(product, bias, limit, of_token, bandwidth)
    counts = torch.empty(2, len(bias), dtype=torch.int32, device=product.device)
    count_pairs[(len(bias),)](*inputs, counts, *sizes, **shape)
    return counts


def _launch(
    product: Tensor, bias: Tensor, limit: Tensor, of_token: Tensor | None, bandwidth: float | None
) -> tuple[tuple[Tensor, ...], tuple[int, int, float], dict[str, Any]]:
    """What the launches of `count_pairs` and `fill_pairs` share."""
    assert product.stride(1) == 1, product.stride()
    B = product.shape[1]
    block = min(TOKENS, triton.next_power_of_2(B))
    shape = {"BY_TOKEN": of_token is not None, "NEAR": bandwidth is not None, "BLOCK": block, "num_warps": 8} | FUSION
    inputs = (product, bias, limit, limit if of_token is None else of_token)
    return inputs, (B, product.stride(0), (bandwidth or 0.0) / 2), shape


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
    """As the reference's. product's rows may lie apart, but its tokens are contiguous."""
    F, device = len(bias), product.device
    assert sample is None or product.numel() < 2**31, "the kernel numbers pairs by 32 bits"
    fired, others = counts
    every, first = sampling(counts.sum(1), capacity, sample, product.shape[1])
    # From `number` on, a feature's other pairs are numbered. Of these, the multiples of `every` are listed.
    number = others.cumsum(0) - others + first
    listed = fired + (number + others + every - 1) // every - (number + every - 1) // every
    ends = listed.cumsum(0)
    # A count of pairs above 2^31 is beyond every capacity, but must not wrap around.
    firsts = (ends - listed).clamp_max(2**30).int()
    numbers, every = (number % every).int(), every.int()
    whole = partial(torch.empty, capacity, device=device)
    tokens, features = whole(dtype=torch.int32), whole(dtype=torch.int32)
    features.zero_()  # `by_token` carries those beyond the last pair along
    values = torch.zeros(capacity, device=device)
    through = None if bandwidth is None else whole(dtype=torch.float32)
    penalty, shrink, active = torch.empty(3, F, device=device).unbind()
    lists = (tokens, features, values, values if through is None else through, penalty, shrink, active)
    inputs, sizes, shape = _launch(product, bias, limit, of_token, bandwidth)
    fill_pairs[(F,)](*inputs, scale, firsts, numbers, every, *lists, *sizes, capacity, **shape)
    offsets = torch.cat([ends.new_zeros(1), ends]).clamp_max(capacity).int()
    return Lists(offsets, tokens, features, values, through, penalty, shrink, active)


def decode(y: Tensor, W_dec: Tensor, pairs: ByToken) -> None:
    """As the reference's: y (B, T, D), contiguous in its last two dimensions, of float32."""
    pieces = _cut(pairs.offsets, len(pairs.values))
    _add_rows(_rows(y), _rows(W_dec), pairs.features, pairs.values, pairs.offsets, pieces, add=True)


def decoder_gradients(out: Tensor, W_dec: Tensor, through_norm: Tensor, written: Tensor, lists: Lists) -> Tensor:
    """As the reference's."""
    pieces = _cut(lists.offsets, len(lists.values))
    own = (_rows(W_dec), through_norm)
    dots = _add_rows(_rows(out), written, lists.tokens, lists.values, lists.offsets, pieces, own=own)
    assert dots is not None
    return dots


def pair_gradients(
    lists: Lists, grad_features: Tensor, scale: Tensor, grad_sparsity: Tensor, through_pre: bool
) -> PairGradients:
    """As the reference's."""
    near, (addends, capacity) = lists.through is not None, grad_features.shape
    pre = torch.empty_like(lists.values)
    bias, threshold = torch.empty(2, len(scale), device=pre.device).unbind()
    through = lists.through if near else lists.values
    inputs = (lists.offsets, lists.values, through, grad_features, scale, grad_sparsity)
    gate_pairs[(len(scale),)](
        *inputs, pre, bias, threshold, capacity,
        ADDENDS=addends, NEAR=near, THROUGH_PRE=through_pre, BLOCK=32, num_warps=1, **FUSION,
    )  # fmt: skip
    return PairGradients(pre, bias, threshold)


def encoder_gradient(out: Tensor, x: Tensor, lists: Lists, grad_pre: Tensor) -> None:
    """As the reference's."""
    by_feature = torch.empty(len(lists.offsets) - 1, x.shape[1], device=x.device)
    pieces = _cut(lists.offsets, len(lists.values))
    _add_rows(by_feature, x, lists.tokens, grad_pre, lists.offsets, pieces)
    out.copy_(by_feature.t())


def adam_rows(rows: DecoderRows, steps: AdamSteps, gradient: RowGradient, lazy: bool) -> None:
    """As the reference's; all of float32 and contiguous but the narrow copy's dtype."""
    _adam(rows, steps, gradient, None, lazy=lazy)


def catch_up_rows(rows: DecoderRows, steps: AdamSteps, wanted: Tensor) -> None:
    """As the reference's."""
    _adam(rows, steps, None, wanted)


def _adam(
    rows: DecoderRows, steps: AdamSteps, gradient: RowGradient | None, wanted: Tensor | None, *, lazy: bool = False
) -> None:
    weight = _rows(rows.weight)
    wanted = rows.last if wanted is None else wanted.int()
    grad, through_norm, scalars = weight, rows.norms, rows.norms
    if gradient is not None:
        grad, through_norm = gradient.grad, gradient.through_norm
        scalars = torch.stack([gradient.skip.float(), gradient.divisor.float()])
    adam_kernel[(len(weight),)](
        weight, rows.mean, rows.square, weight if rows.narrow is None else rows.narrow, rows.norms, rows.last, wanted,
        grad, through_norm, scalars, steps.newest, steps.sizes, weight.shape[1], *steps.betas,
        *(1 - beta for beta in steps.betas), steps.eps,
        STEP=gradient is not None, LAZY=lazy, NARROW=rows.narrow is not None,
        COLUMNS=min(COLUMNS, triton.next_power_of_2(weight.shape[1])), **FUSION,
    )  # fmt: skip


class _Pieces(NamedTuple):
    """How lists are cut into pieces of at most PIECE pairs; an empty list has one piece, too."""

    row_of: Tensor  # of each program: its list, M when there is no piece for it
    last: Tensor  # (M,): the programs up to a list's last piece
    last_slot: Tensor  # (M,): likewise, of the lists with several pieces
    counts: Tensor  # (M,)
    heavy: Tensor  # the lists with several pieces, then M


def _cut(offsets: Tensor, capacity: int) -> _Pieces:
    counts = ((offsets.diff() + (PIECE - 1)) // PIECE).clamp_min(1)
    last, several = counts.cumsum(0), counts > 1
    programs = torch.arange(len(counts) + capacity // PIECE, device=offsets.device)
    heavy = torch.arange(1, max(1, capacity // PIECE) + 1, device=offsets.device)
    return _Pieces(
        torch.searchsorted(last, programs, right=True, out_int32=True),
        last.int(),
        (counts * several).cumsum(0).int(),
        counts,
        torch.searchsorted(several.cumsum(0), heavy, out_int32=True),
    )


def _add_rows(
    out: Tensor,
    source: Tensor,
    index: Tensor,
    weights: Tensor,
    offsets: Tensor,
    pieces: _Pieces,
    *,
    add: bool = False,
    own: tuple[Tensor, Tensor] | None = None,
) -> Tensor | None:
    """out (M, N), or out + it with `add`, of source (_, N) by lists; with `own` its dots (ceil(N / COLUMNS), C)."""
    (M, N), capacity = out.shape, len(weights)
    columns = min(COLUMNS, triton.next_power_of_2(N))
    blocks = triton.cdiv(N, columns)
    slots = out.new_empty(max(1, 2 * (capacity // PIECE)), N)
    dots = None if own is None else out.new_empty(blocks, capacity)
    weight, scale = (out, out) if own is None else own
    shape = {"ADD": add, "OWN": own is not None, "COLUMNS": columns} | FUSION
    add_rows[(len(pieces.row_of), blocks)](
        out, slots, source, weight, scale, index, weights, out if dots is None else dots,
        offsets, pieces.row_of, pieces.last, pieces.last_slot, pieces.counts,
        M, N, out.stride(0), source.stride(0), capacity, PIECE=PIECE, PAIRS=PAIRS, **shape,
    )  # fmt: skip
    add_pieces[(len(pieces.heavy), blocks)](
        out, slots, weight, scale, pieces.heavy, pieces.last_slot, pieces.counts, M, N, out.stride(0), **shape
    )
    return dots


def _rows(tensor: Tensor) -> Tensor:
    """tensor (M, T, D) as (M, T * D), sharing memory."""
    M, T, D = tensor.shape
    return tensor.view(M, T * D)
