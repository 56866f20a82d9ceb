"""Ranks that are told to stop, that hang, and that meet numbers which are not finite."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import train_ddp
from benchmarks import ranks as forked
from clt.config import load_config
from clt.data.index import read_index
from clt.data.shards import dataset_offsets
from clt.errors import UserError
from clt.train import checkpoint
from clt.train.optim import Update
from clt.train.watch import HUNG, PREEMPTED
from tests.distributed.test_torchrun import ROOT

STEPS = 200  # many more than a job takes until it is stopped


def start(*arguments: str, run_dir: Path) -> subprocess.Popen:
    """A long job of two ranks under torchrun."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += ["train_ddp.py", *arguments, f"run.dir={run_dir}", f"train.steps={STEPS}", "eval.replacement_tokens=0"]
    return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)


def wait_for_steps(job: subprocess.Popen, run_dir: Path) -> None:
    while not (run_dir / "metrics.jsonl").exists() or not (run_dir / "metrics.jsonl").stat().st_size:
        assert job.poll() is None, job.communicate()[1]
        time.sleep(0.05)


def train_and_signal_rank_one(*arguments: str) -> None:
    """SIGUSR1 comes to one rank in the middle of step 13."""
    call = Update.__call__

    def probe(update: Update, step: int, *more: Any) -> torch.Tensor:
        if step == 13 and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGUSR1)
        return call(update, step, *more)

    Update.__call__ = probe
    sys.exit(train_ddp.main(load_config(arguments[0], arguments[1:]), prepare=False))


def test_a_signal_to_one_rank_stops_all_with_a_checkpoint(train_overrides, tmp_path):
    options = [f"train.steps={STEPS}", "eval.replacement_tokens=0", f"run.dir={tmp_path}"]
    with pytest.raises(RuntimeError, match=rf"status \[{PREEMPTED}, {PREEMPTED}\]") as ended:
        forked.run(train_and_signal_rank_one, *train_overrides, *options, processes=2)
    (step,) = checkpoint.steps(tmp_path / "checkpoints")
    assert 13 <= step < STEPS
    assert f"stopped after step {step} of {STEPS}, with a checkpoint" in str(ended.value)
    assert not list((tmp_path / "checkpoints").glob("*.tmp"))
    logged = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert logged == list(range(5, step + 1, 5)), "no line that an undisturbed run would not have"


def test_sigterm_to_torchrun_is_the_same_and_the_run_goes_on(train_overrides, train, tmp_path):
    job = start(*train_overrides, run_dir=tmp_path / "stopped")
    wait_for_steps(job, tmp_path / "stopped")
    job.send_signal(signal.SIGTERM)
    job.communicate(timeout=240)
    (step,) = checkpoint.steps(tmp_path / "stopped" / "checkpoints")
    assert 0 < step < STEPS
    # In another layout (one process) from there to the end.
    end = train(f"train.steps={STEPS}", f"run.dir={tmp_path / 'stopped'}", "eval.replacement_tokens=0")
    assert end.summary["steps"] == STEPS
    assert end.metrics[0]["step"] == 5


def train_and_stop_rank_one(victim: Path, *arguments: str) -> None:
    """Rank 1 stands still in the middle of step 13. Rank 0, when it has said so, kills it, as torchrun would later."""
    call, leave = Update.__call__, os._exit

    def probe(update: Update, step: int, *more: Any) -> torch.Tensor:
        if step == 13 and os.environ["RANK"] == "1":
            victim.write_text(str(os.getpid()))
            os.kill(os.getpid(), signal.SIGSTOP)
        return call(update, step, *more)

    def leave_none(status: int) -> None:
        os.kill(int(victim.read_text()), signal.SIGKILL)
        leave(status)

    Update.__call__, os._exit = probe, leave_none
    train_ddp.main(load_config(arguments[0], arguments[1:]), prepare=False)


def test_a_rank_that_hangs_is_named(train_overrides, tmp_path):
    options = [f"train.steps={STEPS}", "eval.replacement_tokens=0", "parallel.timeout_seconds=10"]
    arguments = [tmp_path / "victim", *train_overrides, *options, f"run.dir={tmp_path / 'run'}"]
    with pytest.raises(RuntimeError, match=rf"status \[{HUNG}, -9\]") as ended:
        forked.run(train_and_stop_rank_one, *arguments, processes=2)
    (line,) = [line for line in str(ended.value).splitlines() if "no progress since step" in line]
    victim = (tmp_path / "victim").read_text()
    assert line.startswith("[rank 0] error: no progress since step 1"), line
    assert line.endswith(f"pid {victim}) stopped answering (stopped, or cut off from the network)"), line
    assert "seconds=10: rank 1 (" in line


