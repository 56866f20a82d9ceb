"""What this machine is, what it can do at most, and how much memory a process came to use."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parent.parent
PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def where() -> dict[str, Any]:
    """The device in words, versions, commit and command: what every recorded result says of itself."""
    commit = os.environ.get("CLT_COMMIT", "")  # for a copy of the tree without its history
    if (ROOT / ".git").exists():
        git = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
        commit = subprocess.run(git, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else _cpu(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda},
        "commit": commit,
        "command": " ".join(["python", *sys.argv]),
    }


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    name = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())
    return f"{name}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}"


def seconds(work: Callable[[], Any], device: torch.device) -> float:
    """Wall time of one call, the device's work included."""
    wait(device)
    start = time.perf_counter()
    work()
    wait(device)
    return time.perf_counter() - start


def wait(device: torch.device) -> None:
    """Until the device has done everything that was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def matmul(n: int, dtype: torch.dtype, device: torch.device) -> Callable[[int], float]:
    """A function of a count: the best TFLOP/s of so many products of two (n, n) matrices, one after the other."""
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    torch.mm(a, b, out=out)
    return lambda count: 2 * n**3 / min(seconds(lambda: torch.mm(a, b, out=out), device) for _ in range(count)) / 1e12


def matmul_peak(dtype: torch.dtype, device: torch.device, budget: float) -> tuple[float, int]:
    """The best TFLOP/s of square matrix products, and their n. They grow while the next takes less than `budget` s.

    Small sizes alone where a precision is slow: bf16 on a CPU without instructions for it.
    """
    best, n, limit = (0.0, 0), 256, 16384 if device.type == "cuda" else 4096
    while True:
        rate = matmul(n, dtype, device)(5)
        best = max(best, (rate, n))
        if n == limit or 8 * 2 * n**3 / (rate * 1e12) > budget:
            return best
        n *= 2


def copy_bandwidth(device: torch.device) -> float:
    """GB/s of `copy_` between two tensors far larger than the caches, read and written bytes counted."""
    size = 1 << (32 if device.type == "cuda" else 28)
    a = torch.ones(size, dtype=torch.uint8, device=device)
    b = torch.zeros_like(a)
    return 2 * size / min(seconds(lambda: b.copy_(a), device) for _ in range(7)) / 1e9


def reset_peak(device: torch.device) -> int:
    """Start counting the peak memory anew; returns the bytes in use now."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark of the resident set
    return _resident("VmRSS")


def peak(device: torch.device) -> int:
    """The most bytes in use since `reset_peak`: of the allocator on CUDA, resident on the CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _resident("VmHWM")


def _resident(field: str) -> int:
    status = Path("/proc/self/status").read_text().split(field + ":")[1]
    return int(status.split()[0]) * 1024
