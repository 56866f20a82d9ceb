"""A step's metrics, on the device until they are logged; the run's speed; the coefficients of the loss."""

from __future__ import annotations

import math
import time

import torch
from torch import Tensor

from clt.files import or_null
from clt.model.loss import Losses
from clt.model.spec import CLTConfig, LossConfig
from clt.model.terms import TERMS, Coefficients, value_names
from clt.train.distributed import World
from clt.train.source import StoreSource


class Metrics:
    """This rank's addends of one step's metrics, over its micro-batches."""

    def __init__(self, world: World, n_layers: int, d_features: int) -> None:
        self.world, self.n_layers = world, n_layers
        self.names = [f"train_{name}" for name in value_names()]
        self.names += [f"{name}/layer_{layer}" for name in ("mse", "L0") for layer in range(n_layers)]
        self.sums = torch.zeros(len(self.names), device=world.device)
        self.fired = torch.zeros(n_layers, d_features, dtype=torch.bool, device=world.device)
        self.listed, self.most_needed = torch.zeros(2, dtype=torch.int64, device=world.device).unbind()
        self.thresholds: list[Tensor] = []  # `Losses.threshold` of each micro-batch: the same on all ranks

    def add(self, losses: Losses, share: float) -> None:
        """Count a micro-batch that is this share of the global batch."""
        # Every shard has the whole error, and its own part of everything else.
        mse, *terms = losses.values.values()
        shards = self.world.feature.size
        own = torch.stack([mse / shards, *terms])
        self.sums += share * torch.cat([own, losses.mse_per_layer / shards, losses.l0_per_layer])
        self.fired |= losses.fired
        self.thresholds.append(losses.threshold)
        if losses.listed is not None and losses.needed is not None:
            self.listed += losses.listed.sum()  # of all micro-batches
            self.most_needed = torch.maximum(self.most_needed, losses.needed.max())  # by a layer of a micro-batch

    @property
    def values(self) -> Tensor:
        """This rank's addends of the losses' values."""
        return self.sums[: len(value_names())]

    def l0(self) -> Tensor:
        """L0 () over all layers, ranks and shards."""
        return self.world.everyone.sum(self.sums[-self.n_layers :].sum())

    def read(self, coefficients: Coefficients) -> dict[str, float | None]:
        """The metrics over all ranks; None where one is not finite. Waits for the device."""
        values = dict(zip(self.names, self.world.everyone.sum(self.sums).tolist()))
        loss = values["train_mse"]
        for name, coefficient in coefficients.items():
            loss += float(coefficient) * values[f"train_{name}"]
        total_l0 = sum(value for name, value in values.items() if name.startswith("L0/"))
        return {name: or_null(value) for name, value in {"train_loss": loss, **values, "L0": total_l0}.items()}


class Speed:
    """How fast the run is between two readings, evaluations and checkpoints left out."""

    def __init__(self, step: int, busy_seconds: float, batch_tokens: int, source: StoreSource) -> None:
        self.busy_seconds, self.batch_tokens, self.source = busy_seconds, batch_tokens, source
        self.clock, self.step, self.stalled = time.perf_counter(), step, source.stalled

    def read(self, step: int) -> dict[str, float]:
        """tokens_per_second and data_wait_share since the last reading."""
        seconds, stalled = time.perf_counter() - self.clock, self.source.stalled - self.stalled
        tokens = (step - self.step) * self.batch_tokens
        self.busy_until(step)
        return {"tokens_per_second": tokens / seconds, "data_wait_share": stalled / seconds}

    def busy_until(self, step: int) -> float:
        """Seconds of the whole run until now."""
        self.busy_seconds += time.perf_counter() - self.clock
        self.skip(step)
        return self.busy_seconds

    def skip(self, step: int) -> None:
        """Leave out the time since the last reading."""
        self.clock, self.step, self.stalled = time.perf_counter(), step, self.source.stalled


def coefficients(step: int, steps: int, loss: LossConfig, factor: Tensor | float = 1.0) -> Coefficients:
    """The coefficient of each term in step 0, 1, ..: that of `sparsity` rises over its ramp, times `factor`."""
    ramp = loss.sparsity_ramp * steps
    return {name: getattr(loss, name) for name in TERMS} | {
        "sparsity": loss.sparsity * min(1.0, step / ramp if ramp else 1.0) * factor
    }


def steps_at_k(step: int, steps: int, clt: CLTConfig) -> int:
    """How many of the first `step` steps had the final k; not positive while k falls."""
    return step if clt.k_start is None else step - math.ceil(clt.k_ramp * steps)


def k_at(step: int, steps: int, clt: CLTConfig) -> float | None:
    """How many features fire per token in step 0, 1, ..: `k_start` falls linearly to `k`. None where there is no k."""
    if clt.k is None or clt.k_start is None:
        return clt.k
    ramp = clt.k_ramp * steps
    return clt.k + (clt.k_start - clt.k) * max(0.0, 1 - step / ramp if ramp else 0.0)