@pytest.fixture
def poisoned(stores, tmp_path):
    """A copy of the stores in which one row of the training store holds a NaN."""
    copy = shutil.copytree(stores, tmp_path / "poisoned")
    file = copy / "train" / "shard_00000.h5"
    index = read_index(copy / "train")
    offsets = dataset_offsets(file, index.shards[0]["rows"], index.n_layers, index.d_acts, index.dtype)
    with file.open("r+b") as shard:
        shard.seek(offsets["tensor"])
        shard.write(torch.full((1,), float("nan"), dtype=torch.float16).numpy().tobytes())
    return copy


def test_a_nonfinite_loss_stops_the_run_and_is_named(train, poisoned):
    with pytest.raises(
        UserError, match=r"train_mse was not finite at step \d+; no weights changed since.*nonfinite=skip"
    ):
        train(f"data.store={poisoned}", "train.steps=17")


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_nonfinite_loss_can_be_skipped(train, poisoned, precision):
    """1000 rows in batches of 60 over 17 steps: every row comes once, so one step is left out."""
    options = [f"data.store={poisoned}", "train.steps=17", "train.nonfinite=skip", "log.every=1"]
    run = train(*options, f"train.precision={precision}", "train.accumulate=2")
    assert all(tensor.isfinite().all() for tensor in run.weights.values())
    skipped = [line["skipped_steps"] for line in run.metrics if "skipped_steps" in line]
    bad = [line["step"] for line in run.metrics if line.get("train_mse", 0) is None]
    assert len(bad) == 1
    assert skipped[bad[0] - 1] == skipped[bad[0] - 2] + 1 if bad[0] > 1 else skipped[0] == 1
    if precision == "fp32":
        assert skipped[-1] == len(bad)


def train_and_count_skips(*arguments: str) -> None:
    """How many steps this rank had skipped after each goes to a file in the run directory."""
    skipped, call = [], Update.__call__

    def probe(update: Update, *more: Any) -> torch.Tensor:
        norm = call(update, *more)
        skipped.append(update.skipped.item())
        return norm

    Update.__call__ = probe
    config = load_config(arguments[0], arguments[1:])
    try:
        train_ddp.main(config, prepare=False)
    finally:
        Path(config.run.dir, f"{os.environ['RANK']}.json").write_text(json.dumps(skipped))


def test_ranks_freeze_together(poisoned, train_overrides, tmp_path):
    """Under fp16 only one rank sees a loss that is not finite, the others a gradient that could be an overflow's."""
    options = ["train.steps=17", "log.every=17", "train.precision=fp16", f"data.store={poisoned}"]
    options += ["parallel.feature_shards=2", "eval.replacement_tokens=0", f"run.dir={tmp_path}"]
    with pytest.raises(RuntimeError, match="UserError: train_mse was not finite at step"):
        forked.run(train_and_count_skips, *train_overrides, *options, processes=4)
    first, *others = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(4))
    assert len(first) == 17
    assert first[-1] == first[-5] + 4, "frozen before the last step"
    assert first[0] < first[-1]
    assert others == [first] * 3


def test_ranks_agree_to_skip(train, poisoned, train_overrides, tmp_path):
    """Only one rank reads the bad row: the others must leave the step out as well, in every layout."""
    options = ["train.steps=17", "train.nonfinite=skip", "log.every=1", "train.accumulate=2", f"data.store={poisoned}"]
    options.append("eval.replacement_tokens=0")
    alone = train(*options)
    layout = ["parallel.feature_shards=2", f"run.dir={tmp_path / 'ranks'}"]
    forked.train(*train_overrides, *options, *layout, processes=4)
    path = tmp_path / "ranks" / "checkpoints" / "step_00000017"
    for name, tensor in checkpoint.load_transcoder(path).state_dict().items():
        torch.testing.assert_close(tensor, alone.weights[name], rtol=1e-4, atol=1e-5)
