"""What a run will cost before it starts: memory, disk and time, and the layouts of the ranks that fit."""

from __future__ import annotations

from dataclasses import dataclass, replace

from clt.config import Config
from clt.costs import (
    FLOAT,
    Job,
    backward_bytes,
    batch_bytes,
    flops,
    gradient_bytes,
    moved_bytes,
    parameters,
    reconstruction_bytes,
    state_bytes,
    trained_parameters,
)
from clt.data.index import ITEM_BYTES
from clt.data.shards import row_bytes
from clt.errors import UserError, size_text
from clt.lm.shape import ModelShape
from clt.model.spec import check_rule

DEAD = 0.1  # of the features, with AuxK, whose memory and FLOPs grow with them
FLOAT32 = 1 / 16  # of the peak in bf16: what A100 and H100 do in float32, without tensor cores
MOST_SHARDS = 1024


@dataclass(frozen=True)
class Machine:
    """`gpus`: how many; None: as few as fit. `memory` of each in GB (1e9 bytes), `tflops` its peak in dense bf16, of
    which matrix products reach `share`. `cpu`: instead of GPUs there are ranks that share a machine's memory."""

    gpus: int | None = None
    memory: float = 80.0
    tflops: float = 989.0
    share: float = 0.4
    cpu: bool = False

    def seconds(self, work: float, dtype: str) -> float:
        """How long that many FLOPs of matrix products take on one GPU."""
        return work / (self.tflops * 1e12 * self.share * (FLOAT32 if dtype == "float32" else 1))


def plan(config: Config, shape: ModelShape, machine: Machine) -> tuple[str, str | None]:
    """The plan as text, and why the run is refused: its own layout does not fit, and what would. None: it fits.

    Raises UserError for features or GPUs that do not divide into `parallel.feature_shards`.
    """
    check_rule(config.clt, shape.n_layers)
    job, own, lm_bytes = _jobs(config, shape, machine)
    shards, gpus = own.feature, machine.gpus or own.feature
    if gpus % shards or job.d_features % shards:
        raise UserError(
            f"parallel.feature_shards={shards} divides {gpus} GPUs into {gpus / shards:.4g} and clt.d_features="
            f"{job.d_features} into {job.d_features / shards:.4g}; wanted whole numbers"
        )
    fitting = smallest(job, machine, lm_bytes)
    table = layouts(job, machine.gpus) if machine.gpus else sorted({own, fitting or own}, key=lambda j: j.feature)
    costs = _table(table, own, fitting, machine, lm_bytes, config.train.steps)
    text = "\n".join([*_facts(config, shape, job, machine), "", *costs])
    if need(own, lm_bytes) <= machine.memory * 1e9:
        return text, None
    return text, _refusal(own, fitting, machine, lm_bytes)


def shortage(config: Config, shape: ModelShape, machine: Machine) -> tuple[str | None, bool]:
    """Why a run on `machine.gpus` ranks needs more memory than there is, and whether that is sure. None: it fits.

    Sure is what lives from step to step, and beside it either the encoder's products, which the backward pass waits
    for, or the language model: all else depends on what is compiled, how many features are dead, and the allocator.
    """
    job, own, lm_bytes = _jobs(config, shape, machine)
    if need(own, lm_bytes) <= machine.memory * 1e9:
        return None, False
    products = own.n_layers * own.micro * own.local[2] * own.width if config.train.kernels == "dense" else 0
    sure = state_bytes(own) + max(products, lm_bytes) > machine.memory * 1e9
    return _refusal(own, smallest(job, machine, lm_bytes), machine, lm_bytes), sure


