"""The parts of gpu.py that a run's numbers hang on: each gives `ok` and what it saw."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch._dynamo
from torch import Tensor, nn

from benchmarks import step
from benchmarks.machine import PRECISIONS, ROOT
from benchmarks.textbook import Textbook
from clt.model.loss import Losses, Objective
from clt.train.metrics import coefficients

Found = dict[str, Any]
TESTS = ["tests/train/test_cuda.py", "tests/data/test_loader.py", "tests/train/test_optim.py"]


def device_of(rehearsal: bool) -> torch.device:
    """Where the parts run."""
    return torch.device("cpu") if rehearsal else torch.device("cuda", 0)


def tests(rehearsal: bool) -> Found:
    """The tests of what only CUDA does. Those that compile are left out: `waits` compiles the same step."""
    files = [*TESTS, "tests/benchmarks/test_textbook.py"][: 1 if rehearsal else None]
    # Without the project's own options, which want plugins and make errors of another version's warnings.
    options = ["-c", os.devnull, "--rootdir", str(ROOT), "--import-mode=importlib", "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", "-q", *options, "-k", "not true", *files]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    return {"ok": done.returncode == 0, "tail": done.stdout.splitlines()[-12:]}


def gradients(rehearsal: bool) -> Found:
    """Loss and gradients against float64 on the CPU, as relative norms of the difference; the same bits when repeated.

    fp32 must be within 1e-4; bf16 and fp16 within 1.5 times the textbook's step in bf16, or 2^-8, for each parameter.
    """
    device, rows = device_of(rehearsal), []
    for L, D, F, B in [(3, 16, 24, 63)] if rehearsal else [(6, 256, 2048, 1024), (3, 40, 24, 1023)]:
        torch.manual_seed(0)
        batch = torch.randn(B, 2, L, D)
        overrides = ["clt.threshold=0.1", "clt.bandwidth=0.5", "loss.sparsity=0.03", "loss.sparsity_scale=0.7"]
        exact = step.objective(F, batch, *overrides, "train.compile=false").double()
        for name, parameter in exact.named_parameters():
            if name.rpartition(".")[2] in ("b_enc", "b_dec"):
                nn.init.normal_(parameter, std=0.1)
        batch = _away_from_edges(exact, batch)
        truth, state = _gradients(exact, batch.double(), None), exact.state_dict()
        on_device = step.objective(F, batch.to(device), *overrides, "train.compile=false")
        on_device.load_state_dict(state)
        reference = _errors(_gradients(Textbook(on_device), batch.to(device), torch.bfloat16), truth)
        rows.append({"shape": [L, D, F, B], "textbook_bf16": reference})
        for compiled in (False,) if rehearsal else (False, True):
            model = step.objective(F, batch.to(device), *overrides, f"train.compile={compiled}")
            model.load_state_dict(state)
            for precision, dtype in PRECISIONS.items():
                first, again = (_gradients(model, batch.to(device), dtype) for _ in range(2))
                found = _errors(first, truth)
                bars = {name: 1e-4 if precision == "fp32" else max(1.5 * reference[name], 2**-8) for name in found}
                row = {"shape": [L, D, F, B], "compiled": compiled, "precision": precision, "errors": found}
                row["over_bar"] = [name for name, error in found.items() if not error < bars[name]]
                rows.append({**row, "repeats": all(torch.equal(first[name], again[name]) for name in first)})
    return {"ok": not any(row.get("over_bar") or not row.get("repeats", True) for row in rows), "rows": rows}


@torch.no_grad()
def _away_from_edges(objective: Objective, batch: Tensor) -> Tensor:
    """The rows without a pre-activation so near an edge of its gradient that float32 might put it on the other side.

    There are a few among millions, and one of them changes a gradient by more than rounding does.
    """
    clt = objective.transcoder
    x = clt.normalization.input(batch[:, 0].double()).transpose(0, 1)  # (L, B, D)
    pre = x @ clt.W_enc + clt.b_enc.unsqueeze(1)  # (L, B, F)
    distance = (pre - clt.threshold.view(clt.n_layers, 1, -1)).abs()
    near = torch.minimum(distance, (distance - clt.spec.bandwidth / 2).abs()) < 1e-6
    return batch[~near.any(2).any(0)]


def _losses(objective: Objective, batch: Tensor) -> Losses:
    return objective(batch, coefficients(1, 1, objective.loss))


def _gradients(model: Objective | Textbook, batch: Tensor, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Gradients by parameter, in float64 on the CPU, and the loss; the textbook's decoder packed as ours is."""
    model.zero_grad()
    scale = 2.0**16 if dtype == torch.float16 else 1.0  # as in training: fp16 has no smaller numbers
    narrow = dtype not in (None, torch.float32)
    with torch.autocast(batch.device.type, dtype, enabled=narrow):
        loss = model(batch, 0.03) if isinstance(model, Textbook) else _losses(model, batch).total
    (loss * scale).backward()
    found = {"loss": loss.detach().double().cpu()}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            found[name.removeprefix("transcoder.")] = parameter.grad.double().cpu() / scale
    if isinstance(model, Textbook):
        square = found.pop("W_dec")
        found |= {f"W_dec.{s}": square[s, s:].transpose(0, 1) for s in range(len(square))}
    return found


