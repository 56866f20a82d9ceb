"""The squared error of the reconstruction, and its gradient, each one pass that keeps nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Target(NamedTuple):
    """activations (B, 2, L, D) as they are stored, whose second half is the target; its normalisation; and the unit."""

    activations: Tensor
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
    return (error * (grad * (2 / (y.shape[0] * y.shape[2]))).unsqueeze(1)).to(y.dtype)


def sum_over_tokens(grad_y: Tensor, dtype: torch.dtype) -> Tensor:
    """grad_y (B, L, D) -> the gradient to b_dec (L, D)."""
    return grad_y.sum(0, dtype=dtype)


def _error(y: Tensor, b_dec: Tensor, target: Target) -> Tensor:
    error = y + b_dec - (target.activations[:, 1].to(b_dec.dtype) - target.mean) / target.sd
    return error if target.unit is None else error * target.unit


class ErrorKernels(NamedTuple):
    """What the squared error takes."""

    mean_squares: Callable[[Tensor, Tensor, Target], Tensor] = mean_squares
    gradient: Callable[[Tensor, Tensor, Target, Tensor], Tensor] = mean_squares_gradient
    sum_over_tokens: Callable[[Tensor, torch.dtype], Tensor] = sum_over_tokens

    def compiled(self) -> ErrorKernels:
        """Each compiled to one pass over memory."""
        return ErrorKernels(
            torch.compile(self.mean_squares, dynamic=False),
            torch.compile(self.gradient, dynamic=False),
            torch.compile(self.sum_over_tokens, dynamic=False),
        )


class SquaredError(torch.autograd.Function):
    """`mean_squares`. The error itself, in float32 the largest tensor of a step, is computed again, not kept."""

    @staticmethod
    def forward(ctx, y: Tensor, b_dec: Tensor, target: Target, kernels: ErrorKernels) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(y, b_dec, *target)
        ctx.kernels = kernels
        return kernels.mean_squares(y, b_dec, target)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        y, b_dec, *target = ctx.saved_tensors
        grad_y = ctx.kernels.gradient(y, b_dec, Target(*target), grad)
        return grad_y, ctx.kernels.sum_over_tokens(grad_y, b_dec.dtype), None, None
