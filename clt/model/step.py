"""A training step of all layers, forward and backward: encode, then write. clt/model/error.py has the error.

    product_s = x~_s @ W_enc[s]                                    Encode, all layers
    theta_s   by the activation's rule                             activations.theta, topk
    a_s       = fire(product_s + b_enc[s], theta_s)                Write, layer by layer
    y~_s      = [a_0 .. a_s] @ [W_dec[0 -> s]; ..; W_dec[s -> s]]
    y~_s     += x~_s @ W_skip[s]                                   Skip, all layers, after the sum over feature shards

Products run in x's dtype (bf16 under autocast) and add up in float32. On CPUs, matrices are laid out such that no
product has a transposed left factor, with which it takes twice as long. cuBLAS reads either way: there, products are
laid out as features are, tokens first, and nothing is transposed. Shapes are the same, only strides differ.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from clt.model.activations import NO_NORM, gate, gate_gradients
from clt.model.error import mean_squares, mean_squares_gradient, remainder, sum_over_tokens
from clt.model.normalization import Normalization
from clt.model.spec import CLTConfig, LossConfig
from clt.model.topk import count_above, maxima, scores_and_maxima


def normalized(norm: Normalization, activations: Tensor, dtype: torch.dtype) -> Tensor:
    """x~ (B, L, D) of activations (B, 2, L, D)."""
    return norm.input(activations[:, 0]).to(dtype)


def reads_transposed(x: Tensor) -> bool:
    """Whether products on x's device take a transposed left factor as fast as any."""
    return x.is_cuda


def transposed(x: Tensor) -> Tensor:
    """x (M, N) as a contiguous (N, M)."""
    return x.t().contiguous()


def transpose_into(out: Tensor, x: Tensor) -> None:
    """out (N, M) = x (M, N), transposed."""
    out.copy_(x.t())


def gate_into(features: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """`gate`, its features into features (B, F). The sums are returned."""
    gated = gate(*arguments)
    transpose_into(features, gated.features)
    return gated[1:]


def add_scaled_rows(out: Tensor, x: Tensor, weight: Tensor, scale: Tensor) -> None:
    """out (F, T, D) = x (F, T, D) + weight (F, T, D) * scale (F, 1, 1), in out's dtype."""
    torch.addcmul(x, weight, scale, out=out)


def make_kernels(compile: bool) -> SimpleNamespace:
    """What a step does besides matrix products, by name: each is one pass over memory once it is compiled.

    Dynamo compiles each for up to eight sizes of F or B in one process. Bits must not depend on timing: on CUDA,
    inductor would choose a reduction's block size by measuring in every process, and a resumed run would add up in
    another order. The options travel with each kernel, because settings of torch._inductor.config are per thread and
    the backward pass of CUDA compiles in autograd's own.
    """
    kernels: list[Callable[..., Any]] = [normalized, gate, gate_into, gate_gradients, transposed, transpose_into]
    kernels += [add_scaled_rows, mean_squares, mean_squares_gradient, remainder, sum_over_tokens]
    kernels += [scores_and_maxima, maxima, count_above]
    if compile:
        # Inductor warns of every kernel that reads float16 and writes bf16; in between, it computes in float32.
        warnings.filterwarnings("ignore", "bf16 and fp16 are mixed in the scheduler node")
        pinned: dict[str, Any] = {"dynamic_scale_rblock": False}
        if "deterministic" in torch._inductor.list_options():  # type: ignore[attr-defined]
            pinned["deterministic"] = True  # since torch 2.10
        # The shape of decoders differs by layer, and that of candidates by step: one kernel serves all shapes.
        dynamic = (add_scaled_rows, count_above)
        kernels = [torch.compile(kernel, dynamic=kernel in dynamic, options=pinned) for kernel in kernels]
    return SimpleNamespace(**{kernel.__name__: kernel for kernel in kernels})


class Step(NamedTuple):
    """What all layers of a step share."""

    clt: CLTConfig
    loss: LossConfig
    kernels: SimpleNamespace
    gradient_memory: Callable[[Tensor], Tensor | None]
    """Gives the memory to write a parameter's gradient into, which is its `.grad` already; or None, for autograd's."""
    decoders: Sequence[Tensor]  # W_dec.{s} (F, T_s, D), or a copy in x's dtype
    norms: Sequence[Tensor]  # L of (F,): of each feature's write vector
    dead: Tensor | None  # (L, F) bool
    tokens_first: bool  # products (F, B) are the transposed of contiguous (B, F)

    def left_factor(self, x: Tensor) -> Tensor:
        """x (M, N) transposed, for a product with it on the left."""
        return x.t() if self.tokens_first else self.kernels.transposed(x)


class Encode(torch.autograd.Function):
    """x~ (B, L, D) and W_enc (L, D, F) -> the products of all layers, L of (F, B), in x's dtype. x gets no gradient."""

    @staticmethod
    def forward(ctx, x: Tensor, W_enc: Tensor, step: Step) -> tuple[Tensor, ...]:  # type: ignore[override]
        ctx.save_for_backward(x)
        ctx.weight, ctx.step = W_enc, step  # not what is saved, which may come back as another object
        layers = zip(W_enc.unbind(), x.unbind(1))
        if step.tokens_first:
            return tuple((of_layer @ weight.to(x.dtype)).t() for weight, of_layer in layers)
        return tuple(weight.to(x.dtype).t().contiguous() @ of_layer.t() for weight, of_layer in layers)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grad_products: Tensor):  # type: ignore[override]
        (x,), memory = ctx.saved_tensors, ctx.step.gradient_memory(ctx.weight)
        grad_W_enc = torch.empty_like(ctx.weight) if memory is None else memory
        for out, of_layer, grad in zip(grad_W_enc, x.unbind(1), grad_products):
            out.copy_(ctx.step.left_factor(of_layer) @ grad.t())
        return None, grad_W_enc if memory is None else None, None


