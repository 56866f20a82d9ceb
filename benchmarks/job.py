"""What benchmarks of whole training jobs share: the real command, and a small real store."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from benchmarks import ranks

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
    ranks.train("--prepare", *job, f"run.dir={directory / 'unused'}", processes=1)
    return job
