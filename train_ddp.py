"""Train a cross-layer transcoder: this file is the run, top to bottom.

    torchrun --nproc_per_node=4 train_ddp.py [CONFIG] [section.key=value ...]
    python train_ddp.py configs/quickstart.yaml train.steps=100        # one process
    python train_ddp.py --prepare CONFIG                               # check everything, extract, and stop

CONFIG defaults to configs/quickstart.yaml. Activations are extracted first if the store is missing; a run directory
that has a checkpoint is resumed. SIGTERM and SIGUSR1 end the run with a checkpoint and status 75: the same command goes
on from it.
"""

# ruff: noqa: E402 - the command line is read before the imports that take seconds

from __future__ import annotations

import sys

from clt.cli import run_arguments, run_rank

ARGUMENTS = run_arguments(__doc__) if __name__ == "__main__" else None

import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from clt.config import Config
from clt.errors import UserError
from clt.files import or_null
from clt.memory import keep_freed_memory
from clt.model.terms import Coefficients
from clt.train import ddp
from clt.train import distributed as dist
from clt.train.evaluation import Evaluator
from clt.train.logger import Logger
from clt.train.metrics import Metrics, Speed, coefficients, k_at, steps_at_k
from clt.train.optim import autocast_dtype, check_finite, learning_rate
from clt.train.profile import profiled
from clt.train.report import conclude, summary
from clt.train.run import build, check_run, claim_run_dir, make_stores, open_source, run_identity, sole_use
from clt.train.state import TrainState
from clt.train.watch import PREEMPTED, Watch
from clt.train.writer import Checkpoints


def main(config: Config, prepare: bool) -> int:
    """Returns the exit status: 0, or PREEMPTED when the run is to go on later."""
    began = time.perf_counter()
    # The watch names a rank that hangs; should it fail, the collectives themselves time out a little later.
    world = dist.setup(config.parallel.feature_shards, config.parallel.timeout_seconds + 60)
    device, dtype = world.device, autocast_dtype(config.train.precision, world.device)
    run_dir, steps = Path(config.run.dir), config.train.steps
    keep_freed_memory()

    # Data: rank 0 extracts activations, and the others wait; held-out rows and text for evaluation.
    dist.on_rank_zero(world, check_run, config, world)
    dist.on_rank_zero(world, make_stores, config)
    source, heldout = open_source(config, world)
    evaluate = Evaluator(config, heldout, source.statistics.target_mean, world, dtype)
    if prepare:
        return 0

    # Model, objective, optimizer. Weights are drawn on the CPU: the same on every device and in every layout.
    objective = build(config, source.index, source.statistics, world.feature).to(device)
    state = TrainState(config, objective, world, dtype)
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)

    with dist.first_error_alone(world), sole_use(config, world):  # until its last file is written
        # Resume.
        identity = run_identity(config, source.index, device, dtype)
        restored = state.resume(run_dir / "checkpoints", identity)
        if restored:
            source.resume(restored)
        dist.on_rank_zero(world, claim_run_dir, config)

        model = ddp.data_parallel(objective, world.data)
        if state.step < steps:
            # DDP fixes the order of its buckets in its first backward pass. It runs on zeros, so that a resumed run
            # sums in the same order as one that was not interrupted.
            zeros, terms = source.zeros(max(source.micro_batches)), coefficients(0, steps, config.loss)
            ddp.settle_buckets(model, zeros, terms, autocast, state.dead())
        state.switch.choose(state.step)  # after the buckets, which a dense step settles

        checkpoints = Checkpoints(run_dir / "checkpoints", config.checkpoint, world)
        logger = Logger(config, world.rank, state.step, state.wandb_id)
        state.wandb_id = logger.wandb_id
        watch = Watch(world, config.parallel.timeout_seconds, config.checkpoint.grace_seconds)

        # The loop. Nothing in it waits for the device but logging, evaluation and checkpoints.
        with logger, source, profiled(config.profile, run_dir, world.rank) as profile_step, checkpoints, watch:
            (logged,) = dist.count(world, logger.evaluated)
            evaluated = state.step if logged else 0  # the step of the last evaluation in the log of a resumed run
            speed = Speed(state.step, state.busy_seconds, config.train.batch_tokens, source)
            for batch in source.batches(state.step, watch):  # (b, 2, L, D): this rank's rows of the global batch
                if due(config.eval.every, state.step) and state.step != evaluated:
                    checkpoints.finish()  # an evaluation that fails must not cost the steps before it
                    results = evaluate(state.up_to_date(), state.last_fired, state.step, watch.progress)
                    logger.log_evaluation(state.step, results.numbers)
                    speed.skip(state.step)
                flags = dist.Counting(world, watch.stopping, checkpoints.written)  # while the step runs: no rank waits
                taken = take_step(config, state, model, batch.split(source.micro_batches), autocast, checkpoints)
                logger.step(state.step)
                watch.progress(state.step)
                profile_step()
                signals, written = flags.result()
                if written == world.size:
                    checkpoints.publish()
                if due(config.log.every, state.step) or due(config.eval.every, state.step) or state.step == steps:
                    try:
                        check_finite(state.update, world, source.store.path)
                    except UserError:
                        checkpoints.finish()  # the one that is being written is of an earlier step
                        raise
                    logger.log(state.step, log_values(taken, state))
                    logger.log(state.step, speed.read(state.step), "speed")
                if due(config.checkpoint.every, state.step):
                    state.save(checkpoints, source, speed, identity)
                if signals:  # on any rank: now all of them stop here
                    break

            # The last step, a signal and a lost server leave the loop in the same way: with a checkpoint.
            watch.stopping |= state.step < steps
            if state.saved < state.step:
                state.save(checkpoints, source, speed, identity)
            checkpoints.finish()
            watch.saved = True
            results, more = None, {}
            if state.step == steps:
                results = evaluate(state.up_to_date(), state.last_fired, state.step, watch.progress)
                if state.step != evaluated:  # else a finished run is only reported again
                    logger.log_evaluation(state.step, results.numbers)
                more = summary(config, state, dtype, time.perf_counter() - began) | source.position()

        if world.rank == 0 and results is not None:
            conclude(run_dir, results, "summary.json", "report", **more)
        elif world.rank == 0:
            kept = f"with a checkpoint in {run_dir}" if state.step else "before the first step, so nothing was saved"
            print(f"stopped after step {state.step} of {steps}, {kept}", file=sys.stderr)
    dist.cleanup()
    if source.failure is not None:
        raise source.failure
    return PREEMPTED if results is None else 0