class Write(torch.autograd.Function):
    """Fires the features of layer s, then computes y~[:, s]: every layer that writes to s has fired by now.

    product (F, B) of Encode; b_enc (F,); theta broadcasts against (F, B); W_dec (F, T, D) is step.decoders[s]. With
    `row_sums` (2, F), the gradient to W_dec leaves out the part through the rows' norms, row * grad(row_sums[0]), and
    grad(row_sums[1]) is the dot product of each row with the gradient that W_dec does get. Features (B, L * F) and
    y~ (B, L, D) are filled in place, from the first layer to the last; y~ is of the products' dtype, or of float32
    where the partial y~ of several shards are still to be added up. Returns y~, the sums over features and tokens of
    the penalty () and of the pre-activation loss (), and for how many tokens each feature fires (F,).

    There is one such function per layer, not one for all, so that DDP can sum a layer's decoder gradient over the ranks
    while the earlier layers' are computed. (The encoder is one tensor for all layers, so its gradient comes last.)
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx,
        y: Tensor,
        product: Tensor,
        b_enc: Tensor,
        theta: Tensor,
        W_dec: Tensor,
        features: Tensor,
        s: int,
        step: Step,
        row_sums: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        F, _, D = W_dec.shape
        dead = None if step.dead is None else step.dead[s]
        arguments, own = (product, b_enc, theta, step.norms[s], dead, step.clt, step.loss), slice(s * F, (s + 1) * F)
        if step.tokens_first:
            sums = step.kernels.gate_into(features[:, own], *arguments)
        else:  # in two passes: CPUs are slow at writing the one's result in the other's order
            gated = step.kernels.gate(*arguments)
            step.kernels.transpose_into(features[:, own], gated.features)
            sums = gated[1:]
        writers = [r for r in range(s + 1) if s - r < step.decoders[r].shape[1]]
        to_s = product.new_empty(len(writers), F, D)
        for block, r in zip(to_s, writers):
            block.copy_(step.decoders[r][:, s - r])
        multiply_into(y[:, s], features[:, writers[0] * F : (s + 1) * F], to_s)
        ctx.save_for_backward(product, b_enc, theta, W_dec, step.norms[s])
        ctx.weight, ctx.s, ctx.step = W_dec, s, step
        ctx.mark_dirty(y)
        sparsity, pre_activation, active = sums
        ctx.mark_non_differentiable(active)
        return y, sparsity, pre_activation, active

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y: Tensor, grad_sparsity: Tensor, grad_pre_activation: Tensor, _):  # type: ignore[override]
        product, b_enc, theta, W_dec, norm = ctx.saved_tensors
        T, step, apart = W_dec.shape[1], ctx.step, ctx.needs_input_grad[8]
        dead = None if step.dead is None else step.dead[ctx.s]
        written = grad_y[:, ctx.s : ctx.s + T].to(product.dtype).flatten(1)  # (B, T * D)
        factor = step.decoders[ctx.s].flatten(1).to(product.dtype)
        grad_features = (written @ factor.t()).t() if step.tokens_first else factor @ written.t()  # (F, B)
        del factor  # as large as the decoder
        grad = step.kernels.gate_gradients(
            product, b_enc, theta, norm, dead, step.clt, step.loss, grad_features, grad_sparsity, grad_pre_activation,
            apart,
        )  # fmt: skip
        grad_W_dec = grad_sums = None
        if ctx.needs_input_grad[4]:  # else it is frozen
            # A zero row's subgradient is 0; computed, it would be nan under a loss scale.
            through_norm = (grad.norm / norm).masked_fill_(norm < NO_NORM, 0)
            memory = step.gradient_memory(ctx.weight)
            grad_W_dec = torch.empty_like(W_dec) if memory is None else memory
            weight = W_dec.detach()  # a parameter's sizes count as fixed: each layer would have its own kernel compiled
            if apart and weight.dtype == written.dtype:
                torch.mm(grad.features, written, out=grad_W_dec.flatten(1))
                grad_sums = torch.stack([through_norm, grad.dots])
            elif apart:
                grad_W_dec.copy_((grad.features @ written).view_as(weight))
                grad_sums = torch.stack([through_norm, grad.dots])
            else:
                through_features = (grad.features @ written).view_as(weight)
                step.kernels.add_scaled_rows(grad_W_dec, through_features, weight, through_norm.view(-1, 1, 1))
            grad_W_dec = grad_W_dec if memory is None else None
        grad_theta = grad.threshold.view_as(theta) if ctx.needs_input_grad[3] else None
        return grad_y, grad.pre, grad.bias, grad_theta, grad_W_dec, None, None, None, grad_sums


def multiply_into(out: Tensor, features: Tensor, weights: Tensor) -> None:
    """out (B, D) = features (B, R * F) @ weights (R, F, D), added up in float32 and rounded once, to out's dtype."""
    if out.dtype == features.dtype:
        torch.mm(features, weights.flatten(0, 1), out=out)
    elif out.is_cuda:
        out.copy_(torch.mm(features, weights.flatten(0, 1), out_dtype=out.dtype))
    else:  # CPUs have no product of narrow numbers with a wide result
        out.zero_()
        for block, weight in zip(features.split(weights.shape[1], dim=1), weights):
            out.addmm_(block.to(out.dtype), weight.to(out.dtype))


