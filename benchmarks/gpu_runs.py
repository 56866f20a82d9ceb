"""The parts of gpu.py that train: whole runs by the real command, interrupted ones, and those of several ranks."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import parity
from benchmarks import ranks as forked
from benchmarks.job import ROOT, environment, torchrun

Found = dict[str, Any]
STEPS = 40


def resume(rehearsal: bool) -> Found:
    """40 steps in one go, and 20 and 20 more in another process, twice: the same bytes. A rehearsal does so once.

    Each process compiles with empty caches, so that whatever is chosen by timing is chosen anew.
    """
    names = ["half_a"] if rehearsal else ["half_a", "half_b"]
    with tempfile.TemporaryDirectory() as directory:
        base = Path(directory)
        job = _job(base, rehearsal, "bf16")
        whole = _start(base, "whole", job, 1)
        _finish(whole)
        halves = [_resume(base, name, job, 1) for name in names]
        for half in halves:  # at once
            _finish(half)
        digests = {name: _digest(base / name) for name in ("whole", *names)}
        return {"ok": len(set(digests.values())) == 1, "digests": digests, "speed": _speed(base / "whole")}


def layouts(rehearsal: bool, ranks: int) -> Found:
    """Runs in the layouts (data x feature) of `ranks` ranks: as one rank's, resumed to the bit, one process a GPU.

    A rehearsal has the last layout alone.
    """
    shapes = list(dict.fromkeys([(ranks, 1), (2, ranks // 2), (1, ranks)]))  # two ranks have only two
    shapes = shapes[-1:] if rehearsal else shapes
    rows, ok = {}, True
    with tempfile.TemporaryDirectory() as directory:
        base = Path(directory)
        job = _job(base, rehearsal, "fp32")  # whose layouts differ by the order of additions alone
        _finish(_start(base, "1x1", job, 1))
        reference = parity.outcome(base / "1x1")["weights"]
        for data, feature in shapes:
            name, layout = f"{data}x{feature}", [*job, f"parallel.feature_shards={feature}"]
            run = _start(base, name, layout, ranks)
            processes = None if rehearsal else _processes_on_gpus(run, base / name)
            _finish(run)
            _finish(_resume(base, f"{name}_half", layout, ranks))
            digests = {run: _digest(base / run) for run in (name, f"{name}_half")}
            difference = parity.difference(parity.outcome(base / name)["weights"], reference)
            rows[name] = {"digests": digests, "difference_from_one_rank": difference, **_speed(base / name)}
            rows[name]["processes_on_gpus"] = processes
            ok &= len(set(digests.values())) == 1 and difference < 1e-3
            ok &= not processes or list(processes.values()) == [1] * ranks  # some containers show none
    return {"ok": ok, "ranks": ranks, "layouts": rows}


def overlap(rehearsal: bool, ranks: int) -> Found:
    """Steps of 1 x `ranks` feature shards that sum y~ layer by layer while they compute, and at the end; by turns."""
    with tempfile.TemporaryDirectory() as directory:
        forked.run(_shard_steps, Path(directory, "found"), rehearsal, processes=ranks)
        return json.loads(Path(directory, "found").read_text())


def _shard_steps(file: Path, rehearsal: bool) -> None:
    """The steps of this rank; rank 0 writes what it found. The two may differ by the order of additions alone."""
    import torch

    from benchmarks import machine, step
    from clt.train import ddp
    from clt.train import distributed as dist
    from clt.train.metrics import coefficients

    world = dist.setup(int(os.environ["WORLD_SIZE"]), 60)
    L, D, F, B = (3, 16, 64, 64) if rehearsal else (12, 768, 32768, 4096)
    torch.manual_seed(0)
    batch = torch.randn(B, 2, L, D).to(world.device)
    objective = step.objective(F, batch, f"train.compile={not rehearsal}", feature=world.feature)
    memory = objective.gradient_memory = ddp.GradientMemory(objective.parameters())
    begin_sum = None if world.size == 1 else world.feature.begin_sum
    ways, terms = {"at_end": None, "early": begin_sum}, coefficients(1, 1, objective.loss)
    times: dict[str, list[float]] = {name: [] for name in ways}
    decoders: dict[str, torch.Tensor] = {}

    def train() -> None:
        memory.clear()
        with torch.autocast(world.device.type, torch.bfloat16, enabled=not rehearsal):
            losses = objective(batch, terms)
        losses.total.backward()

    for turn in range(3 if rehearsal else 12):
        for name, way in ways.items():
            objective.begin_sum = way
            took = machine.seconds(train, world.device)
            times[name] += [took] if turn > 1 else []  # the first ones compile
            decoders[name] = objective.transcoder.W_dec[0].grad.clone()
    difference = ((decoders["early"] - decoders["at_end"]).norm() / decoders["at_end"].norm()).item()
    if world.rank == 0:
        ms = {f"{name}_ms": statistics.median(taken) * 1e3 for name, taken in times.items()}
        found = {"ok": difference < 2**-8, "shape": [L, D, F, B], "difference": difference, **ms}
        file.write_text(json.dumps(found))
    dist.cleanup()


def _job(base: Path, rehearsal: bool, precision: str) -> list[str]:
    """Arguments of a job on activations of the embedded model, which the first run extracts."""
    tokens, features, batch = (3000, 64, 61) if rehearsal else (60_000, 4096, 1024)
    return [
        "configs/quickstart.yaml", f"data.store={base / 'store'}", f"data.train_tokens={tokens}",
        "data.heldout_tokens=1000", "data.shard_rows=1000", f"clt.d_features={features}", f"train.batch_tokens={batch}",
        f"train.steps={STEPS}", f"checkpoint.every={STEPS // 2}", "eval.replacement_tokens=0", "clt.threshold=0.3",
        "optim.lr=1e-3",
        f"train.compile={not rehearsal}", f"train.precision={'fp32' if rehearsal else precision}",
    ]  # fmt: skip


def _start(base: Path, name: str, job: list[str], ranks: int) -> subprocess.Popen[str]:
    """Train into `base / name`, with compiler caches of its own."""
    arguments = [*job, f"run.dir={base / name}"]
    caches = {"TORCHINDUCTOR_CACHE_DIR": f"{base}/inductor_{name}", "TRITON_CACHE_DIR": f"{base}/triton_{name}"}
    command = torchrun(*arguments, processes=ranks) if ranks > 1 else [sys.executable, "train_ddp.py", *arguments]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment() | caches, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )


def _resume(base: Path, name: str, job: list[str], ranks: int) -> subprocess.Popen[str]:
    """Go on from the middle of the run that `name` is a half of: as if it had been killed there."""
    whole = base / (name.removesuffix("_half") if name.endswith("_half") else "whole")
    shutil.copytree(whole, base / name)
    shutil.rmtree(base / name / "checkpoints" / f"step_{STEPS:08d}")
    return _start(base, name, job, ranks)


def _finish(run: subprocess.Popen[str]) -> None:
    errors = run.communicate()[1]
    assert run.returncode == 0, errors[-20_000:]  # torchrun's own report comes last


def _digest(run: Path) -> str:
    """Of the weights and the optimizer's state after the last step."""
    folder = run / "checkpoints" / f"step_{STEPS:08d}"
    files = [folder / name for name in ("model.safetensors", "optimizer.safetensors")]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def _speed(run: Path) -> Found:
    """Of the last steps."""
    last = json.loads((run / "speed.jsonl").read_text().splitlines()[-1])
    return {key: last[key] for key in ("tokens_per_second", "data_wait_share")}


def _processes_on_gpus(run: subprocess.Popen[str], directory: Path) -> dict[str, int]:
    """How many processes have a context on each GPU while the run takes its steps, as nvidia-smi says."""
    while run.poll() is None and not (directory / "speed.jsonl").exists():
        time.sleep(0.05)
    query = ["nvidia-smi", "--query-compute-apps=gpu_uuid,pid", "--format=csv,noheader"]
    lines = subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()
    gpus = [line.split(",")[0] for line in lines]
    return {gpu: gpus.count(gpu) for gpu in sorted(set(gpus))}