class Taken(NamedTuple):
    """A step that was taken: how it was set, and what came of it."""

    lr: float
    k: float | None
    terms: Coefficients
    metrics: Metrics
    grad_norm: Tensor  # () before clipping


def take_step(
    config: Config,
    state: TrainState,
    model: nn.Module,
    parts: Sequence[Tensor],
    autocast: AbstractContextManager[object],
    checkpoints: Checkpoints,
) -> Taken:
    """One update of the weights by a global batch, of which parts (b, 2, L, D) are this rank's micro-batches."""
    steps, transcoder = config.train.steps, state.transcoder
    lr, k = learning_rate(state.step, steps, config.optim), k_at(state.step, steps, config.clt)
    terms = coefficients(state.step, steps, config.loss, state.steering.factor())
    dead, metrics = state.dead(), Metrics(state.world, transcoder.n_layers, transcoder.d_features)
    for part in parts:
        share = len(part) / config.train.batch_tokens  # ranks and micro-batches may differ by a row
        with ddp.summed(model, part is parts[-1]):
            with autocast:
                losses = model(part, terms, k, dead)
            # A loss that is not finite makes all gradients nan, and their sum on all ranks: all skip the step.
            (losses.total * (share * state.update.scale + 0 * losses.total.detach())).backward()
        metrics.add(losses, share)
    state.step += 1
    checkpoints.wait_for_copy()
    overflow = state.switch.update(state.step, metrics)
    grad_norm = state.update(state.step, lr, metrics.values, overflow)
    state.gradients.clear()
    transcoder.track(metrics.thresholds, steps_at_k(state.step, steps, config.clt))
    state.steering.update(state.step, metrics)
    state.fired(metrics.fired)
    return Taken(lr, k, terms, metrics, grad_norm)


def log_values(taken: Taken, state: TrainState) -> dict[str, float | None]:
    """A line of the log. All ranks must call it. Waits for the device."""
    values = taken.metrics.read(taken.terms)
    values |= {"grad_norm": or_null(taken.grad_norm.item()), "skipped_steps": state.update.skipped.item()}
    values |= {"learning_rate": taken.lr, "sparsity_coefficient": float(taken.terms["sparsity"])}
    return values | ({} if taken.k is None else {"k": taken.k}) | state.switch.read(taken.metrics)


def due(every: int, step: int) -> bool:
    """Whether `step` is a multiple of `every`; 0 means never."""
    return every > 0 and step % every == 0


if ARGUMENTS is not None:
    run_rank(main, *ARGUMENTS)