def _errors(found: dict[str, Tensor], truth: dict[str, Tensor]) -> dict[str, float]:
    return {name: _difference(found[name], wanted) for name, wanted in truth.items()}


def _difference(ours: Tensor, theirs: Tensor) -> float:
    return ((ours.double() - theirs.double()).norm() / theirs.double().norm()).item()


def wide_index(rehearsal: bool) -> Found:
    """More than 2^31 features in one buffer: what the last rows add to sums over tokens is what they give alone."""
    L, D, F, B = (2, 16, 64, 256) if rehearsal else (12, 64, 32768, 6144)  # B * L * F = 2.4e9
    first = B * 8 // 9  # of all rows; the elements of the rest lie beyond 2^31
    batch = torch.randn(B, 2, L, D, device=device_of(rehearsal))
    objective = step.objective(F, batch, f"train.compile={not rehearsal}")
    whole, start, last = (_sums(objective, rows) for rows in (batch, batch[:first].clone(), batch[first:].clone()))
    differences = {name: _difference(whole[name] - start[name], last[name]) for name in last}
    # Differences of gradients magnify the rounding of a sum over nine times as many tokens.
    ok = all(value < (1e-2 if "per_layer" in name else 5e-2) for name, value in differences.items())
    return {"ok": ok, "elements": B * L * F, "relative_differences": differences}


def _sums(objective: Objective, batch: Tensor) -> dict[str, Tensor]:
    """Means over tokens, times their number: squared errors, L0 and two gradients, in bf16."""
    objective.zero_grad()
    with torch.autocast(batch.device.type, torch.bfloat16):
        losses = _losses(objective, batch)
    losses.total.backward()
    means = {"mse_per_layer": losses.mse_per_layer, "l0_per_layer": losses.l0_per_layer}
    grads = {name: parameter.grad for name, parameter in objective.named_parameters() if name.endswith("_enc")}
    return {name: value.detach().double() * len(batch) for name, value in (means | grads).items() if value is not None}


def waits(rehearsal: bool) -> Found:
    """Five compiled steps in each precision during which a synchronisation is an error; nothing is compiled anew."""
    device, found = device_of(rehearsal), {}
    stats = torch._dynamo.utils.counters["stats"]
    for precision in PRECISIONS:
        batch = torch.randn(128, 2, 3, 64, device=device)
        variant = "ours" if rehearsal else "ours_compiled"
        train = step.prepare({"F": 256, "precision": precision, "variant": variant}, batch)
        for _ in range(3):
            train(batch)
        graphs = stats["unique_graphs"]
        if not rehearsal:
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(5):
                train(batch)
            found[precision] = "none" if stats["unique_graphs"] == graphs else "compiled again"
        except RuntimeError as error:  # what the debug mode raises
            found[precision] = str(error)[:300]
        finally:
            if not rehearsal:
                torch.cuda.set_sync_debug_mode("default")
    breaks = sum(torch._dynamo.utils.counters["graph_break"].values())
    return {"ok": set(found.values()) == {"none"} and not breaks, "waits": found, "graph_breaks": breaks}


