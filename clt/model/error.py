"""The squared error of y~, its gradient, and what it leaves of the target."""

from __future__ import annotations

from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch import Tensor


class Target(NamedTuple):
    """What y~ should be, and how the error is measured."""

    activations: Tensor  # (B, 2, L, D) as they are stored, whose second half is the target
    mean: Tensor  # (L, D)
    sd: Tensor  # (L, 1) or (L, D)
    unit: Tensor | None  # of the error, (L, 1) or (L, D) normalised target units; None: 1


def mean_squares(y: Tensor, b_dec: Tensor, target: Target) -> Tensor:
    """The mean square of the error per layer, (L,): of y~ (B, L, D) and b_dec (L, D)."""
    return _error(y, b_dec, target).square().mean(2).mean(0)


def mean_squares_gradient(y: Tensor, b_dec: Tensor, target: Target, grad: Tensor) -> Tensor:
    """The gradient to y~ (B, L, D), in its dtype, of that to the mean squares (L,)."""
    error = _error(y, b_dec, target)
    if target.unit is not None:
        error = error * target.unit
    # Contiguous, as `Write` flattens it, also where y~ is laid out by layers.
    return (error * (grad * (2 / (y.shape[0] * y.shape[2]))).unsqueeze(1)).to(y.dtype).contiguous()


def remainder(y: Tensor, b_dec: Tensor, target: Target) -> Tensor:
    """What y~ (B, L, D) and b_dec leave of the target, in units of the error, (B, L, D) in b_dec's dtype."""
    return -_error(y, b_dec, target)


def sum_over_tokens(grad_y: Tensor, dtype: torch.dtype) -> Tensor:
    """grad_y (B, L, D) -> the gradient to b_dec (L, D)."""
    return grad_y.sum(0, dtype=dtype)


def _error(y: Tensor, b_dec: Tensor, target: Target) -> Tensor:
    error = y + b_dec - (target.activations[:, 1].to(b_dec.dtype) - target.mean) / target.sd
    return error if target.unit is None else error * target.unit


class SquaredError(torch.autograd.Function):
    """`mean_squares`. The error itself, in float32 the largest tensor of a step, is computed again, not kept."""

    @staticmethod
    def forward(ctx, y: Tensor, b_dec: Tensor, target: Target, kernels: SimpleNamespace) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(y, b_dec, *target)
        ctx.kernels = kernels
        return kernels.mean_squares(y, b_dec, target)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        y, b_dec, *target = ctx.saved_tensors
        grad_y = ctx.kernels.mean_squares_gradient(y, b_dec, Target(*target), grad)
        return grad_y, ctx.kernels.sum_over_tokens(grad_y, b_dec.dtype), None, None
