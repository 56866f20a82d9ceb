"""Train a cross-layer transcoder: this file is the run, top to bottom.

    torchrun --nproc_per_node=4 train_ddp.py [CONFIG] [section.key=value ...]
    python train_ddp.py configs/quickstart.yaml train.steps=100        # one process
    python train_ddp.py --prepare CONFIG                               # check everything, extract, and stop

CONFIG defaults to configs/quickstart.yaml. Activations are extracted first if the store is missing; a run directory
that has a checkpoint is resumed.
"""

from __future__ import annotations

import math
import os
import time
from contextlib import nullcontext
from pathlib import Path

from clt.cli import exit_on_user_error, run_arguments
from clt.config import Config, config_hash
from clt.errors import UserError


def main(config: Config, prepare: bool) -> None:
    # Heavy imports wait until the command line and the config are known to be right.
    import torch
    from torch import nn

    from clt.data.extract import check_model
    from clt.data.index import write_json
    from clt.data.loader import Loader
    from clt.data.sampler import DistributedSampler
    from clt.data.store import DiscBuffer
    from clt.lm.load import load_language_model
    from clt.train import checkpoint, report
    from clt.train import distributed as dist
    from clt.train.evaluation import dead_features
    from clt.train.logger import Logger
    from clt.train.optim import autocast_dtype, learning_rate, sparsity_coefficient
    from clt.train.run import (
        build,
        check_run_dir,
        claim_run_dir,
        evaluate,
        heldout_windows,
        make_stores,
        open_stores,
    )

    began = time.perf_counter()
    world = dist.setup()
    rank_zero, device = world.rank == 0, world.device
    dtype = autocast_dtype(config.train.precision, device)
    run_dir = Path(config.run.dir)
    check_run_dir(config)

    # Data: one process extracts, with all cores; the others wait and find the stores whole.
    def prepare_stores() -> None:
        threads = torch.get_num_threads()
        torch.set_num_threads(max(threads, len(os.sched_getaffinity(0))))
        make_stores(config, progress=rank_zero)
        torch.set_num_threads(threads)

    dist.on_rank_zero(world, prepare_stores)
    store, heldout = open_stores(config)
    steps, batch_tokens = config.train.steps, config.train.batch_tokens
    order = (len(store), config.data.block_rows, batch_tokens, config.run.seed, world.rank, world.size)
    DistributedSampler(*order)  # refuses a batch that cannot be made
    if prepare:
        return

    # Model, objective, optimizer. Weights are drawn on the CPU: the same on every device and rank.
    objective = build(config, store).to(device)
    transcoder = objective.transcoder
    parameters = [p for p in transcoder.parameters() if p.requires_grad]
    beta1, beta2 = config.optim.betas
    optimizer = torch.optim.Adam(parameters, config.optim.lr, (beta1, beta2), config.optim.eps, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    last_fired = torch.zeros(transcoder.n_layers, transcoder.d_features, dtype=torch.int64, device=device)

    # Resume.
    start, busy, wandb_id = 0, 0.0, None
    saved = dist.same_everywhere(max(checkpoint.steps(run_dir / "checkpoints"), default=-1), "newest checkpoint")
    if saved >= 0:
        state = checkpoint.restore(run_dir / "checkpoints" / f"step_{saved:08d}", transcoder, optimizer)
        start, busy, wandb_id = state["step"], state["busy_seconds"], state["wandb_id"]
        last_fired.copy_(state["last_fired"])
        scaler.load_state_dict(state["scaler"])
    if rank_zero:
        claim_run_dir(config)
    dist.barrier()

    model: nn.Module = objective
    if config.train.compile:
        model = torch.compile(model)  # type: ignore[assignment]
    if world.size > 1:
        DDP = nn.parallel.DistributedDataParallel
        # The statistics are the same everywhere: do not broadcast them each step (the public switch's name varies).
        DDP._set_params_and_buffers_to_ignore_for_model(model, [name for name, _ in model.named_buffers()])
        model = DDP(model, gradient_as_bucket_view=True)

    lm, windows = None, []
    if config.eval.replacement_tokens:
        lm = load_language_model(config.lm, device)
        check_model(store.index, lm)
        windows = heldout_windows(config, lm)
    logger = Logger(config, world.rank, start, wandb_id)

    def evaluation():  # of the weights as they are, over all ranks
        numbers, tensors = evaluate(
            transcoder,
            heldout,
            store.statistics.target_mean,
            lm,
            windows,
            autocast=dtype,
            rank=world.rank,
            world=world.size,
            all_sum=dist.all_sum,
        )
        dead = dead_features(dist.all_max(last_fired.clone()), step, batch_tokens, config.eval.dead_window)
        numbers["dead_fraction"] = dead.double().mean().item()
        return numbers, tensors

    def save_checkpoint() -> None:
        fired = dist.all_max(last_fired.clone())
        state = {"step": step, "busy_seconds": busy, "wandb_id": logger.wandb_id, "config_hash": config_hash(config)}
        state |= {"scaler": scaler.state_dict(), "last_fired": fired}
        if rank_zero:
            checkpoint.save(run_dir / "checkpoints", transcoder, optimizer, state, config.checkpoint.keep)
        dist.barrier()

    profiler = nullcontext()
    if config.profile.enabled:
        profiler = torch.profiler.profile(
            schedule=torch.profiler.schedule(
                wait=config.profile.start - 1, warmup=1, active=config.profile.steps, repeat=1
            ),
            on_trace_ready=torch.profiler.tensorboard_trace_handler(str(run_dir / "profile"), f"rank{world.rank}"),
        )

    # The loop. Nothing in it waits for the device but logging, evaluation and checkpoints.
    L, step, sparsity = transcoder.n_layers, start, torch.zeros((), device=device)
    names = ["train_loss", "train_mse", "train_sparsity", "train_pre_activation"]
    names += [f"mse/layer_{l}" for l in range(L)] + [f"L0/layer_{l}" for l in range(L)]
    loader = Loader(store, DistributedSampler(*order, start, steps), device, config.data.prefetch)
    clock, logged, stalled, results = time.perf_counter(), start, 0.0, ({}, {})
    with logger, loader, profiler:
        for batch in loader:  # (b, 2, L, D): this rank's rows of the global batch
            lr = learning_rate(step, steps, config.optim)
            for group in optimizer.param_groups:
                group["lr"] = lr
            sparsity.fill_(sparsity_coefficient(step, steps, config.loss))
            metrics = torch.zeros(len(names), device=device)

            parts = batch.tensor_split(config.train.accumulate)
            for part in parts:
                share = len(part) / batch_tokens
                last = part is parts[-1]
                with nullcontext() if last or world.size == 1 else model.no_sync():  # type: ignore[operator]
                    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                        terms = model(part, sparsity)
                    # Ranks and micro-batches may differ by a row. DDP averages over ranks: undo that, so that the
                    # gradient is the mean over the global batch whatever its split.
                    scaler.scale(terms.loss * (share * world.size)).backward()
                last_fired = torch.where(terms.fired, step + 1, last_fired)
                metrics += share * torch.cat([torch.stack(terms[:4]).detach(), terms.mse_per_layer, terms.l0_per_layer])

            scaler.unscale_(optimizer)
            grad_norm = nn.utils.clip_grad_norm_(parameters, config.optim.clip_norm or math.inf)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            step += 1
            logger.step(step)
            if config.profile.enabled:
                profiler.step()  # type: ignore[union-attr]

            due_evaluation = (config.eval.every and step % config.eval.every == 0) or step == steps
            due_checkpoint = (config.checkpoint.every and step % config.checkpoint.every == 0) or step == steps
            if step % config.log.every == 0 or due_evaluation or due_checkpoint:
                values = dict(zip(names, dist.all_sum(metrics).tolist()))
                values |= {"L0": sum(values[f"L0/layer_{l}"] for l in range(L)), "grad_norm": float(grad_norm)}
                values |= {"learning_rate": lr, "sparsity_coefficient": sparsity.item()}
                now = time.perf_counter()
                speed = {
                    "tokens_per_second": (step - logged) * batch_tokens / (now - clock),
                    "data_wait_share": (loader.stalled - stalled) / (now - clock),
                }
                busy, clock, logged, stalled = busy + now - clock, now, step, loader.stalled
                # A scaled fp16 gradient may overflow: the scaler skips that step and lowers its scale.
                finite = names[:4] if scaler.is_enabled() else [*names[:4], "grad_norm"]
                for name in finite:
                    if not math.isfinite(values[name]):
                        raise UserError(
                            f"{name} is {values[name]} at step {step}; look for bad rows with `clt inspect --verify "
                            f"{store.path}`, lower optim.lr (now {lr:.3g}) or use train.precision=fp32"
                        )
                logger.log(step, values)
                logger.log(step, speed, "speed")

            if due_evaluation or due_checkpoint:
                busy += time.perf_counter() - clock
                if due_evaluation:
                    results = evaluation()
                    logger.log_evaluation(step, results[0])
                if due_checkpoint:
                    save_checkpoint()
                clock, logged = time.perf_counter(), step

    # The end: report and tear down. A run that was already finished is evaluated again, and only reported.
    numbers, tensors = evaluation() if start == steps else results
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
        if not isinstance(store, DiscBuffer):
            summary |= {"server": store.path, "rows_by_segment": store.consumed}  # of this rank's own stream
        write_json(run_dir / "summary.json", summary)
        report.write_plots(run_dir, tensors)
        print(f"\n{report.table(summary)}\n\nThe run lies in {run_dir} (summary.json, report/, checkpoints/).")
    dist.cleanup()


if __name__ == "__main__":
    arguments = run_arguments(__doc__)
    exit_on_user_error(main, *arguments)
