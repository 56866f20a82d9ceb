"""Kills ranks of a training job, again and again, and compares its end with that of an undisturbed run.

    python benchmarks/chaos.py --kills 50 --json benchmarks/results/chaos.json

One torchrun job with two ranks (`--max-restarts`) trains on the embedded model's activations. Whenever it is running, a
rank chosen at random gets SIGKILL: every other time while a checkpoint is being written (its `.tmp` directory is
there), every other time at a random moment. torchrun restarts the ranks, which go on from the last whole checkpoint.
After the last kill the job runs to its end. Weights, optimizer state, counters and metrics.jsonl must then be those of
an undisturbed run, to the bit. After every kill, each named checkpoint must be readable.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks import ranks
from benchmarks.job import environment, small_job, torchrun
from benchmarks.machine import where

RANKS = 2


def ranks_of(job: subprocess.Popen) -> list[int]:
    """Process ids of the job's ranks."""
    children = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
    found = []
    for child in map(int, children):
        try:
            if b"\0RANK=" in b"\0" + Path(f"/proc/{child}/environ").read_bytes():
                found.append(child)
        except (FileNotFoundError, ProcessLookupError):
            continue  # it ended while we looked
    return found


def unreadable(checkpoints: Path) -> int:
    """How many named checkpoints cannot be read back whole."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    count = 0
    for step in checkpoints.glob("step_????????"):
        try:
            json.loads((step / "state.json").read_text())
            for name in ("model.safetensors", "optimizer.safetensors"):
                load_file(step / name)
        except (OSError, ValueError, SafetensorError):
            count += step.exists()  # it may just have been deleted as the oldest
    return count


def last_step(run: Path) -> int:
    """The last step that metrics.jsonl has."""
    lines = (run / "metrics.jsonl").read_text().splitlines() if (run / "metrics.jsonl").exists() else []
    return json.loads(lines[-1])["step"] if lines and lines[-1].endswith("}") else 0


def disturb(command: list[str], run: Path, kills: int, seed: int) -> dict[str, Any]:
    """Run the job to its end with `kills` SIGKILLs on the way; returns what happened."""
    chance, checkpoints = random.Random(seed), run / "checkpoints"
    done, during, broken, before = 0, 0, 0, -1
    job = subprocess.Popen(command, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while done < kills:
            # The ranks are training: a line was written since they were started.
            while last_step(run) == before or len(ranks_of(job)) < RANKS:
                if job.poll() is not None:
                    raise SystemExit(f"the job ended (status {job.returncode}) after {done} of {kills} kills")
                time.sleep(0.02)
            writing = done % 2 == 0
            until = time.monotonic() + (20 if writing else chance.uniform(0, 0.3))
            while time.monotonic() < until and not (writing and any(checkpoints.glob("*.tmp"))):
                time.sleep(0.001)
            victims = ranks_of(job)
            in_write = any(checkpoints.glob("*.tmp"))
            if len(victims) < RANKS or (writing and not in_write):  # it was over before they were looked up
                continue
            os.kill(chance.choice(victims), signal.SIGKILL)
            done, during = done + 1, during + in_write
            while set(victims) & set(ranks_of(job)) and job.poll() is None:
                time.sleep(0.02)
            before = last_step(run)
            broken += unreadable(checkpoints)
            print(f"kill {done} of {kills} at step {before}{', in a checkpoint write' * in_write}", flush=True)
        status = job.wait()
    finally:
        job.kill()
    if status:
        raise SystemExit(f"the job ended with status {status} after the last kill")
    return {"kills": done, "kills_during_checkpoint": during, "unreadable_checkpoints": broken, "restarts": done}


def differences(ours: Path, theirs: Path) -> int:
    """How many of the runs' tensors, counters and metric lines differ in a bit."""
    from safetensors.torch import load_file

    count = 0
    for name in ("model.safetensors", "optimizer.safetensors"):
        a, b = (load_file(sorted((run / "checkpoints").glob("step_*"))[-1] / name) for run in (ours, theirs))
        count += sum(key not in a or not a[key].equal(b[key]) for key in b)
    a, b = ((run / "metrics.jsonl").read_text().splitlines() for run in (ours, theirs))
    return count + abs(len(a) - len(b)) + sum(x != y for x, y in zip(a, b))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, required=True)
    arguments = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        # Long enough that the kills are over before the end; the last checkpoint but one bounds what a kill loses.
        steps = 40 + 12 * arguments.kills
        job = [*small_job(directory), f"train.steps={steps}", "checkpoint.every=5", "eval.replacement_tokens=0"]
        calm, disturbed = directory / "calm", directory / "disturbed"
        restarts = (f"--max-restarts={arguments.kills}", "--monitor-interval=0.1")
        command = torchrun(*job, f"run.dir={disturbed}", processes=RANKS, options=restarts)
        report = disturb(command, disturbed, arguments.kills, arguments.seed)
        ranks.train(*job, f"run.dir={calm}", processes=RANKS)
        report["differences"] = differences(disturbed, calm)
    report |= {"wall_seconds": time.monotonic() - began, "steps": steps, **where()}
    arguments.json.write_text(json.dumps(report, indent=1, allow_nan=False) + "\n")
    print(json.dumps(report, indent=1, allow_nan=False))
    if report["differences"] or report["unreadable_checkpoints"] or report["kills"] < arguments.kills:
        raise SystemExit("a bar is missed")


if __name__ == "__main__":
    main()
