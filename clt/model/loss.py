"""The objective: squared error and the named terms, each a mean over tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from clt.model.error import SquaredError, Target
from clt.model.rowadam import RowAdam
from clt.model.sparse import SparseEncode, SparseWrite, count, draw, needed, select
from clt.model.spec import LossConfig
from clt.model.step import Encode, Skip, Step, Write, make_kernels, reads_transposed
from clt.model.terms import TERMS, Coefficients, TermInputs
from clt.model.topk import ScoreInputs, batch_threshold, token_thresholds
from clt.model.transcoder import CrossLayerTranscoder, unsharded


class Losses(NamedTuple):
    """What one batch costs. All are means over its tokens; scalars unless a shape is given."""

    total: Tensor
    values: dict[str, Tensor]  # the squared error as `mse`, and each of TERMS, without their coefficients
    mse_per_layer: Tensor  # (L,)
    l0_per_layer: Tensor  # (L,)
    fired: Tensor  # (L, F) bool: features that fired at least once
    threshold: Tensor  # that of the scores of all layers, with `batchtopk`; else 0
    # If wanted, (L,) int64: the pairs of a feature and a token that fire or are near their threshold, and those of them
    # that must have room for a sparse step.
    listed: Tensor | None = None
    needed: Tensor | None = None


class Written(NamedTuple):
    """What the features of all layers write."""

    y: Tensor  # y~ (B, L, D), without the bias and the skip
    sum_shards: Callable[[Tensor], Tensor]  # what is left to do to y~ for its sum over shards
    products: tuple[Tensor, ...]  # as in TermInputs; none of the sparse step
    sums: list[list[Tensor]]  # by layer, as `Write` returns them
    threshold: Tensor  # as in Losses
    found: Tensor | None  # (L, 2): pairs that fire, and others that are near their threshold


class SumOverShards(torch.autograd.Function):
    """Adds up, in place, the partial reconstructions of all shards.

    Every shard then computes the same loss from the same sum, so that the gradient to its own part is the sum's.
    """

    @staticmethod
    def forward(ctx, y: Tensor, sum_shards: Callable[[Tensor], Tensor]) -> Tensor:  # type: ignore[override]
        ctx.mark_dirty(y)
        return sum_shards(y)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        return grad, None


def wait_for(begun: Sequence[Callable[[], object]], y: Tensor) -> Tensor:
    """y~, when the sums over shards that were begun are in it."""
    for wait in begun:
        wait()
    return y


class Objective(nn.Module):
    """loss = MSE + the sum over TERMS of coefficient * value.

    MSE is over tokens, layers and dimensions, in normalised target units (`target_scale="layer"`) or in the model's
    (`"none"`). `compile` compiles what works element by element; matrix products are libraries' calls either way.
    """

    def __init__(self, transcoder: CrossLayerTranscoder, loss: LossConfig, *, compile: bool = False) -> None:
        super().__init__()
        self.transcoder, self.loss = transcoder, loss
        self.kernels = make_kernels(compile)
        self.capacity: int | None = None  # pairs a layer that the sparse step has room for; None: the step is dense
        self.count_pairs = False  # in dense steps, for `Losses.listed`
        self.sampling: int | None = None  # with the number of the step: pairs that do not fire are sampled to fit
        self.gradient_memory: Callable[[Tensor], Tensor | None] = lambda parameter: None  # autograd makes it
        self.sum_ranks: Callable[[Tensor], Tensor] = unsharded  # in place, over all ranks, for `batchtopk`
        self.row_adam: RowAdam | None = None  # what updates W_dec, where it is not torch's Adam
        # As the transcoder's `sum_shards`, but only begins, and returns what waits: for y~ of a layer while the next
        # ones are computed. None where there is nothing to gain.
        self.begin_sum: Callable[[Tensor], Callable[[], object]] | None = None

    def forward(
        self,
        activations: Tensor,
        coefficients: Coefficients,
        k: float | None = None,
        dead: Tensor | None = None,
    ) -> Losses:
        """activations (B, 2, L, D) of any float dtype; coefficients: of each of TERMS in this step.

        k: in place of the config's, while it falls. With `batchtopk` all ranks call this, and k counts over them all.
        dead (L, F) bool: for the terms of dead features.
        """
        clt, norm, device = self.transcoder, self.transcoder.normalization, activations.device.type
        (B, _, L, _), exact = activations.shape, clt.b_dec.dtype
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else exact
        with torch.autocast(device, enabled=False):
            x = self.kernels.normalized(norm, activations, dtype)
            with torch.no_grad():  # the gradient through a norm is part of Write's
                if self.row_adam is None:
                    decoders, norms = list(clt.W_dec), [clt.norm(layer) for layer in range(L)]
                else:
                    decoders, norms = self.row_adam.read(all_rows=self.capacity is None)
            # The kernels that look for pairs go by features.
            tokens_first = reads_transposed(x) and self.capacity is None and not self.count_pairs
            step = Step(
                clt.spec, self.loss, self.kernels, self.gradient_memory, decoders, norms, dead, tokens_first
            )  # fmt: skip
            written = self._dense(x, step, k) if self.capacity is None else self._sparse(x, step, k, self.capacity)
            y, sum_shards, products, sums, threshold, found = written
            if clt.shards > 1:
                y = SumOverShards.apply(y, sum_shards)
            if clt.W_skip is not None:
                y = Skip.apply(y, x, clt.W_skip, step)
            unit = norm.target_sd if self.loss.target_scale == "none" else None
            target = Target(activations, norm.target_mean, norm.target_sd, unit)
            mse_per_layer = SquaredError.apply(y, clt.b_dec, target, self.kernels)  # type: ignore[misc]
            remainder = self.kernels.remainder(y.detach(), clt.b_dec.detach(), target) if self.loss.aux else None
            penalties, lows, active = (torch.stack(of_layers) for of_layers in zip(*sums))
            mse = mse_per_layer.mean()
            inputs = TermInputs(clt, self.loss, B, products, penalties, lows, remainder, unit, dead)  # type: ignore[arg-type]
            total, values = mse, {"mse": mse.detach()}
            for name, term in TERMS.items():
                value = term(inputs)
                total, values[name] = total + coefficients[name] * value, value.detach()
        pairs = () if found is None else (found.sum(1), needed(found, self.sampling is not None))
        return Losses(total, values, mse_per_layer.detach(), active.sum(1) / B, active > 0, threshold, *pairs)

    def _dense(self, x: Tensor, step: Step, k: float | None) -> Written:
        clt, (B, L, D) = self.transcoder, x.shape
        features = x.new_empty(B, L * clt.d_features)
        products = Encode.apply(x, clt.W_enc, step)
        threshold, by_layer = self._thresholds(products, step.norms, k)
        begin_sum = self.begin_sum if clt.shards > 1 else None
        strides = (L * D, D, 1) if begin_sum is None else (D, B * D, 1)  # each layer's is contiguous
        y = x.new_empty_strided((B, L, D), strides, dtype=clt.b_dec.dtype if clt.shards > 1 else x.dtype)
        sums, begun = [], []
        weights = zip(products, clt.b_enc.unbind(), by_layer, clt.W_dec)  # type: ignore[arg-type]
        for s, of_layer in enumerate(weights):
            row_sums = None if self.row_adam is None else self.row_adam.sums[s]
            y, *sums_of_layer = Write.apply(y, *of_layer, features, s, step, row_sums)  # type: ignore[misc]
            sums.append(sums_of_layer)
            # Nothing reads, saves or writes y~ of this layer until `wait_for`: no other layer's Write does.
            if begin_sum is not None:
                begun.append(begin_sum(y.detach()[:, s]))
        found = None
        if self.count_pairs:
            with torch.no_grad():
                layers = zip(products, clt.b_enc.unbind(), by_layer, step.norms)  # type: ignore[arg-type]
                found = torch.stack([count(*of_layer, step).sum(1) for of_layer in layers])
        sum_shards = clt.sum_shards if begin_sum is None else partial(wait_for, begun)
        return Written(y, sum_shards, products, sums, threshold, found)  # type: ignore[arg-type]

    def _sparse(self, x: Tensor, step: Step, k: float | None, capacity: int) -> Written:
        """As `_dense`, by lists of at most `capacity` pairs a layer; nan when a layer needs more."""
        clt = self.transcoder
        with torch.no_grad():
            products = Encode.apply(x, clt.W_enc, step)
        threshold, by_layer = self._thresholds(products, step.norms, k)  # type: ignore[arg-type]
        with torch.no_grad():
            layers = list(zip(products, clt.b_enc.unbind(), by_layer, step.norms))  # type: ignore[arg-type]
            counts, lists = [count(*of_layer, step) for of_layer in layers], []
            if self.row_adam is not None:  # before `select`, which reads the norms
                self.row_adam.catch_up([of_layer.any(0) for of_layer in counts])
            for s, of_layer in enumerate(layers):
                sample = None if self.sampling is None else draw(self.sampling, s)
                lists.append(select(*of_layer, step, counts[s], capacity, sample))
            found = torch.stack([of_layer.sum(1) for of_layer in counts])
            too_many = needed(found, self.sampling is not None).max() > capacity
            spoiled = torch.where(too_many, torch.nan, clt.b_dec.new_zeros(()))
            del products, layers  # the largest tensors of the step
        if self.row_adam is not None:  # W_dec's gradient holds that through norms; DDP waits for one to each parameter
            spoiled = spoiled + 0 * torch.stack([*self.row_adam.sums]).sum()
        values = SparseEncode.apply(x, clt.W_enc, lists, step)
        y, sums = torch.zeros_like(x, dtype=clt.b_dec.dtype), []
        for s, of_layer in enumerate(zip(values, clt.b_enc.unbind(), by_layer, clt.W_dec, lists)):  # type: ignore[arg-type]
            y, penalty = SparseWrite.apply(y, *of_layer, s, step, x.dtype)  # type: ignore[misc]
            sums.append([penalty + spoiled, torch.zeros_like(penalty), lists[s].active])
        return Written(y, clt.sum_shards, (), sums, threshold, found)

    def _thresholds(
        self, products: tuple[Tensor, ...], norms: Sequence[Tensor], k: float | None
    ) -> tuple[Tensor, Sequence[Tensor]]:
        """`Losses.threshold`, and each layer's, which broadcasts against (F, B)."""
        clt, none = self.transcoder, self.transcoder.threshold.new_zeros(())
        match clt.spec.activation:
            case "jumprelu":
                return none, clt.threshold[0].unsqueeze(2).unbind()  # (F, 1)
            case "relu":
                return none, [none] * clt.n_layers
        k = clt.spec.k if k is None else k
        assert k is not None
        with torch.no_grad():
            by_norm: Sequence[Tensor | None] = norms if clt.spec.by_norm else [None] * clt.n_layers
            layers = [ScoreInputs(*of_layer) for of_layer in zip(products, clt.b_enc.unbind(), by_norm)]
            if clt.spec.activation == "topk":
                most = max(clt.spec.k or 0, clt.spec.k_start or 0)
                gather, kernels = clt.gather_shards, self.kernels
                return none, [token_thresholds(layer, round(k), most, gather, kernels) for layer in layers]
            threshold = batch_threshold(layers, k, self.sum_ranks, clt.shards, self.kernels)
        return threshold, [threshold] * clt.n_layers
