"""Train a cross-layer transcoder: this file is the run, top to bottom.

    torchrun --nproc_per_node=4 train_ddp.py [CONFIG] [section.key=value ...]
    python train_ddp.py configs/quickstart.yaml train.steps=100        # one process
    python train_ddp.py --prepare CONFIG                               # check everything, extract, and stop

CONFIG defaults to configs/quickstart.yaml. Activations are extracted first if the store is missing; a run directory
that has a checkpoint is resumed. SIGTERM and SIGUSR1 end the run with a checkpoint and status 75: the same command goes
on from it.
"""

from __future__ import annotations

import os
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from clt.cli import exit_on_user_error, run_arguments
from clt.config import Config, config_hash
from clt.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor


def main(config: Config, prepare: bool) -> int:
    # Heavy imports wait until the command line and the config are known to be right.
    import torch
    from torch import nn

    from clt.data.extract import check_model
    from clt.data.index import content_hash, write_json
    from clt.data.loader import Loader
    from clt.data.sampler import DistributedSampler
    from clt.data.store import DiscBuffer
    from clt.lm.load import load_language_model
    from clt.memory import keep_freed_memory
    from clt.model.transcoder import feature_dim
    from clt.train import checkpoint, report
    from clt.train import distributed as dist
    from clt.train.evaluation import dead_features
    from clt.train.logger import Logger
    from clt.train.optim import NEVER, TERMS, Update, autocast_dtype, learning_rate, sparsity_coefficient
    from clt.train.run import build, check_run_dir, claim_run_dir, evaluate, heldout_windows, make_stores, open_stores
    from clt.train.watch import PREEMPTED, Watch

    began = time.perf_counter()
    # The watch names a rank that hangs; should it fail, the collectives themselves time out a little later.
    world = dist.setup(config.parallel.feature_shards, config.parallel.timeout_seconds + 60)
    rank_zero, device, data, feature = world.rank == 0, world.device, world.data, world.feature
    dtype = autocast_dtype(config.train.precision, device)
    run_dir = Path(config.run.dir)
    check_run_dir(config)
    keep_freed_memory()

    # Data: one process extracts, with all cores; the others wait and find the stores whole.
    def prepare_stores() -> None:
        threads = torch.get_num_threads()
        torch.set_num_threads(max(threads, len(os.sched_getaffinity(0))))
        make_stores(config, progress=rank_zero)
        torch.set_num_threads(threads)

    dist.on_rank_zero(world, prepare_stores)
    store, heldout = open_stores(config)
    steps, batch_tokens = config.train.steps, config.train.batch_tokens
    order = (len(store), config.data.block_rows, batch_tokens, config.run.seed, data.rank, data.size)
    DistributedSampler(*order)  # refuses a batch that cannot be made
    if batch_tokens // data.size < config.train.accumulate:
        raise UserError(
            f"train.accumulate={config.train.accumulate} micro-batches cannot be made of a rank's share of "
            f"train.batch_tokens={batch_tokens}, {batch_tokens // data.size} rows: lower the one or raise the other"
        )
    lm, windows = None, []
    if config.eval.replacement_tokens:
        lm = load_language_model(config.lm, device)
        check_model(store.index, lm)
        windows = heldout_windows(config, lm)
    if prepare:
        return 0

    # Model, objective, optimizer. Weights are drawn on the CPU: the same on every device and in every layout.
    objective = build(config, store, (feature.rank, feature.size), feature.sum).to(device)
    transcoder = objective.transcoder
    named = {name: p for name, p in transcoder.named_parameters() if p.requires_grad}
    beta1, beta2 = config.optim.betas
    optimizer = torch.optim.Adam(named.values(), config.optim.lr, (beta1, beta2), config.optim.eps, fused=True)
    update = Update(
        optimizer,
        sharded=[p for name, p in named.items() if feature_dim(name) is not None],
        replicated=[p for name, p in named.items() if feature_dim(name) is None],
        sum_shards=feature.sum,
        clip_norm=config.optim.clip_norm,
        fp16=dtype == torch.float16,
        stop=config.train.nonfinite == "stop",
    )
    last_fired = torch.zeros(transcoder.n_layers, transcoder.d_features, dtype=torch.int64, device=device)

    # Resume.
    start, saved, busy, wandb_id = 0, 0, 0.0, None
    checkpoints = checkpoint.Checkpoints(
        run_dir / "checkpoints", config.checkpoint.keep, config.checkpoint.keep_every, world
    )
    identity = {"config_hash": config_hash(config), "data_hash": content_hash(store.index)}
    identity |= {"precision": str(dtype), "device": device.type, **checkpoint.versions()}
    newest = max(checkpoint.steps(checkpoints.directory), default=-1)
    if dist.same_everywhere(world, newest, "newest checkpoint") >= 0:
        tensors = update.tensors() | {"last_fired": last_fired}
        path = checkpoints.directory / f"step_{newest:08d}"
        state = checkpoint.restore(path, transcoder, optimizer, tensors, identity)
        start = saved = state["step"]
        busy, wandb_id = state["busy_seconds"], state["wandb_id"]
        if not isinstance(store, DiscBuffer) and rank_zero:
            store.consumed |= state["rows_by_segment"]
    dist.on_rank_zero(world, lambda: claim_run_dir(config))

    model: nn.Module = objective
    if data.size > 1:
        DDP = nn.parallel.DistributedDataParallel
        # The statistics are the same everywhere: do not broadcast them each step (the public switch's name varies).
        DDP._set_params_and_buffers_to_ignore_for_model(model, [name for name, _ in model.named_buffers()])
        model = DDP(model, process_group=data.group, gradient_as_bucket_view=True)
        model.register_comm_hook(data.group, dist.sum_bucket)

    logger = Logger(config, world.rank, start, wandb_id)

    def evaluation_due() -> bool:
        return step == steps or (config.eval.every > 0 and step % config.eval.every == 0)

    def evaluation():  # of the weights as they are, over all ranks
        share = {"rank": data.rank, "world": data.size, "all_sum": data.sum, "progress": lambda: watch.progress(step)}
        mean_output = store.statistics.target_mean
        numbers, tensors = evaluate(transcoder, heldout, mean_output, lm, windows, autocast=dtype, **share)
        dead = dead_features(data.max(last_fired.clone()), step, batch_tokens, config.eval.dead_window)
        numbers["dead_fraction"] = feature.sum(dead.double().mean()).item() / feature.size
        return numbers, tensors

    def check_finite() -> None:  # before anything is saved
        first = (-dist.all_max(-update.failed_at)).tolist()
        if min(first) != NEVER and config.train.nonfinite == "stop":
            raise UserError(
                f"{TERMS[first.index(min(first))]} was not finite at step {min(first)}; no weights changed since. Look "
                f"for bad rows with `clt inspect --verify {store.path}`, lower optim.lr (now {lr:.3g}), use "
                "train.precision=fp32, or leave such steps out with train.nonfinite=skip"
            )

    def begin_checkpoint() -> None:
        nonlocal saved
        saved = step
        tensors = update.tensors() | {"last_fired": data.max(last_fired.clone())}
        parts = checkpoint.parts(transcoder, optimizer, tensors, (data.rank, data.size))
        state = {"step": step, "busy_seconds": busy, "wandb_id": logger.wandb_id, "world_size": world.size}
        if source is not None:
            state |= source.position()
        checkpoints.begin(parts, transcoder.config, state | identity)

    def forward_backward(batch: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of the mean over the global batch; this rank's addends of the metrics, and what fired."""
        metrics = torch.zeros(len(names), device=device)
        fired = torch.zeros_like(last_fired, dtype=torch.bool)
        parts = batch.tensor_split(config.train.accumulate)
        for part in parts:
            share = len(part) / batch_tokens  # ranks and micro-batches may differ by a row
            with nullcontext() if part is parts[-1] or data.size == 1 else model.no_sync():  # type: ignore[operator]
                with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                    terms = model(part, sparsity)
                # A loss that is not finite makes every gradient nan, on all ranks, so that they agree to leave the step
                # out.
                factor = share * update.scale + 0 * terms.loss.detach()
                (terms.loss * factor).backward()
            fired |= terms.fired
            # Every shard has the whole error, and its own part of everything else.
            own = torch.stack([terms.mse / feature.size, terms.sparsity, terms.pre_activation])
            metrics += share * torch.cat([own, terms.mse_per_layer / feature.size, terms.l0_per_layer])
        return metrics, fired

    profiler = nullcontext()
    if config.profile.enabled:
        profiler = torch.profiler.profile(
            schedule=torch.profiler.schedule(
                wait=config.profile.start - 1, warmup=1, active=config.profile.steps, repeat=1
            ),
            on_trace_ready=torch.profiler.tensorboard_trace_handler(str(run_dir / "profile"), f"rank{world.rank}"),
        )

    # The loop. Nothing in it waits for the device but logging, evaluation and checkpoints.
    L, step, sparsity = transcoder.n_layers, start, 0.0
    names = [*TERMS[:3], *(f"mse/layer_{l}" for l in range(L)), *(f"L0/layer_{l}" for l in range(L))]
    sampler = DistributedSampler(*order, start, steps)
    if data.size > 1 and start < steps:
        # DDP orders its sums by the first backward pass. It is taken before the first step, so that a resumed run
        # adds in the same order as one that was not interrupted.
        index = store.index
        shape = (len(sampler.rows_at(start)), 2, index.n_layers, index.d_acts)
        forward_backward(torch.zeros(shape, dtype=getattr(torch, index.dtype), device=device))
        optimizer.zero_grad()  # and not clear_gradients: DDP makes its buckets anew, in that order
    source = None
    if isinstance(store, DiscBuffer):
        loader = Loader(store, sampler, device, config.data.prefetch)
    else:
        from clt.server.remote import RemoteRows

        sizes = [batch_tokens * (data.rank + 1) // data.size - batch_tokens * data.rank // data.size] * (steps - start)
        source = RemoteRows(
            store, sizes, device, config.data.prefetch, vote=lambda *flags: dist.count(world, *flags),
            total=lambda counts: dist.sum_counts(world, counts), reads=feature.rank == 0, broadcast=feature.broadcast,
        )  # fmt: skip
        loader = source.loader
    watch = Watch(world, config.parallel.timeout_seconds, config.checkpoint.grace_seconds)
    votes, stopped = dist.Votes(world, 2), False
    results = None
    with logger, loader, profiler, checkpoints, watch:
        # A run that was stopped between a checkpoint and its evaluation makes up for that.
        evaluated = dist.all_max(torch.tensor(float(logger.evaluated), device=device)).item()
        if start and evaluation_due() and not evaluated:
            results = evaluation()
            logger.log_evaluation(step, results[0])
        clock, logged, stalled = time.perf_counter(), start, loader.stalled
        # (b, 2, L, D): this rank's rows of the global batch
        for batch in loader if source is None else source.batches(start, watch):
            lr = learning_rate(step, steps, config.optim)
            for group in optimizer.param_groups:
                group["lr"] = lr
            sparsity = sparsity_coefficient(step, steps, config.loss)
            metrics, fired = forward_backward(batch)
            step += 1
            grad_norm = update(step, metrics[:3])
            transcoder.clear_gradients()
            last_fired.masked_fill_(fired, step)
            logger.step(step)
            watch.progress(step)
            if config.profile.enabled:
                profiler.step()  # type: ignore[union-attr]

            signals, written = votes.counted()
            stopped = signals > 0 and step < steps  # signals on any rank: now all of them stop here
            if written == world.size:
                checkpoints.publish()
            due_evaluation = evaluation_due()
            due_checkpoint = (config.checkpoint.every and step % config.checkpoint.every == 0) or step == steps
            due_checkpoint = due_checkpoint or stopped
            if step % config.log.every == 0 or due_evaluation or due_checkpoint:
                values = dict(zip(names, dist.all_sum(metrics).tolist()))
                check_finite()
                loss = values["train_mse"] + sparsity * values["train_sparsity"]
                loss += config.loss.pre_activation * values["train_pre_activation"]
                values = {"train_loss": loss, **values, "L0": sum(values[f"L0/layer_{l}"] for l in range(L))}
                values |= {"grad_norm": grad_norm.item(), "skipped_steps": update.skipped.item()}
                values |= {"learning_rate": lr, "sparsity_coefficient": sparsity}
                now = time.perf_counter()
                speed = {
                    "tokens_per_second": (step - logged) * batch_tokens / (now - clock),
                    "data_wait_share": (loader.stalled - stalled) / (now - clock),
                }
                busy, clock, logged, stalled = busy + now - clock, now, step, loader.stalled
                if step % config.log.every == 0 or due_evaluation:
                    logger.log(step, values)
                    logger.log(step, speed, "speed")

            if due_evaluation or due_checkpoint:
                if due_checkpoint:
                    begin_checkpoint()
                if due_evaluation and not stopped:  # it is made up for, and the checkpoint is in a hurry
                    checkpoints.finish()  # an evaluation that fails must not cost the steps before it
                    results = evaluation()
                    logger.log_evaluation(step, results[0])
                clock, logged = time.perf_counter(), step
            if stopped:
                watch.stopping = True  # whichever rank was told
                break
            votes.cast(watch.stopping, checkpoints.written)
        if step < steps and not stopped:  # the server's rows did not come
            stopped, watch.stopping, busy = True, True, busy + time.perf_counter() - clock
            if saved < step:
                check_finite()
                begin_checkpoint()
        checkpoints.finish()
        failure = loader.failure

    if stopped:
        if rank_zero:
            kept = f"with a checkpoint in {run_dir}" if step else "before there was anything to keep"
            print(f"stopped after step {step} of {steps}, {kept}", file=sys.stderr)
        dist.cleanup()
        if failure is not None:
            raise failure
        return 2 if source is not None and source.lost else PREEMPTED  # another rank says why

    # The end: report and tear down. A run that was already finished is evaluated again, and only reported.
    numbers, tensors = results or evaluation()
    consumed = {} if source is None else source.position()
    if rank_zero:
        summary = {
            **numbers,
            "dead_window_tokens": min(config.eval.dead_window, steps * batch_tokens),
            "tokens_per_second": steps * batch_tokens / busy,
            "wall_seconds": time.perf_counter() - began,
            "steps": steps,
            "train_tokens": steps * batch_tokens,
            "world_size": world.size,
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
            "precision": str(dtype).removeprefix("torch."),
            "torch_version": torch.__version__,
            "config_hash": config_hash(config),
        }
        if source is not None:
            summary |= {"server": str(store.path), **consumed}
        write_json(run_dir / "summary.json", summary)
        report.write_plots(run_dir, tensors)
        print(f"\n{report.table(summary)}\n\nThe run lies in {run_dir} (summary.json, report/, checkpoints/).")
    dist.cleanup()
    return 0


if __name__ == "__main__":
    arguments = run_arguments(__doc__)
    sys.exit(exit_on_user_error(main, *arguments))
