"""The controller that steers lambda to a wanted L0."""

from __future__ import annotations

import torch
from torch import Tensor

from clt.model.spec import LossConfig
from clt.train.metrics import Metrics

_GAIN = 15.0  # e-folds of lambda over a run, for each e-fold that L0 is above its curve
_MOST_GAIN = 0.02  # in one step: L0 follows lambda over some tens of steps
_AT_ONCE = 1.0  # e-folds of lambda at once, likewise
_FALL = 1.1  # L0 falls as lambda ** -1.1 along a linear ramp of a fixed lambda, as measured


class Steering:
    """Steers the coefficient of the sparsity penalty so that L0 over all layers ends at `loss.target_l0`.

    While lambda rises over `sparsity_ramp`, L0 shall follow the curve on which it would fall with the right lambda. A
    proportional-integral controller acts on log(L0 / curve); everything is a function of its state, on the device.
    """

    def __init__(self, loss: LossConfig, steps: int, most: float, device: torch.device) -> None:
        """most: an L0 above which the curve says nothing."""
        self.wanted, self.ramp, self.steps, self.most = loss.target_l0, loss.sparsity_ramp * steps, steps, most
        self.integral, self.excess = torch.zeros(2, device=device).unbind()

    def factor(self) -> Tensor | float:
        """What lambda is multiplied by in the next step; 1 where no L0 is wanted."""
        return 1.0 if self.wanted is None else (self.integral + _AT_ONCE * self.excess).exp()

    def update(self, step: int, metrics: Metrics) -> None:
        """Take in the L0 of step 1, 2, .. All ranks must call it."""
        if self.wanted is None:
            return
        risen = min(1.0, step / self.ramp) if self.ramp else 1.0
        curve = self.wanted / risen**_FALL
        if curve < self.most:
            excess = (metrics.l0().clamp_min(1e-3) / curve).log().clamp(-1, 1)
            self.excess.lerp_(excess, 0.1)
            # While lambda is small, L0 lags behind its curve whatever lambda is: little of that is taken in.
            self.integral += min(_GAIN / self.steps, _MOST_GAIN) * risen**2 * excess

    def tensors(self) -> dict[str, Tensor]:
        """The state that a checkpoint must hold."""
        return {} if self.wanted is None else {"steering_integral": self.integral, "steering_excess": self.excess}
