"""Adam on the decoder's rows: one pass over a row does all that a step would go over it for."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from clt.model.kernels import AdamSteps, DecoderRows, RowGradient, kernels_for


class RowAdam(nn.Module):
    """Updates W_dec.{s} in place of torch's Adam, and keeps what a step reads: rows' norms, and W_dec in its dtype.

    The gradient to a row p is g + t * p, where t is that through the norm. The step leaves g in W_dec's gradient, and
    t and <g, p> in that of `sums`, a parameter without a value: so autograd adds them up over micro-batches, and DDP
    over ranks, as it does g.

        ||g + t p||^2 = ||g||^2 + 2 t <g, p> + t^2 ||p||^2                       for the norm that clips

    Lazy: a row whose gradient is zero is left as it is, and takes the steps that it has missed, one by one, before it
    is read: it catches up. It then has the same bits. Data ranks may differ in which rows are behind.
    """

    def __init__(
        self,
        weights: Sequence[nn.Parameter],
        optimizer: torch.optim.Adam,
        steps: int,
        dtype: torch.dtype,
        *,
        lazy: bool,
    ) -> None:
        """weights: W_dec of all layers; optimizer: of the other parameters, whose `state` is to hold the moments;
        steps: how many there will be at most; dtype: of the matrix products."""
        super().__init__()
        self.weights, self.state, self.lazy = list(weights), optimizer.state, lazy
        self.behind = False  # whether a row may be
        group, device = optimizer.param_groups[0], weights[0].device
        self.betas, self.eps = group["betas"], group["eps"]
        features = [len(weight) for weight in weights]
        self.sums = nn.ParameterList(weight.new_zeros(2, F) for weight, F in zip(weights, features))
        self.norms = [weight.new_empty(F) for weight, F in zip(weights, features)]
        self.last = [torch.zeros(F, dtype=torch.int32, device=device) for F in features]
        self.narrow = [None if weight.dtype == dtype else torch.empty_like(weight, dtype=dtype) for weight in weights]
        self.sizes = weights[0].new_zeros(steps + 1, 2)
        for weight in self.weights:
            moments = {key: torch.zeros_like(weight) for key in ("exp_avg", "exp_avg_sq")}
            self.state[weight] = {"step": torch.zeros((), device=device), **moments}
        self.take_in()

    @torch.no_grad()
    def take_in(self) -> None:
        """Compute norms and copies of weights that were changed from outside. No row is behind then."""
        self.behind = False
        for s, last in enumerate(self.last):
            last.copy_(self._taken())
            every = torch.ones_like(last, dtype=torch.bool)
            kernels_for(last.device).catch_up_rows(self._rows(s), self._steps(), every)

    @torch.no_grad()
    def read(self, *, all_rows: bool) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """W_dec (F, T, D) in the products' dtype, and the rows' norms (F,), by layer.

        Without `all_rows` they may be behind: call `catch_up` for the rows that are used.
        """
        if all_rows:
            self.catch_up()
        copies = [weight if narrow is None else narrow for weight, narrow in zip(self.weights, self.narrow)]
        return copies, self.norms

    @torch.no_grad()
    def catch_up(self, wanted: Sequence[Tensor] | None = None) -> None:
        """Have all rows, or the wanted ones (F,) bool of each layer, take the steps that they have missed.

        Once all have, this changes no weight until the next `update`.
        """
        if not self.behind:
            return
        for s, last in enumerate(self.last):
            behind = last != self._taken()
            if wanted is not None:
                behind &= wanted[s]
            kernels_for(last.device).catch_up_rows(self._rows(s), self._steps(), behind)
        self.behind = wanted is not None

    @torch.no_grad()
    def square_through_norms(self) -> Tensor:
        """What the gradient through norms adds to the square of the norm of W_dec's gradient, ()."""
        addends = []
        for of_layer, norm in zip(self.sums, self.norms):
            assert of_layer.grad is not None
            through, dots = of_layer.grad
            addends.append((through * (2 * dots + through * norm.square())).sum())
        return torch.stack(addends).sum()

    @torch.no_grad()
    def update(self, lr: float, skip: Tensor, divisor: Tensor) -> None:
        """A step at a learning rate, of the gradients divided by `divisor` (), unless `skip` () bool."""
        number = self._taken() + 1
        (beta1, beta2), exact = self.betas, number.double()
        sizes = torch.stack([lr / (1 - beta1**exact), (1 - beta2**exact).rsqrt()]).to(self.sizes.dtype)
        self.sizes.index_copy_(0, number.long().view(1), sizes.view(1, 2))  # those of a skipped step are overwritten
        for s, weight in enumerate(self.weights):
            of_layer = self.sums[s].grad
            assert weight.grad is not None
            assert of_layer is not None
            gradient = RowGradient(weight.grad, of_layer[0], divisor, skip)
            kernels_for(weight.device).adam_rows(self._rows(s), self._steps(number), gradient, self.lazy)
        for weight in self.weights:
            self.state[weight]["step"] += ~skip
        self.behind = self.lazy

    def _taken(self) -> Tensor:
        """How many steps were taken, () int32."""
        return self.state[self.weights[0]]["step"].int()

    def _steps(self, newest: Tensor | None = None) -> AdamSteps:
        return AdamSteps(self._taken() if newest is None else newest, self.sizes, self.betas, self.eps)

    def _rows(self, s: int) -> DecoderRows:
        weight, state = self.weights[s].detach(), self.state[self.weights[s]]
        return DecoderRows(weight, state["exp_avg"], state["exp_avg_sq"], self.norms[s], self.narrow[s], self.last[s])
