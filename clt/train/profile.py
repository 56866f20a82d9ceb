"""Profiler traces of a few steps, for TensorBoard."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from clt.train.spec import ProfileConfig


@contextmanager
def profiled(config: ProfileConfig, run_dir: Path, rank: int) -> Iterator[Callable[[], None]]:
    """Write a rank's trace to `run_dir`/profile, if the config asks for it; yields what to call after each step."""
    if not config.enabled:
        yield lambda: None
        return
    schedule = torch.profiler.schedule(wait=config.start - 1, warmup=1, active=config.steps, repeat=1)
    trace = torch.profiler.tensorboard_trace_handler(str(run_dir / "profile"), f"rank{rank}")
    with torch.profiler.profile(schedule=schedule, on_trace_ready=trace) as profiler:
        yield profiler.step
