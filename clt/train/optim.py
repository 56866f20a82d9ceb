"""The schedules, as pure functions of the step; the precision; and the update of the weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from clt.cpu import multiplies_bf16
from clt.errors import UserError
from clt.model.rowadam import RowAdam
from clt.model.terms import value_names
from clt.model.transcoder import feature_dim
from clt.train.distributed import World
from clt.train.spec import OptimConfig

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def learning_rate(step: int, steps: int, config: OptimConfig) -> float:
    """Rate of step 0, 1, ..: a linear warm-up from 0, constant, and a linear decay that would reach 0 at `steps`."""
    warmup, decay = config.warmup * steps, config.decay * steps
    rise = (step + 1) / warmup if step + 1 < warmup else 1.0
    fall = (steps - step) / decay if steps - step < decay else 1.0
    return config.lr * min(rise, fall)


def autocast_dtype(precision: str, device: torch.device) -> torch.dtype:
    """The dtype of matrix products; `auto` is bf16 where the hardware multiplies bf16 natively, else float32."""
    if precision != "auto":
        return DTYPES[precision]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float32
    return torch.bfloat16 if multiplies_bf16() else torch.float32


def make_adam(
    parameters: dict[str, nn.Parameter], config: OptimConfig, steps: int, dtype: torch.dtype
) -> tuple[torch.optim.Adam, RowAdam | None]:
    """The optimizer of a run of so many steps, and what updates W_dec in its place, whose moments it holds too.

    parameters: the transcoder's, by name, frozen ones too; dtype: of the matrix products. Raises UserError when
    RowAdam would have W_dec of some layers to update, but not of all.
    """
    beta1, beta2 = config.betas
    trained = {name: p for name, p in parameters.items() if p.requires_grad}
    decoders = [p for name, p in trained.items() if name.startswith("W_dec.") and config.decoder != "torch"]
    frozen = [name for name in parameters if name.startswith("W_dec.") and name not in trained]
    if decoders and frozen:
        raise UserError(
            f"optim.decoder is {config.decoder} but {', '.join(frozen)} is frozen, and other layers' W_dec is trained; "
            "wanted W_dec trained in all layers or in none, or optim.decoder=torch"
        )
    others = [p for name, p in trained.items() if not (decoders and name.startswith("W_dec."))]
    adam = torch.optim.Adam(others, config.lr, (beta1, beta2), config.eps, fused=True)
    if not decoders:
        return adam, None
    return adam, RowAdam(decoders, adam, steps, dtype, lazy=config.decoder == "lazy")


NEVER = 2**62  # the step of a failure that did not happen


class Update:
    """The optimizer's step with clipping, loss scale and the check for non-finite numbers, all on the device.

    The fused Adam kernel divides gradients by a number, and skips a step, as device memory says: clipping and unscaling
    cost no pass over the gradients, and nothing waits for the device.

    A step whose gradient is not finite never changes the weights. With a loss scale above 1 (fp16) that is an
    overflow, and the scale is halved, unless a rank's loss was not finite; otherwise it is a failure, recorded in
    `failed_at`, and with `stop` no later step changes the weights either.

    All ranks see the same failures, through the sums that they make anyway: a loss that is not finite makes the whole
    gradient nan, that of b_dec in every element, and the norm of a shard's gradient is summed over the feature shards.
    """

    def __init__(
        self,
        optimizer: torch.optim.Adam,
        parameters: dict[str, nn.Parameter],
        clip_norm: float | None,
        sum_shards: Callable[[Tensor], Tensor],
        *,
        floor: float,
        fp16: bool,
        stop: bool,
        row_adam: RowAdam | None = None,
    ) -> None:
        """parameters: the transcoder's, by name; sum_shards: sums a tensor over the feature shards, in place; floor:
        the least value of learned thresholds; row_adam: updates W_dec, which `optimizer` then has no part in."""
        self.names = [f"train_{name}" for name in value_names()] + ["grad_norm"]
        self.sharded = [p for name, p in parameters.items() if feature_dim(name) is not None]
        self.replicated = [p for name, p in parameters.items() if feature_dim(name) is None]
        self.threshold, self.floor = parameters.get("threshold"), floor  # jumprelu alone learns it
        self.b_dec = parameters["b_dec"]
        self.optimizer, self.clip_norm, self.sum_shards = optimizer, clip_norm, sum_shards
        self.fp16, self.stop, self.row_adam, device = fp16, stop, row_adam, self.sharded[0].device
        self.scale = torch.tensor(2.0**16 if fp16 else 1.0, device=device)
        self.good_steps = torch.zeros((), device=device)
        self.skipped = torch.zeros((), dtype=torch.int64, device=device)
        self.failed_at = torch.full((len(self.names),), NEVER, device=device)
        self.excusable = torch.tensor([name != "train_mse" for name in self.names], device=device)

    def tensors(self) -> dict[str, Tensor]:
        """The state that a checkpoint must hold."""
        return {"loss_scale": self.scale, "good_steps": self.good_steps, "skipped_steps": self.skipped}

    @torch.no_grad()
    def __call__(self, step: int, lr: float, values: Tensor, expected: Tensor | None = None) -> Tensor:
        """Apply the gradients of step 1, 2, .. at a learning rate; returns their global norm () before clipping.

        values: this rank's losses, by `value_names`, to tell where a failure came from. expected () bool, the same on
        all ranks: the step is left out, and is no failure.
        """
        own = _square_norm(self.sharded)
        if self.row_adam is not None:
            own = (own + self.row_adam.square_through_norms()).clamp_min(0)
        squares, lost = self.sum_shards(torch.stack([own, self._lost_loss().to(own.dtype)]))
        scaled = (squares + _square_norm(self.replicated)).sqrt()
        norm = scaled / self.scale
        finite = scaled.isfinite()
        failed = torch.cat([~values.isfinite(), (~finite & ((self.scale <= 1) | (lost > 0))).view(1)])
        if expected is not None:
            failed = failed & ~(expected & self.excusable)  # a squared error that is nan comes from the data
        self.failed_at = torch.where(failed & (self.failed_at == NEVER), step, self.failed_at)
        skip = ~finite
        if self.stop:
            skip = skip | (self.failed_at != NEVER).any()
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        clip = torch.ones_like(norm) if self.clip_norm is None else (norm / self.clip_norm).clamp_min(1)
        if self.row_adam is not None:
            self.row_adam.update(lr, skip, self.scale * clip)
        if self.fp16:
            self._adam(skip, self.scale * clip)
        else:
            # Given a scale, the kernel also writes the gradients back: 32 bytes per parameter instead of 28. So a step
            # that needs no clipping is taken without one. The device decides, and skips the other of the two calls.
            self._adam(skip | (clip > 1), None)
            if self.clip_norm is not None:
                self._adam(skip | (clip == 1), clip)
        if self.threshold is not None:
            self.threshold.clamp_min_(self.floor)
        self.skipped += skip
        if self.fp16:
            self.good_steps = torch.where(finite, self.good_steps + 1, 0)
            grown = torch.where(self.good_steps >= 2000, self.scale * 2, self.scale)
            self.good_steps = self.good_steps % 2000
            self.scale = torch.where(finite | (lost > 0), grown, (self.scale / 2).clamp_min(1))
        return norm

    def _lost_loss(self) -> Tensor:
        """Whether the loss was not finite on a rank that shares this rank's gradient. An overflow spares elements."""
        assert self.b_dec.grad is not None
        return self.b_dec.grad.isnan().all()

    def _adam(self, skip: Tensor, scale: Tensor | None) -> None:
        # The two attributes through which torch's own GradScaler talks to a fused optimizer.
        self.optimizer.found_inf, self.optimizer.grad_scale = skip.float(), scale  # type: ignore[attr-defined]
        self.optimizer.step()


def check_finite(update: Update, world: World, store: str | Path) -> None:
    """Raise UserError on all ranks when a step failed on one; with `train.nonfinite=skip`, never."""
    first = (-world.everyone.max(-update.failed_at)).tolist()
    if min(first) != NEVER and update.stop:
        lr = update.optimizer.param_groups[0]["lr"]
        raise UserError(
            f"{update.names[first.index(min(first))]} was not finite at step {min(first)}; no weights changed since. "
            f"Look for bad rows with `clt inspect --verify {store}`, lower optim.lr (now {lr:.3g}), use "
            "train.precision=fp32, or leave such steps out with train.nonfinite=skip"
        )


def _square_norm(parameters: Sequence[Tensor]) -> Tensor:
    return torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]).square()
