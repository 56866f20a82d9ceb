"""One source layer of a training step, forward and backward: where the time goes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from clt.model.activations import Gated, Gradients, Rule, gate, gate_gradients

_NO_NORM = 1e-30  # a decoder row that is shorter counts as zero


def transposed(x: Tensor) -> Tensor:
    """x (M, N) as a contiguous (N, M)."""
    return x.t().contiguous()


def transpose_into(out: Tensor, x: Tensor) -> None:
    """out (N, M) = x (M, N), transposed."""
    out.copy_(x.t())


def add_scaled_rows(out: Tensor, x: Tensor, weight: Tensor, scale: Tensor) -> None:
    """out (F, T, D) = x + weight * scale, of x and weight (F, T, D) and scale (F, 1, 1), in out's dtype."""
    torch.addcmul(x, weight, scale, out=out)


class Kernels(NamedTuple):
    """What a layer does besides matrix products."""

    gate: Callable[..., Gated] = gate
    gate_gradients: Callable[..., Gradients] = gate_gradients
    transposed: Callable[[Tensor], Tensor] = transposed
    transpose_into: Callable[[Tensor, Tensor], None] = transpose_into
    add_scaled_rows: Callable[[Tensor, Tensor, Tensor, Tensor], None] = add_scaled_rows

    def compiled(self) -> Kernels:
        """Each compiled to one pass over memory, for up to eight sizes of F or B in one process (dynamo's limit).

        Decoders have a shape of their own in every layer.
        """
        return Kernels(
            torch.compile(self.gate, dynamic=False),
            torch.compile(self.gate_gradients, dynamic=False),
            torch.compile(self.transposed, dynamic=False),
            torch.compile(self.transpose_into, dynamic=False),
            torch.compile(self.add_scaled_rows, dynamic=True),
        )


class SourceLayer(torch.autograd.Function):
    """Layer s reads x~[:, s], and its features write to y~[:, s:].

        pre = x~_s @ W_enc + b_enc     a_s, penalty = gate(pre)     y~_t += a_s @ W_dec[s -> t] for every t >= s

    x (B, D): x~_s; W_enc (D, F), b_enc and theta (F,), W_dec (F, T, D) with T = L - s targets (1 without
    cross-layer writes). Products run in x's dtype (bf16 under autocast). y (B, L, D) of that dtype and features
    (B, L * F) are filled in place, from the first layer to the last. Returns y, the sums over features and tokens of
    penalty () and pre-activation loss (), and for how many tokens each feature is on (F,). x gets no gradient.

    Once a_s is known, so is all that writes to layer s, and y~_s is one product, which adds up in float32:

        y~_s = [a_0 .. a_s] @ [W_dec[0 -> s]; ..; W_dec[s -> s]]

    Row f of W_dec is everything feature f writes, so that the gradient of a_s is one product of it, and that of W_dec
    another. Matrices are laid out such that no product has a transposed left factor: on CPUs it takes twice as long.

    There is one such function per layer, not one for all, so that DDP can sum a layer's decoder gradient over the ranks
    while the earlier layers' are computed. (The encoder is one tensor for all layers, so its gradient comes last.)

    Where `home` (F, T, D) is given and W_dec has no gradient yet, it is written there instead of into new memory and
    becomes W_dec.grad; autograd gets none. In a bucket of DDP's, it is not copied again.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx,
        y: Tensor,
        x: Tensor,
        W_enc: Tensor,
        b_enc: Tensor,
        theta: Tensor,
        W_dec: Tensor,
        home: Tensor | None,
        features: Tensor,
        decoders: Sequence[Tensor],
        s: int,
        c: float,
        rule: Rule,
        kernels: Kernels,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        (F, _, D), dtype = W_dec.shape, x.dtype
        product = W_enc.to(dtype).t().contiguous() @ x.t()  # (F, B)
        norm = torch.linalg.vector_norm(W_dec.flatten(1), dim=1)  # (F,)
        gated = kernels.gate(product, b_enc, theta, c * norm, rule)
        kernels.transpose_into(features[:, s * F : (s + 1) * F], gated.features)
        writers = [r for r in range(s + 1) if s - r < decoders[r].shape[1]]
        to_s = x.new_empty(len(writers), F, D)
        for block, r in zip(to_s, writers):
            block.copy_(decoders[r][:, s - r])
        torch.mm(features[:, writers[0] * F : (s + 1) * F], to_s.flatten(0, 1), out=y[:, s])
        ctx.save_for_backward(x, product, b_enc, theta, W_dec, norm)
        ctx.weight, ctx.home = W_dec, home  # itself: what is saved may come back as another tensor
        ctx.s, ctx.c, ctx.rule, ctx.kernels = s, c, rule, kernels
        ctx.mark_dirty(y)
        ctx.mark_non_differentiable(gated.active)
        return y, gated.penalty, gated.low, gated.active

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y: Tensor, grad_penalty: Tensor, grad_low: Tensor, _):  # type: ignore[override]
        x, product, b_enc, theta, W_dec, norm = ctx.saved_tensors
        T, kernels = W_dec.shape[1], ctx.kernels
        written = grad_y[:, ctx.s : ctx.s + T].flatten(1)  # (B, T * D)
        grad_features = W_dec.flatten(1).to(x.dtype) @ written.t()  # (F, B)
        grad = kernels.gate_gradients(
            product, b_enc, theta, ctx.c * norm, ctx.rule, grad_features, grad_penalty, grad_low
        )
        grad_W_dec = None
        if ctx.needs_input_grad[5]:  # else it is frozen
            # A zero row's subgradient is 0; it must not come as 0 / tiny * a loss scale's overflow.
            through_norm = (ctx.c * grad.scale / norm).masked_fill_(norm < _NO_NORM, 0).view(-1, 1, 1)
            home = ctx.home if ctx.weight.grad is None else None  # to a gradient that is there, autograd adds
            grad_W_dec = torch.empty_like(W_dec) if home is None else home
            weight = W_dec.detach()  # a parameter's sizes count as fixed: each layer would have its own kernel compiled
            kernels.add_scaled_rows(grad_W_dec, (grad.features @ written).view_as(weight), weight, through_norm)
            if home is not None:
                ctx.weight.grad, grad_W_dec = home, None
        grad_W_enc = (kernels.transposed(x) @ grad.pre.t()).to(W_dec.dtype)
        return grad_y, None, grad_W_enc, grad.bias, grad.threshold, grad_W_dec, *[None] * 7