def hook(rehearsal: bool) -> Found:
    """DDP of one rank, with the hook, its backend's stream and gradients in the buckets, against no DDP, to the bit."""
    import torch.distributed as dist  # noqa: TID251
    from torch._C._distributed_c10d import HashStore

    from clt.train.ddp import GradientMemory, data_parallel, settle_buckets
    from clt.train.distributed import Axis

    device = device_of(rehearsal)
    dist.init_process_group("gloo" if rehearsal else "nccl", store=HashStore(), rank=0, world_size=1)
    L, D, F, B = (3, 8, 64, 32) if rehearsal else (6, 64, 4096, 512)
    batch = torch.randn(B, 2, L, D, device=device)
    alone, inner = (step.objective(F, batch, "train.compile=false") for _ in range(2))
    memory = inner.gradient_memory = GradientMemory(inner.parameters())
    model = data_parallel(inner, Axis(size=2, group=dist.group.WORLD))  # of size 1 it would leave DDP out
    terms, different = coefficients(1, 1, inner.loss), []
    settle_buckets(model, batch, terms, torch.autocast(device.type, torch.bfloat16))
    for number in range(20):
        batch = torch.randn(B, 2, L, D, device=device)
        for objective in (alone, model):
            with torch.autocast(device.type, torch.bfloat16):
                loss = objective(batch, terms).total
            loss.backward()
        for (name, ours), theirs in zip(inner.named_parameters(), alone.parameters(), strict=True):
            if not torch.equal(_grad(ours), _grad(theirs)):
                different.append(f"{name} in step {number}")
        alone.zero_grad()
        memory.clear()
    dist.destroy_process_group()
    return {"ok": not different, "steps": 20, "different": different[:10]}


def _grad(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def partial_sums(rehearsal: bool) -> Found:
    """What shards add up over the network is float32, and was not rounded to bf16 before."""
    from clt.train.distributed import Axis

    L, D, F, B = (2, 16, 64, 64) if rehearsal else (6, 256, 2048, 1024)
    batch, seen = torch.randn(B, 2, L, D, device=device_of(rehearsal)), []

    def sum_shards(partial: Tensor) -> Tensor:
        seen.append((partial.dtype, (partial == partial.bfloat16()).double().mean().item()))
        return partial

    objective = step.objective(F, batch, "train.compile=false", feature=Axis(size=2))
    objective.transcoder.sum_shards = sum_shards
    with torch.autocast(batch.device.type, torch.bfloat16):
        _losses(objective, batch)
    ((dtype, rounded),) = seen
    return {"ok": dtype == torch.float32 and rounded < 0.1, "dtype": str(dtype), "share_that_bf16_holds": rounded}


def kernels(rehearsal: bool) -> Found:
    """The reductions that inductor made of a step are pinned: none takes its configuration by timing."""
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
        batch = torch.randn(128, 2, 3, 64, device=device_of(rehearsal))
        variant = "ours" if rehearsal else "ours_compiled"
        train = step.prepare({"F": 256, "precision": "fp32" if rehearsal else "bf16", "variant": variant}, batch)
        train(batch)
        code = "\n".join(file.read_text() for file in Path(cache).rglob("*.py"))
    found = reductions(code)
    unpinned = sorted({name for name, pinned in found if not pinned})
    return {"ok": not unpinned and (rehearsal or len(found) > 0), "reductions": len(found), "unpinned": unpinned}


def reductions(code: str) -> list[tuple[str, bool]]:
    """The reduction kernels in code that inductor generated for CUDA, and whether they are pinned.

    Pinned is one whose rows' block is not rescaled by the registers that it takes, and that is never timed.
    """
    pattern = r"@triton_heuristics\.\w*reduction\(.*?inductor_meta=(\{.*?\})\s*\)\s*@triton\.jit\s*def (\w+)"
    wanted = ("'deterministic': True", "'dynamic_scale_rblock': False")
    found = re.findall(pattern, code, re.DOTALL)
    return [(name, all(option in meta for option in wanted)) for meta, name in found]
