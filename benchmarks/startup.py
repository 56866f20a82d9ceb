"""How long it takes until a command answers, and a run on an existing store has taken its first step."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
SMALL = ["configs/quickstart.yaml", "data.train_tokens=20000", "data.heldout_tokens=1000", "log.every=1"]


def startup() -> dict[str, float]:
    """Seconds until `train_ddp.py --help`, a config error, `clt inspect` and the first logged step of a run.

    The run is one process on an existing store: eager, compiled with empty caches, and compiled again.
    """
    with tempfile.TemporaryDirectory() as directory:
        common = [*SMALL, f"data.store={directory}/store", f"run.dir={directory}/run"]
        _run(["train_ddp.py", "--prepare", *common], status=0)
        compiled = ["train.compile=true"]
        return {
            "help_s": _run(["train_ddp.py", "--help"], status=0),
            "config_error_s": _run(["train_ddp.py", "train.steps=none"], status=2),
            "inspect_s": _run(["-m", "clt.cli", "inspect", f"{directory}/store/train"], status=0),
            "first_step_s": _first_step(common, directory, "eager"),
            "first_compiled_step_s": _first_step([*common, *compiled], directory, "compiled"),
            "first_compiled_step_again_s": _first_step([*common, *compiled], directory, "again"),
        }


def _run(command: list[str], status: int) -> float:
    start = time.perf_counter()
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == status, done.stderr
    return time.perf_counter() - start


def _first_step(arguments: list[str], directory: str, name: str) -> float:
    run = Path(directory, name)
    command = [sys.executable, "train_ddp.py", *arguments, f"run.dir={run}"]
    env = os.environ | {"TORCHINDUCTOR_CACHE_DIR": f"{directory}/compiled"}
    start = time.perf_counter()
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=env) as process:
        metrics = run / "metrics.jsonl"
        while not (metrics.exists() and metrics.stat().st_size):
            assert process.poll() is None, f"{' '.join(command)} ended with status {process.returncode}"
            time.sleep(0.01)
        took = time.perf_counter() - start
        process.kill()
    return took
