"""One training step of one shape: its time, its arithmetic, its memory, and what the machine would allow."""

from __future__ import annotations

import math
import statistics
import tempfile
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import machine
from benchmarks.textbook import Textbook
from clt.config import load_config
from clt.costs import Job, backward_bytes, flops, moved_bytes, state_bytes
from clt.data.store import DiscBuffer
from clt.data.writer import write_store
from clt.memory import keep_freed_memory
from clt.model.loss import Objective
from clt.model.transcoder import unsharded
from clt.train.ddp import GradientMemory
from clt.train.distributed import ONE_RANK, Axis, accumulate_in_float32
from clt.train.metrics import coefficients
from clt.train.optim import Update, autocast_dtype, make_adam
from clt.train.run import build

WARMUP = 2


def formula_memory(job: Job) -> int:
    """Bytes that a step needs at its peak: weights, gradients, moments, what it works in, and the float32 batch."""
    L, D, _, B = job.local
    return state_bytes(job) + backward_bytes(job) + 2 * B * L * D * 4


def measure(
    case: dict[str, Any], copy_gb_per_s: float, timed_steps: int, device: torch.device, budget: float = 2.0
) -> dict[str, Any]:
    """Run the step of `case` {L, D, F, B, precision, variant} and return the case with what came out.

    The time is the median of `timed_steps` steps, after two; shares are of the median of the peaks measured between
    them, the best of three products each, because machines change their speed (`budget` is that of `matmul_peak`).
    Variants: `ours` and `textbook`, each also with `_compiled`; `topk` also of `k`, and `sparse`; `decoder`.
    Memory is what building and running takes.
    """
    L, D, F, B = (case[key] for key in "LDFB")
    dtype = autocast_dtype(case["precision"], device)
    keep_freed_memory()
    before = machine.reset_peak(device)
    batch = torch.randn(B, 2, L, D, device=device)
    step = prepare(case, batch)
    for _ in range(WARMUP):
        step(batch)
    used = machine.peak(device) - before
    product = machine.matmul(machine.matmul_peak(dtype, device, budget)[1], dtype, device)
    turns = [(machine.seconds(lambda: step(batch), device), product(3)) for _ in range(timed_steps)]
    job = Job(L, D, F, B, width=dtype.itemsize, row_adam="decoder" in case)
    took, limit = (statistics.median(values) for values in zip(*turns))
    limit, work = limit * 1e12, flops(job)
    precision = {value: key for key, value in machine.PRECISIONS.items()}[dtype]
    roofline = max(work / limit, moved_bytes(job) / (copy_gb_per_s * 1e9))
    formula = {} if "textbook" in case["variant"] else {"formula_memory_gb": formula_memory(job) / 1e9}
    return {
        **case,
        "precision": precision,
        "seconds": took,
        "tokens_per_s": B / took,
        "tflops": work / took / 1e12,
        "peak_tflops": limit / 1e12,
        "share_of_peak": work / took / limit,
        "roofline_seconds": roofline,
        "roofline_share": roofline / took,
        "peak_memory_gb": used / 1e9,
        **formula,
    }


def objective(F: int, batch: Tensor, *overrides: str, feature: Axis = ONE_RANK) -> Objective:
    """What training builds of a config, with F features a layer, on the device of `batch` (B, 2, L, D).

    Activations are normalised by the statistics of the first rows of `batch`; weights are the same each time.
    """
    config = load_config(None, [f"clt.d_features={F}", *overrides])
    with tempfile.TemporaryDirectory() as directory:
        write_store(directory, batch[:64].float().cpu())
        store = DiscBuffer(directory)
        return build(config, store.index, store.statistics, feature).to(batch.device)


def prepare(case: dict[str, Any], batch: Tensor) -> Callable[[Tensor], Any]:
    """A step of batches (B, 2, L, D) like `batch`, whose statistics normalise them.

    Ours as train_ddp.py takes it, with `optim.decoder` the case's `decoder`; the textbook's as tutorials do, with
    clip_grad_norm_ and a GradScaler.
    """
    device, textbook = batch.device, "textbook" in case["variant"]
    compiled = "compiled" in case["variant"]
    config, dtype = load_config(), autocast_dtype(case["precision"], device)
    config.optim.decoder = case.get("decoder", "torch")
    accumulate_in_float32()
    variant = case["variant"].removesuffix("_compiled")
    rule = variant.removesuffix("_by_norm")
    k = case.get("k") or {"topk": 10, "batchtopk": 10 * batch.shape[2]}.get(rule)
    chosen = [f"clt.activation={rule}", f"clt.k={k}", f"clt.by_norm={rule != variant}", "loss.sparsity=0"] if k else []
    ours = objective(case["F"], batch, f"train.compile={compiled and not textbook}", *chosen)
    ours.capacity = k * len(batch) if k and case.get("sparse") else None
    model: nn.Module = Textbook(ours) if textbook else ours
    named = {name.removeprefix("transcoder."): p for name, p in model.named_parameters() if p.requires_grad}
    weights = list(named.values())
    optimizer, row_adam = make_adam(named, config.optim, 10**5, dtype)
    ours.row_adam = row_adam
    memory = ours.gradient_memory = GradientMemory(ours.parameters())
    del ours
    terms, sparsity = coefficients(1, 1, config.loss), config.loss.sparsity
    autocast = partial(torch.autocast, device.type, dtype, enabled=dtype != torch.float32)
    if not textbook:
        update = Update(
            optimizer,
            named,
            config.optim.clip_norm,
            unsharded,
            floor=0.01,
            fp16=dtype == torch.float16,
            stop=True,
            row_adam=row_adam,
        )

        def step(batch: Tensor) -> None:
            with autocast():
                losses = model(batch, terms)
            (losses.total * update.scale).backward()
            update(1, config.optim.lr, torch.stack([*losses.values.values()]))
            memory.clear()

        return step

    called = torch.compile(model) if compiled else model
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)

    def theirs(batch: Tensor) -> None:
        with autocast():
            loss = called(batch, sparsity)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(weights, config.optim.clip_norm or math.inf)
        scaler.step(optimizer)
        scaler.update()
        model.zero_grad()

    return theirs
