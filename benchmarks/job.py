"""What benchmarks of whole training jobs share: the real command, a small real store, the place it was measured."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent


def torchrun(*arguments: str, processes: int, options: tuple[str, ...] = ()) -> list[str]:
    """The command that trains with `processes` ranks; `options` are torchrun's."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return [*command, *options, str(ROOT / "train_ddp.py"), *arguments]


def environment() -> dict[str, str]:
    """One thread a rank, as they share few cores; and a store for each restart (see launch.sh)."""
    return os.environ | {"OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}


def small_job(directory: Path) -> list[str]:
    """Arguments for a job on 8,192 tokens of the embedded model, extracted into `directory` the first time."""
    job = [
        str(ROOT / "configs" / "quickstart.yaml"), f"data.store={directory / 'store'}", "data.train_tokens=8192",
        "data.heldout_tokens=1024", "data.shard_rows=1024", "data.open_shards=4", "clt.d_features=256",
        "train.steps=20", "train.batch_tokens=509", "eval.replacement_tokens=512", "eval.dead_window=1018",
        "log.every=1", "optim.lr=2e-3", "clt.threshold=1.0",
    ]  # fmt: skip
    command = [sys.executable, str(ROOT / "train_ddp.py"), "--prepare", *job, f"run.dir={directory / 'unused'}"]
    subprocess.run(command, check=True, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return job


def where() -> dict[str, Any]:
    """Machine, versions, commit and command, for a recorded result."""
    import torch

    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "device": gpu or f"{cpu}, {os.cpu_count()} cores",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": git.stdout.strip(),
        "command": " ".join(["python", *sys.argv]),
    }
