"""The schedules, as pure functions of the step, and the precision that a device multiplies matrices in."""

from __future__ import annotations

import torch

from clt.config import LossConfig, OptimConfig

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def learning_rate(step: int, steps: int, config: OptimConfig) -> float:
    """Rate of step 0, 1, ..: a linear warm-up from 0, constant, and a linear decay that would reach 0 at `steps`."""
    warmup, decay = config.warmup * steps, config.decay * steps
    rise = (step + 1) / warmup if step + 1 < warmup else 1.0
    fall = (steps - step) / decay if steps - step < decay else 1.0
    return config.lr * min(rise, fall)


def sparsity_coefficient(step: int, steps: int, config: LossConfig) -> float:
    """lambda(t) of step 0, 1, ..: linear from 0 over the ramp's share of the run, then constant."""
    ramp = config.sparsity_ramp * steps
    return config.sparsity * min(1.0, step / ramp if ramp else 1.0)


def autocast_dtype(precision: str, device: torch.device) -> torch.dtype:
    """The dtype of matrix products; `auto` is bf16 where the hardware multiplies bf16 natively, else float32.

    On a CPU without AMX or AVX512-BF16 a bf16 product runs hundreds of times slower than a float32 one.
    """
    if precision != "auto":
        return DTYPES[precision]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float32
    native = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if native else torch.float32
