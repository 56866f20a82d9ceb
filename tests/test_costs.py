"""The formulas of clt/costs.py against what small steps and real jobs take."""

import json
import os
from dataclasses import replace
from itertools import accumulate, pairwise
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import train_ddp
from benchmarks import ranks, scale
from clt import costs
from clt.config import OptimConfig, load_config
from clt.costs import Job
from clt.model.loss import Objective
from clt.model.spec import CLTConfig, LossConfig
from clt.model.transcoder import CrossLayerTranscoder
from clt.train.ddp import GradientMemory
from clt.train.distributed import Axis
from clt.train.logger import Logger
from clt.train.optim import make_adam

SIZES = [Job(4, 16, 128, 1024), Job(4, 64, 128, 256), Job(6, 64, 256, 8)]  # most memory: features, errors, weights
PRECISIONS = {4: torch.float32, 2: torch.bfloat16}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "window": {"window": 2},
    "per_layer": {"window": 1},
    "skip": {"skip": True},
    "relu": {"activation": "relu"},
    "topk": {"activation": "topk", "k": 4},
    "topk_by_norm": {"activation": "topk", "k": 4, "by_norm": True},
    "batchtopk": {"activation": "batchtopk", "k": 16},
    "pre_activation": {"pre_activation": True},
    "auxk_of_none": {"aux_k": 8},
    "auxk_of_a_quarter": {"aux_k": 8, "dead": 0.25},
}
EVERYTHING = {"window": 3, "skip": True, "activation": "topk", "k": 4, "aux_k": 8, "dead": 0.25}


def objective(job: Job) -> Objective:
    """Of one rank, as train_ddp.py builds it, but for its sum over the other shards."""
    window = None if job.window == 1 else job.window
    rule = {"activation": job.activation, "k": job.k or None, "by_norm": job.by_norm}
    spec = CLTConfig(job.d_features, **rule, cross_layer=job.window != 1, window=window, skip=job.skip)
    transcoder = CrossLayerTranscoder(job.n_layers, job.d_acts, spec, shard=(0, job.feature), sum_shards=Axis().sum)
    loss = LossConfig(pre_activation=float(job.pre_activation), aux=float(job.aux_k > 0), aux_k=job.aux_k or 1)
    objective = Objective(transcoder, loss)
    objective.gradient_memory = GradientMemory(p for p in transcoder.parameters() if p.requires_grad)
    return objective


def draw(job: Job) -> torch.Tensor:
    return torch.randn(job.micro, 2, job.n_layers, job.d_acts)


def loss(model: Objective, job: Job, batch: torch.Tensor | None = None) -> torch.Tensor:
    batch = draw(job) if batch is None else batch
    F = job.d_features // job.feature
    dead = (torch.arange(F) < int(job.dead * F)).expand(job.n_layers, F) if job.aux_k else None
    terms = {"sparsity": 1e-3, "pre_activation": float(job.pre_activation), "aux": float(job.aux_k > 0)}
    with torch.autocast("cpu", torch.bfloat16, enabled=job.width == 2):
        return model(batch, terms, dead=dead).total


