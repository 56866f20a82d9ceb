"""What the sparse step computes besides the encoder's products, on lists of the features that fire.

`reference` is torch, and the CPU's path; `gpu` launches the Triton kernels of `lists`, `rows` and `adam`. Both have the
same functions, of the same arguments. Two of these are Adam on the decoder's rows.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor


class Lists(NamedTuple):
    """The (feature, token) pairs of one layer that a step needs: those that fire, and those near their threshold.

    They are ordered by feature, then by token. Arrays have room for C pairs, of which the first offsets[F] count. Pairs
    beyond C are left out.
    """

    offsets: Tensor  # (F + 1,) int32: the pairs of feature f are offsets[f] .. offsets[f + 1] - 1
    tokens: Tensor  # (C,) int32
    features: Tensor  # (C,) int32
    values: Tensor  # (C,): the feature a; 0 where it does not fire, and beyond the last pair
    through: Tensor | None  # (C,): theta / bw near the threshold, else 0; None where thresholds are not learned.
    # Of a sampled pair, times the number of pairs that it stands for.
    penalty: Tensor  # (F,): the sum over tokens of tanh(scale * a)
    shrink: Tensor  # (F,): the sum over tokens of (1 - tanh(scale * a)^2) * a
    active: Tensor  # (F,): for how many tokens each feature fires


class ByToken(NamedTuple):
    """The pairs that fire, ordered by token, then by feature."""

    offsets: Tensor  # (B + 1,) int32
    features: Tensor  # (C,) int32
    values: Tensor  # (C,)


class PairGradients(NamedTuple):
    """To the pre-activations of pairs (C,), and to bias and threshold (F,), summed over tokens."""

    pre: Tensor
    bias: Tensor
    threshold: Tensor


class DecoderRows(NamedTuple):
    """One layer's decoder, its moments, and what is kept of it for the next step."""

    weight: Tensor  # (F, T, D)
    mean: Tensor  # (F, T, D)
    square: Tensor  # (F, T, D)
    norms: Tensor  # (F,): of the rows
    narrow: Tensor | None  # (F, T, D): the weight in the products' dtype
    last: Tensor  # (F,) int32: the step that each row was updated to


class AdamSteps(NamedTuple):
    """The steps of Adam so far. Those that were skipped do not count."""

    newest: Tensor  # () int32: 1, 2, ..
    sizes: Tensor  # (N, 2): of step n, lr / (1 - beta1^n) and 1 / sqrt(1 - beta2^n)
    betas: tuple[float, float]
    eps: float


class RowGradient(NamedTuple):
    """The gradient (grad + weight * through_norm) / divisor to a layer's decoder."""

    grad: Tensor  # (F, T, D)
    through_norm: Tensor  # (F,)
    divisor: Tensor  # (): for clipping and for the loss scale
    skip: Tensor  # () bool: leave everything as it is


def sampling(found: Tensor, capacity: int, sample: int | None, tokens: int) -> tuple[Tensor, Tensor]:
    """Of the pairs near their threshold that do not fire, the n-th is listed if (n + first) % every == 0, n = 0, 1, ..

    Returns every and first, () int64. Pairs that fire are always listed, and the others share what room they leave.
    `every` has no factor in common with the number of tokens: else, of features that are near their threshold for all
    tokens, the same tokens would be listed.

    sample: in [0, 2^24), as a fraction of `every`: over all of its values, each pair is listed once in `every` times.
    None lists all. found (2,) int64: pairs that fire, and others that are near their threshold.
    """
    fired, near = found.unbind()
    if sample is None:
        return torch.ones_like(near), torch.zeros_like(near)
    room = (capacity - fired).clamp_min(1)
    # Of 40 numbers in a row, one at least has no factor in common with a number below 2^32 (Jacobsthal's function).
    candidates = ((near + room - 1) // room).clamp_min(1) + torch.arange(40, device=near.device)
    shared = torch.gcd(candidates, torch.full_like(candidates, tokens)) > 1
    every = torch.where(shared, candidates[-1], candidates).min()
    return every, sample * every >> 24


def by_token(lists: Lists, tokens: int) -> ByToken:
    """Sort the pairs that fire by token. The sort is stable: the same order, and so the same sums, every time."""
    ordered, order = torch.where(lists.values != 0, lists.tokens, tokens).sort(stable=True)
    bounds = torch.arange(tokens + 1, dtype=torch.int32, device=ordered.device)
    offsets = torch.searchsorted(ordered, bounds, out_int32=True)
    return ByToken(offsets, lists.features[order], lists.values[order])


def kernels_for(device: torch.device) -> ModuleType:
    """Triton's on CUDA, torch's elsewhere."""
    return importlib.import_module(f"{__name__}.{'gpu' if device.type == 'cuda' else 'reference'}")
