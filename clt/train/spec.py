"""How a run trains: the config sections `optim`, `train`, `eval`, `parallel`, `checkpoint`, `log` and `profile`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from clt.errors import UserError
from clt.model.spec import CLTConfig, LossConfig
from clt.ranges import DECAY_RATES, NOT_NEGATIVE, POSITIVE, SHARE


@dataclass
class TrainConfig:
    """The training loop."""

    steps: Annotated[int, POSITIVE] = 2000
    """Optimizer steps."""
    batch_tokens: Annotated[int, POSITIVE] = 4000
    """Tokens per optimizer step over all ranks."""
    accumulate: Annotated[int, POSITIVE] = 1
    """Micro-batches that a rank splits its share of a batch into."""
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """Autocast dtype; `auto` is bf16 where the hardware multiplies bf16 matrices natively, else fp32."""
    compile: bool = True
    """Compile what a step does element by element; its matrix products are library calls either way."""
    kernels: Literal["dense", "sparse", "sampled"] = "dense"
    """`sparse` multiplies what fires or is near its threshold, while that is little; `sampled`: of the near, a part."""
    nonfinite: Literal["stop", "skip"] = "stop"
    """At a loss or gradient that is not finite: stop the run, or leave out that step and go on."""


def check_train(train: TrainConfig, loss: LossConfig, clt: CLTConfig) -> None:
    """Raise UserError where `train.kernels` does not go with the loss or the activation."""
    dense_terms = [name for name in ("pre_activation", "aux") if getattr(loss, name)]
    if train.kernels != "dense" and dense_terms:
        term, value = f"loss.{dense_terms[0]}", getattr(loss, dense_terms[0])
        raise UserError(
            f"train.kernels is {train.kernels} but {term} is {value}, which has a gradient to features "
            f"that do not fire; wanted train.kernels=dense, or {term}=0"
        )
    if train.kernels == "sampled" and clt.activation != "jumprelu":
        raise UserError(
            f"train.kernels is sampled but clt.activation is {clt.activation}, which learns no thresholds, so "
            "there is nothing to sample; wanted train.kernels=sparse"
        )


@dataclass
class OptimConfig:
    """Adam and its schedule."""

    lr: Annotated[float, POSITIVE] = 1e-3
    """Peak learning rate."""
    betas: Annotated[list[float], DECAY_RATES] = field(default_factory=lambda: [0.9, 0.999])
    """Adam's two moment decay rates."""
    eps: Annotated[float, NOT_NEGATIVE] = 1e-8
    """Adam's epsilon."""
    warmup: Annotated[float, SHARE] = 0.0
    """Share of the run's steps over which the learning rate rises linearly from 0."""
    decay: Annotated[float, SHARE] = 0.0
    """Share of the run's steps, at its end, over which the learning rate falls linearly to 0."""
    clip_norm: Annotated[float | None, POSITIVE] = 1.0
    """Clip the gradient's global norm to this; null does not clip."""
    decoder: Literal["torch", "fused", "lazy"] = "torch"
    """Adam of W_dec: `fused` takes one pass a row, on CUDA; `lazy` too, but rows without gradient wait till read."""


def check_optim(optim: OptimConfig, train: TrainConfig, loss: LossConfig, clt: CLTConfig) -> None:
    """Raise UserError where `optim.decoder` does not go with the rest."""
    if optim.decoder != "torch" and loss.aux:
        raise UserError(
            f"optim.decoder is {optim.decoder} but loss.aux is {loss.aux}, whose part of the gradient's norm it does "
            "not know; wanted optim.decoder=torch, or loss.aux=0"
        )
    if optim.decoder == "lazy" and train.kernels == "dense":
        raise UserError(
            "optim.decoder is lazy but train.kernels is dense, which reads all rows in every step; wanted "
            "train.kernels=sparse, or optim.decoder=fused"
        )
    if optim.decoder == "lazy" and clt.by_norm:
        raise UserError(
            "optim.decoder is lazy but clt.by_norm is true, which reads all rows' norms in every step; wanted "
            "optim.decoder=fused, or clt.by_norm=false"
        )


@dataclass
class EvalConfig:
    """Evaluation during and after training."""

    every: Annotated[int, NOT_NEGATIVE] = 1000
    """Steps between evaluations; 0 evaluates only at the end."""
    replacement_tokens: Annotated[int, NOT_NEGATIVE] = 32_768
    """Held-out tokens on which the replacement model is compared with the original; 0 leaves it out."""
    dead_window: Annotated[int, POSITIVE] = 1_000_000
    """A feature is dead when it fired on none of this many most recent training tokens."""


@dataclass
class ParallelConfig:
    """How the ranks share the work. A run may resume in another layout."""

    feature_shards: Annotated[int, POSITIVE] = 1
    """Ranks that the features of one transcoder are split over; the other factor of the ranks splits the batch."""
    timeout_seconds: Annotated[float, POSITIVE] = 1800.0
    """A rank that makes no progress for this long ends the job, with a message that names it."""


@dataclass
class CheckpointConfig:
    """Checkpoints and resumption."""

    every: Annotated[int, NOT_NEGATIVE] = 1000
    """Steps between checkpoints; 0 writes only the last."""
    keep: Annotated[int, POSITIVE] = 2
    """Newest checkpoints that are kept; older ones are deleted."""
    keep_every: Annotated[int, NOT_NEGATIVE] = 0
    """Checkpoints whose step is a multiple of this are kept for good; 0 keeps none."""
    resume: bool = True
    """Continue from the newest checkpoint of the run directory; false refuses to start in one that holds a run."""
    grace_seconds: Annotated[float, POSITIVE] = 240.0
    """Time to write a checkpoint after SIGTERM or SIGUSR1; launch.sh gives its ranks 300 s, torchrun alone 30 s."""


@dataclass
class LogConfig:
    """Metrics."""

    every: Annotated[int, POSITIVE] = 10
    """Steps between metric lines. The loop waits for the device there, at evaluations and at checkpoints alone."""
    wandb: bool = False
    """Also log to Weights & Biases."""
    wandb_project: str = "clt"
    """Weights & Biases project."""
    wandb_entity: str | None = None
    """Weights & Biases team or user; null takes the login's default."""
    wandb_mode: Literal["online", "offline"] = "online"
    """`offline` writes the W&B files locally for `wandb sync`."""


@dataclass
class ProfileConfig:
    """TensorBoard-readable profiler traces."""

    enabled: bool = False
    """Record a trace of a few steps into `<run>/profile`."""
    start: Annotated[int, POSITIVE] = 10
    """First step recorded, counted from 0 at the start of this process."""
    steps: Annotated[int, POSITIVE] = 3
    """Steps recorded."""