@pytest.mark.parametrize("variant", ["plain", "per_layer", "relu", "everything"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("shards", [1, 2])
def test_parameters_and_optimizer_bytes(variant, size, shards):
    job = replace(size, feature=shards, **VARIANTS.get(variant, EVERYTHING))
    model = objective(job)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, fused=True)
    loss(model, replace(job, batch_tokens=4, width=4)).backward()
    optimizer.step()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    moments = [t for state in optimizer.state.values() for t in state.values()]
    assert sum(p.numel() for p in model.parameters()) == costs.parameters(job)
    assert sum(p.numel() for p in trained) == costs.trained_parameters(job)
    assert sum(w.numel() for w in model.transcoder.W_dec) == costs.decoder_parameters(job)
    assert sum(t.nbytes for t in moments) == costs.optimizer_bytes(job)
    assert sum(t.nbytes for t in [*model.parameters(), *gradients, *moments]) == costs.state_bytes(job)


@pytest.mark.parametrize("width", PRECISIONS)
def test_bytes_that_the_decoders_own_adam_keeps(width):
    job = replace(SIZES[0], feature=2, window=2, width=width, row_adam=True)
    named = dict(objective(job).transcoder.named_parameters())
    _, rows = make_adam(named, OptimConfig(decoder="lazy"), 10, PRECISIONS[width])
    assert rows is not None
    kept = [*rows.norms, *rows.last, *rows.sums, *rows.sums, *(t for t in rows.narrow if t is not None)]
    assert sum(t.nbytes for t in kept) == costs.row_adam_bytes(job)
    assert costs.state_bytes(job) - costs.state_bytes(replace(job, row_adam=False)) == costs.row_adam_bytes(job)


@pytest.mark.parametrize("variant", ["plain", "topk", "auxk_of_a_quarter", "everything"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("width", PRECISIONS)
@pytest.mark.parametrize("shards", [1, 2])
def test_bytes_saved_for_backward(variant, size, width, shards):
    job = replace(size, feature=shards, width=width, **VARIANTS.get(variant, EVERYTHING))
    model, batch = objective(job), draw(job)
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers(), batch]}
    saved = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own and tensor.dim():
            saved[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss(model, job, batch)
    assert sum(storage.nbytes() for storage in saved.values()) == costs.saved_bytes(job)


def peak(job: Job) -> int:
    """Of all allocations of a step whose batch is there and whose gradients have their memory already."""
    model, batch = objective(job), draw(job)
    loss(model, job).backward()
    model.gradient_memory.clear()
    for _ in range(job.accumulate - 1):
        loss(model, job, batch).backward()
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with (  # without oneDNN, whose products take scratch memory that differs between CPUs
        torch.backends.mkldnn.flags(enabled=False, allow_tf32=None),
        torch.profiler.profile(activities=cpu, profile_memory=True) as profile,
    ):
        loss(model, job, batch).backward()
    changes = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    return max(accumulate(change.nbytes() for change in sorted(changes, key=lambda e: e.start_ns())))


@pytest.mark.parametrize("variant", [v for v in VARIANTS if v != "batchtopk"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("width", PRECISIONS)
@pytest.mark.parametrize("shards", [1, 2])
def test_the_most_memory_of_a_step(variant, size, width, shards):
    job = replace(size, feature=shards, width=width, **VARIANTS[variant])
    within = 0.09 if variant in ("auxk_of_a_quarter", "pre_activation") else 0.05
    vectors = 4 * 4 * job.n_layers * job.d_features  # (L, F) in float32, which the formula leaves out
    assert peak(job) == pytest.approx(costs.backward_bytes(job), rel=within, abs=vectors)


@pytest.mark.parametrize("width", PRECISIONS)
def test_the_most_memory_of_a_step_with_micro_batches(width):
    for size in SIZES:
        job = replace(size, accumulate=2, width=width)
        assert peak(job) == pytest.approx(costs.backward_bytes(job), rel=0.05)


@pytest.mark.parametrize("width", PRECISIONS)
def test_the_most_memory_of_a_step_with_batchtopk(width):
    """With an odd number of features, for which a CPU searches as a GPU does."""
    job = Job(4, 16, 127, 1024, width=width, activation="batchtopk", k=16)
    assert peak(job) == pytest.approx(costs.backward_bytes(job), rel=0.05)


@pytest.mark.parametrize("dead", [0.5, 1.0])
@pytest.mark.parametrize("size", SIZES)
def test_auxk_takes_no_more_than_its_formula_says(size, dead):
    job = replace(size, width=4, aux_k=8, dead=dead)
    assert 0.75 < peak(job) / costs.backward_bytes(job) < 1.05


@pytest.mark.parametrize("variant", ["plain", "everything"])
@pytest.mark.parametrize("size", SIZES)
def test_flops(variant, size):
    """As torch counts them."""
    job = replace(size, width=4, **VARIANTS.get(variant, EVERYTHING))
    with FlopCounterMode(display=False) as counter:
        loss(objective(job), job).backward()
    assert counter.get_total_flops() == costs.flops(job)


def test_the_recorded_figures_are_those_of_the_formulas():
    recorded = json.loads((Path(scale.__file__).parent / "results" / "scale.json").read_text())
    assert scale.rows() == recorded


def test_a_mesh_divides_the_costs():
    job = Job(12, 768, 6144, 4096)
    placed = Job(12, 768, 6144, 4096, data=4, feature=8)
    biases = 12 * 768
    assert 8 * (costs.parameters(placed) - biases) == costs.parameters(job) - biases
    assert 32 * costs.flops(placed) == costs.flops(job)
    assert costs.gradient_bytes(job) == costs.reconstruction_bytes(job) == 0


def train_and_count(*arguments: str) -> None:
    """A run; what this rank had written by the end of each step goes to a file in the run directory."""
    written, step = [], Logger.step

    def probe(logger: Logger, finished: int) -> None:
        step(logger, finished)
        counters = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
        written.append(int(counters["wchar"]))

    Logger.step = probe
    config = load_config(arguments[0], arguments[1:])
    train_ddp.main(config, prepare=False)
    Path(config.run.dir, f"written-{os.environ['RANK']}.json").write_text(json.dumps(written))


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="needs Linux's counters of bytes written")
def test_bytes_that_data_parallel_ranks_send(train_overrides, tmp_path, monkeypatch):
    """What each process hands to its sockets in a step of the real loop, as the kernel counts it."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    size = 3
    options = ["clt.d_features=512", "log.every=100", "eval.every=0", "eval.replacement_tokens=0"]
    ranks.run(train_and_count, *train_overrides, *options, f"run.dir={tmp_path}", processes=size)
    counts = [json.loads((tmp_path / f"written-{rank}.json").read_text()) for rank in range(size)]
    steps = [[after - before for before, after in pairwise(count)] for count in counts]
    wanted = costs.gradient_bytes(Job(3, 16, 512, 60, data=size))
    assert sum(map(median, steps)) / size == pytest.approx(wanted, rel=0.02)
