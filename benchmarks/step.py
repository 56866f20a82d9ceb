"""One training step of one shape: its time, its arithmetic, its memory, and what the machine would allow."""

from __future__ import annotations

import math
import statistics
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import machine
from benchmarks.textbook import Textbook
from clt.config import load_config
from clt.data.store import DiscBuffer
from clt.data.writer import write_store
from clt.train.optim import autocast_dtype
from clt.train.run import build

WARMUP, TIMED = 3, 10


def parameters(L: int, D: int, F: int) -> int:
    """Parameters of a cross-layer transcoder: W_enc, the packed W_dec, b_enc and threshold, b_dec."""
    return L * D * F + L * (L + 1) // 2 * F * D + 2 * L * F + L * D


def flops(L: int, D: int, F: int, B: int) -> int:
    """Multiplications and additions that a step needs: the encoder has no gradient to its input, and no zero block of
    the decoder counts."""
    encoder, decoder = L * D * F, L * (L + 1) // 2 * F * D
    return B * (4 * encoder + 6 * decoder)


def unavoidable_bytes(L: int, D: int, F: int, B: int, width: int) -> int:
    """Bytes that a step must move besides its matrix products' operands, with activations of `width` bytes.

    Adam reads weight, gradient and two moments and writes three (28 bytes a parameter), the gradient's norm reads it
    (4), a cast to `width` reads 4 and writes `width`. Features and pre-activations are written once and read once in
    each direction, their gradient is written and read, and the batch is read.
    """
    cast = 4 + width if width < 4 else 0
    return parameters(L, D, F) * (28 + 4 + cast) + 6 * B * L * F * width + 2 * B * L * D * 4


def formula_memory(L: int, D: int, F: int, B: int, width: int) -> int:
    """Bytes that a step needs at its peak, with activations of `width` bytes.

    Weight, gradient and two moments in float32; weights once more in `width` if that is less; features and
    pre-activations kept for the backward pass and one gradient of their size; normalised input, target and
    reconstruction in float32; and the batch.
    """
    cast = width if width < 4 else 0
    return parameters(L, D, F) * (16 + cast) + B * L * (3 * F * width + 3 * D * 4 + 2 * D * 4)


def measure(case: dict[str, Any], peaks: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Run the step of `case` {L, D, F, B, precision, variant} and return the case with what came out.

    Variants: `ours` and `textbook`, each also with `_compiled`. Memory is what building and running takes.
    """
    L, D, F, B = (case[key] for key in "LDFB")
    dtype = autocast_dtype(case["precision"], device)
    before = machine.reset_peak(device)
    batch = torch.randn(B, 2, L, D, device=device)
    step = prepare(case, batch)
    times = [machine.seconds(lambda: step(batch), device) for _ in range(WARMUP + TIMED)][WARMUP:]
    used = machine.peak(device) - before
    took, work = statistics.median(times), flops(L, D, F, B)
    precision = {value: key for key, value in machine.PRECISIONS.items()}[dtype]
    limit = peaks["matmul_peak_tflops"][precision] * 1e12
    bytes_ = unavoidable_bytes(L, D, F, B, dtype.itemsize)
    roofline = work / limit + bytes_ / (peaks["copy_gb_per_s"] * 1e9)
    return {
        **case,
        "precision": precision,
        "seconds": took,
        "tokens_per_s": B / took,
        "tflops": work / took / 1e12,
        "share_of_peak": work / took / limit,
        "roofline_seconds": roofline,
        "roofline_share": roofline / took,
        "peak_memory_gb": used / 1e9,
        "formula_memory_gb": formula_memory(L, D, F, B, dtype.itemsize) / 1e9,
    }


def prepare(case: dict[str, Any], batch: Tensor) -> Callable[[Tensor], None]:
    """A step as train_ddp.py takes it, of batches (B, 2, L, D) like `batch`, whose statistics normalise them."""
    device, config = batch.device, load_config(None, [f"clt.d_features={case['F']}"])
    dtype = autocast_dtype(case["precision"], device)
    with tempfile.TemporaryDirectory() as directory:
        write_store(directory, batch[:64].float().cpu())
        objective = build(config, DiscBuffer(directory)).to(device)
    textbook, compiled = (word in case["variant"] for word in ("textbook", "compiled"))
    model: nn.Module = Textbook(objective) if textbook else objective
    del objective
    called = torch.compile(model) if compiled else model
    weights = [p for p in model.parameters() if p.requires_grad]
    beta1, beta2 = config.optim.betas
    optimizer = torch.optim.Adam(weights, config.optim.lr, (beta1, beta2), config.optim.eps, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    sparsity = torch.tensor(config.loss.sparsity, device=device)

    def step(batch: Tensor) -> None:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            terms = called(batch, sparsity)
        scaler.scale(terms if textbook else terms.loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(weights, config.optim.clip_norm or math.inf)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

    return step
