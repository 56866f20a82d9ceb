"""The formulas of benchmarks/scale.py against what small steps and real jobs take."""

import json
import os
from itertools import pairwise
from pathlib import Path
from statistics import median

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import train_ddp
from benchmarks import ranks, scale
from benchmarks.scale import Job
from clt.config import load_config
from clt.model.loss import Objective
from clt.model.spec import CLTConfig, LossConfig
from clt.model.transcoder import CrossLayerTranscoder
from clt.train.distributed import Axis, GradientMemory
from clt.train.logger import Logger

SIZES = [Job(4, 16, 128, 1024), Job(4, 64, 128, 256), Job(6, 64, 256, 8)]  # most memory: features, errors, weights
PRECISIONS = {4: torch.float32, 2: torch.bfloat16}


def objective(job: Job) -> Objective:
    """Of one rank, as train_ddp.py builds it, but for its sum over the other shards."""
    spec, shard = CLTConfig(d_features=job.d_features), (0, job.feature)
    transcoder = CrossLayerTranscoder(job.n_layers, job.d_acts, spec, shard=shard, sum_shards=Axis().sum)
    objective = Objective(transcoder, LossConfig())
    objective.gradient_memory = GradientMemory(transcoder.parameters())
    return objective


def draw(job: Job) -> torch.Tensor:
    return torch.randn(job.batch_tokens, 2, job.n_layers, job.d_acts)


def loss(model: Objective, job: Job, batch: torch.Tensor | None = None) -> torch.Tensor:
    batch = draw(job) if batch is None else batch
    with torch.autocast("cpu", torch.bfloat16, enabled=job.width == 2):
        return model(batch, {"sparsity": 1e-3, "pre_activation": 0.0, "aux": 0.0}).total


@pytest.mark.parametrize("job", SIZES)
def test_parameters_and_optimizer_bytes(job):
    model = objective(job)
    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    loss(model, Job(job.n_layers, job.d_acts, job.d_features, 4, width=4)).backward()
    optimizer.step()
    tensors = [*model.parameters(), *(p.grad for p in model.parameters())]
    moments = [t for state in optimizer.state.values() for t in state.values()]
    assert sum(p.numel() for p in model.parameters()) == scale.parameters(job)
    assert sum(w.numel() for w in model.transcoder.W_dec) == scale.decoder_parameters(job)
    assert sum(t.nbytes for t in moments) == scale.optimizer_bytes(job)
    assert sum(t.nbytes for t in [*tensors, *moments]) == scale.state_bytes(job)


@pytest.mark.parametrize("job", SIZES)
@pytest.mark.parametrize("width", PRECISIONS)
@pytest.mark.parametrize("shards", [1, 2])
def test_bytes_saved_for_backward(job, width, shards):
    job = Job(job.n_layers, job.d_acts, job.d_features, job.batch_tokens, feature=shards, width=width)
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
    assert sum(storage.nbytes() for storage in saved.values()) == scale.saved_bytes(job)


@pytest.mark.parametrize("job", SIZES)
@pytest.mark.parametrize("width", PRECISIONS)
@pytest.mark.parametrize("shards", [1, 2])
def test_the_most_memory_of_a_step(job, width, shards):
    """Every allocation of a step whose batch is there and whose gradients have their memory already."""
    job = Job(job.n_layers, job.d_acts, job.d_features, job.batch_tokens, feature=shards, width=width)
    model, batch = objective(job), draw(job)
    loss(model, job).backward()
    model.gradient_memory.clear()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        loss(model, job, batch).backward()
    changes = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for change in sorted(changes, key=lambda e: e.start_ns()):
        held += change.nbytes()
        peak = max(peak, held)
    assert peak == pytest.approx(scale.backward_bytes(job), rel=0.05)


@pytest.mark.parametrize("job", SIZES)
def test_flops(job):
    """As torch counts them."""
    job = Job(job.n_layers, job.d_acts, job.d_features, job.batch_tokens, width=4)
    with FlopCounterMode(display=False) as counter:
        loss(objective(job), job).backward()
    assert counter.get_total_flops() == scale.flops(job)


def test_a_mesh_divides_the_costs():
    job = Job(12, 768, 6144, 4096)
    placed = Job(12, 768, 6144, 4096, data=4, feature=8)
    biases = 12 * 768
    assert 8 * (scale.parameters(placed) - biases) == scale.parameters(job) - biases
    assert 32 * scale.flops(placed) == scale.flops(job)
    assert scale.gradient_bytes(job) == scale.reconstruction_bytes(job) == 0


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
    wanted = scale.gradient_bytes(Job(3, 16, 512, 60, data=size))
    assert sum(map(median, steps)) / size == pytest.approx(wanted, rel=0.02)