class Skip(torch.autograd.Function):
    """Adds x~[:, t] @ W_skip[t] to y~[:, t] (B, D) of every layer t, in place. W_skip (L, D, D); x~ gets no gradient.

    Every feature shard has the whole of W_skip, and y~ is already summed over the shards. So each of them adds the same
    to the same: the product counts once, and its gradient needs no sum over shards.
    """

    @staticmethod
    def forward(ctx, y: Tensor, x: Tensor, W_skip: Tensor, step: Step) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x)
        ctx.weight, ctx.step = W_skip, step
        written = y.new_empty(y.shape[0], y.shape[2])
        for out, of_layer, weight in zip(y.unbind(1), x.unbind(1), W_skip.to(x.dtype).split(1)):
            multiply_into(written, of_layer, weight)
            out += written
        ctx.mark_dirty(y)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y: Tensor):  # type: ignore[override]
        if not ctx.needs_input_grad[2]:  # it is frozen
            return grad_y, None, None, None
        (x,), memory = ctx.saved_tensors, ctx.step.gradient_memory(ctx.weight)
        grad_W_skip = torch.empty_like(ctx.weight) if memory is None else memory
        for out, of_layer, grad in zip(grad_W_skip, x.unbind(1), grad_y.unbind(1)):
            out.copy_(ctx.step.left_factor(of_layer) @ grad.to(x.dtype))
        return grad_y, None, grad_W_skip if memory is None else None, None
