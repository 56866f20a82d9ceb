"""What this machine's CPU can do."""

from __future__ import annotations

import torch


def multiplies_bf16() -> bool:
    """Whether it has units for bfloat16 (AMX, AVX512-BF16). Without, such a product takes tens of times as long."""
    return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