def _jobs(config: Config, shape: ModelShape, machine: Machine) -> tuple[Job, Job, int]:
    """A config's step on one rank and in its own layout, and the bytes of the language model in an evaluation."""
    job, shards = make_job(config, shape), config.parallel.feature_shards
    lm_bytes = (shape.parameters or 0) * ITEM_BYTES[config.lm.dtype] if config.eval.replacement_tokens else 0
    return job, replace(job, data=max((machine.gpus or shards) // shards, 1), feature=shards), lm_bytes


def make_job(config: Config, shape: ModelShape) -> Job:
    """The step of a config on one rank. `train.precision: auto` counts as bf16."""
    clt, loss = config.clt, config.loss
    return Job(
        shape.n_layers,
        shape.d_acts,
        clt.d_features,
        config.train.batch_tokens,
        width=FLOAT if config.train.precision == "fp32" else 2,
        stored=ITEM_BYTES[config.data.dtype],
        accumulate=config.train.accumulate,
        activation=clt.activation,
        k=max(clt.k or 0, clt.k_start or 0),
        by_norm=clt.by_norm,
        window=clt.window if clt.cross_layer else 1,
        skip=clt.skip,
        pre_activation=loss.pre_activation > 0,
        aux_k=loss.aux_k if loss.aux else 0,
        dead=DEAD if loss.aux else 0.0,
        row_adam=config.optim.decoder != "torch",
    )


def need(job: Job, lm_bytes: int) -> int:
    """Bytes that a rank takes at its peak: in a step, or in an evaluation, with the language model beside its state."""
    return state_bytes(job) + max(backward_bytes(job) + batch_bytes(job), lm_bytes)


def layouts(job: Job, gpus: int | None) -> list[Job]:
    """The job on every (data, feature) grid of that many GPUs, from the fewest feature shards on.

    None: on every number of feature shards, without a second data rank.
    """
    found = []
    for shards in range(1, min(gpus or MOST_SHARDS, job.d_features) + 1):
        data = gpus // shards if gpus else 1
        whole = job.d_features % shards == 0 and (gpus or shards) % shards == 0
        if whole and job.batch_tokens // job.accumulate >= data:
            found.append(replace(job, data=data, feature=shards))
    return found


def smallest(job: Job, machine: Machine, lm_bytes: int) -> Job | None:
    """The first of `layouts` that fits into the memory; None when none does."""
    return next((j for j in layouts(job, machine.gpus) if need(j, lm_bytes) <= machine.memory * 1e9), None)


def _facts(config: Config, shape: ModelShape, job: Job, machine: Machine) -> list[str]:
    """A line for each thing that does not depend on the layout."""
    data, rows = config.data, config.data.heldout_tokens
    rows += data.train_tokens if data.source == "store" else 0
    row = sum(row_bytes(shape.n_layers, shape.d_acts, data.dtype).values())
    model = "size unknown" if shape.parameters is None else f"{shape.parameters:,} parameters"
    extraction = "unknown without the model's config"
    if shape.flops_per_token is not None:
        seconds = machine.seconds(rows * shape.flops_per_token, config.lm.dtype)
        extraction = (
            f"{time_text(seconds)} of {config.lm.dtype} products, on one GPU; writing {row} bytes a row is extra"
        )
    checkpoint = FLOAT * (parameters(job) + 2 * trained_parameters(job))
    steps, tokens = config.train.steps, config.train.steps * job.batch_tokens
    lines = {
        "language model": f"{config.lm.model}: {shape.n_layers} layers to explain, of width {shape.d_acts}; {model}",
        "transcoder": f"{config.clt.d_features:,} features a layer, {job.activation}; {parameters(job):,} parameters",
        "store": f"{rows:,} rows, {size_text(rows * row)}",
        "extraction": extraction,
        "checkpoint": f"{size_text(checkpoint)}; the newest {config.checkpoint.keep} are kept",
        "training": f"{steps:,} steps of {job.batch_tokens:,} tokens, {tokens:,} in all",
    }
    if job.aux_k:
        lines["AuxK"] = f"counted with {DEAD:.0%} of the features dead; more of them take more memory and time"
    return [f"{name:<16}{value}" for name, value in lines.items()]


def _table(table: list[Job], own: Job, fitting: Job | None, machine: Machine, lm_bytes: int, steps: int) -> list[str]:
    """The figures of a rank in each layout."""
    dtype = "float32" if own.width == FLOAT else "bfloat16"
    heads = ["data x feature", "memory", "of it state", "TFLOP", "moved", "sent: gradients", "sent: y~", "products"]
    rows = [heads]
    for job in table:
        sizes = [
            need(job, lm_bytes),
            state_bytes(job),
            moved_bytes(job),
            gradient_bytes(job),
            reconstruction_bytes(job),
        ]
        memory, state, moved, gradients, y = map(size_text, sizes)
        work = flops(job)
        time = time_text(machine.seconds(work * steps, dtype))
        rows.append([f"{job.data} x {job.feature}", memory, state, f"{work / 1e12:,.4g}", moved, gradients, y, time])
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths)) for row in rows]
    for position, job in enumerate(table):
        marks = [
            mark for mark, marked in (("as configured", own), ("the smallest that fits", fitting)) if job == marked
        ]
        lines[position + 1] += f"  <- {', '.join(marks)}" if marks else ""
    share = f"{machine.share:.0%} of {machine.tflops:g} TFLOP/s"
    lines += ["", f"A rank's figures: memory at its peak, then per step; the whole run's matrix products at {share}."]
    return [*lines, "Not counted: CUDA's and NCCL's buffers, evaluation's tensors, waiting for the network."]


def _refusal(own: Job, fitting: Job | None, machine: Machine, lm_bytes: int) -> str:
    """Why the run is refused, and changes of the config after each of which it fits."""
    remedies = []
    if fitting is not None:
        gpus = "" if machine.gpus else f" on {fitting.feature} GPUs"
        remedies.append(f"parallel.feature_shards={fitting.feature}{gpus}")
    elif smallest(own, machine, 0):
        remedies.append("eval.replacement_tokens=0, which keeps the language model off the GPU")
    if fitting is None and machine.gpus and not machine.cpu:
        more = smallest(own, replace(machine, gpus=None), lm_bytes)
        remedies += [f"parallel.feature_shards={more.feature} on as many GPUs"] if more else []
    machine = replace(machine, gpus=own.data * own.feature)
    for key, field, values in (
        ("train.accumulate", "accumulate", [own.accumulate << n for n in range(1, 11)]),
        ("clt.d_features", "d_features", [own.d_features >> n for n in range(1, own.d_features.bit_length())]),
    ):
        jobs = (smallest(replace(own, **{field: value}), machine, lm_bytes) for value in values)
        if found := next(filter(None, jobs), None):
            shards = f" with parallel.feature_shards={found.feature}" if found.feature != own.feature else ""
            remedies.append(f"{key}={getattr(found, field)}{shards}")
    there = "of this machine's free memory it has" if machine.cpu else "a GPU has"
    return (
        f"a rank of {own.data} x {own.feature} (data x feature) takes {size_text(need(own, lm_bytes))}, "
        f"{size_text(state_bytes(own))} of it weights, gradients and optimizer state; {there} {machine.memory:.4g} GB. "
        f"Wanted one of: {'; '.join(remedies) or 'a smaller model'}"
    )


def time_text(seconds: float) -> str:
    """A time, in the unit that suits it."""
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.3g} s"
