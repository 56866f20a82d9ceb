"""The parts of gpu.py that measure: what the machine does at best, what steps, checkpoints and batches take of it."""

from __future__ import annotations

import statistics
import tempfile
import time
from typing import Any

import torch
from torch._C._autograd import DeviceType

from benchmarks import checkpoint as checkpoints
from benchmarks import data_path, machine, step, throughput
from benchmarks.gpu_checks import Found, device_of
from clt.model import loss

KINDS = {  # of kernels, by what is in their names, the first that fits
    "adam": ("FusedAdam", "fused_adam"),
    "products": ("gemm", "cutlass", "nvjet", "xmma", "addmm", "aten::mm"),
    "compiled": ("triton_",),
    "norms": ("norm", "Norm"),
    "copies": ("Memcpy", "Memset", "copy", "CatArray", "fill"),
}


def limits(rehearsal: bool) -> Found:
    """Matrix products, copies on the device, and copies between pinned memory and the device."""
    device, budget = device_of(rehearsal), 0.05 if rehearsal else 2.0
    found: Found = {"matmul_peak_tflops": {}}
    for name, dtype in machine.PRECISIONS.items():
        found["matmul_peak_tflops"][name] = machine.matmul_peak(dtype, device, budget)[0]
    found["copy_gb_per_s"] = machine.copy_bandwidth(device)
    size = 1 << (22 if rehearsal else 30)
    on_host = torch.ones(size, dtype=torch.uint8, pin_memory=not rehearsal)
    on_device = torch.empty(size, dtype=torch.uint8, device=device)
    for name, to, source in (("to_device", on_device, on_host), ("to_host", on_host, on_device)):
        took = min(machine.seconds(lambda to=to, source=source: to.copy_(source), device) for _ in range(5))
        found[f"pinned_{name}_gb_per_s"] = size / took / 1e9
    if not rehearsal:
        found |= {"memory_gb": torch.cuda.get_device_properties(device).total_memory / 1e9}
        found |= {"capability": torch.cuda.get_device_capability(device)}
    return {"ok": True, **found}


def steps(rehearsal: bool) -> Found:
    """Steps beside the machine's peak, their memory beside the formula; the last shape is a shard of Gemma-2-2B's."""
    shapes = [(12, 768, 6144, 4096), (12, 768, 32768, 4096), (12, 768, 32768, 16384), (26, 2304, 2048, 4096)]
    precision, variants = "bf16", ["ours_compiled"]
    if rehearsal:
        shapes, precision, variants = [(2, 16, 64, 64)], "fp32", ["ours"]
    cases = [throughput.case_of(shape, precision, variant) for shape in shapes for variant in variants]
    cases.append(throughput.case_of(shapes[0], precision, "textbook"))
    copy = 10.0 if rehearsal else machine.copy_bandwidth(device_of(rehearsal))
    if not rehearsal:
        torch.cuda.empty_cache()  # the steps run in other processes
    rows = [measure(case, copy, rehearsal) for case in cases]
    throughput.ratios(rows)
    failed = [row["error"] for row in rows if "error" in row]
    return {"ok": not failed, "rows": rows} | ({"error": failed[0]} if failed else {})


def measure(case: dict[str, Any], copy: float, rehearsal: bool) -> Found:
    """The figures of a step. It runs in a process of its own; a rehearsal runs it in this one."""
    if rehearsal:
        return step.measure(case, copy, 3, device_of(rehearsal), budget=0.05)
    return throughput.measure(case, copy, budget=1.0)


def profile(rehearsal: bool) -> Found:
    """Where a step's time goes: milliseconds and launches by kind of kernel, and what the CPU takes to launch them."""
    L, D, F, B = (3, 64, 256, 128) if rehearsal else (12, 768, 32768, 4096)
    device, activity = device_of(rehearsal), torch.profiler.ProfilerActivity
    batch = torch.randn(B, 2, L, D, device=device)
    case = {"F": F, "precision": "fp32" if rehearsal else "bf16", "variant": "ours" if rehearsal else "ours_compiled"}
    train, count = step.prepare(case, batch), 3
    for _ in range(4):
        train(batch)
    with torch.profiler.profile(activities=[activity.CPU, *([] if rehearsal else [activity.CUDA])]) as recorded:
        machine.wait(device)
        start = time.perf_counter()
        for _ in range(count):
            train(batch)
        issued = time.perf_counter() - start
        machine.wait(device)
        wall = time.perf_counter() - start
    events = [event for event in recorded.key_averages() if _is_a_kernel(event, rehearsal)]
    ms, launches, top = dict.fromkeys([*KINDS, "other"], 0.0), dict.fromkeys([*KINDS, "other"], 0.0), []
    for event in events:
        took = (event.self_cpu_time_total if rehearsal else event.self_device_time_total) / 1e3 / count
        kind = next((kind for kind, words in KINDS.items() if any(word in event.key for word in words)), "other")
        ms[kind], launches[kind] = ms[kind] + took, launches[kind] + event.count / count
        top.append({"ms": round(took, 3), "launches": round(event.count / count, 1), "kernel": event.key[:90]})
    wall_ms = wall / count * 1e3
    return {
        "ok": bool(events), "shape": [L, D, F, B], "wall_ms": wall_ms, "cpu_issue_ms": issued / count * 1e3,
        "busy_share": sum(ms.values()) / wall_ms, "ms": ms, "launches": launches,
        "top": sorted(top, key=lambda row: -row["ms"])[:25],
    }  # fmt: skip


def layout(rehearsal: bool) -> Found:
    """A step whose products lie tokens first, as on every GPU, and the same by features, as on a CPU; by turns."""
    L, D, F, B = (3, 64, 256, 128) if rehearsal else (12, 768, 32768, 4096)
    batch = torch.randn(B, 2, L, D, device=device_of(rehearsal))
    case = {"F": F, "precision": "fp32" if rehearsal else "bf16", "variant": "ours" if rehearsal else "ours_compiled"}
    train, times, ours = step.prepare(case, batch), {True: [], False: []}, loss.reads_transposed
    for turn in range(3 if rehearsal else 8):
        for tokens_first, taken in times.items():
            loss.reads_transposed = lambda x, answer=tokens_first: answer
            took = machine.seconds(lambda: train(batch), batch.device)
            taken += [took] if turn > 1 else []  # the first ones compile
    loss.reads_transposed = ours
    first, by_features = (statistics.median(taken) * 1e3 for taken in times.values())
    return {"ok": True, "shape": [L, D, F, B], "tokens_first_ms": first, "by_features_ms": by_features}


def launches(rehearsal: bool) -> Found:
    """What issuing a step takes beside the step, at small F: where the two are equal, a CUDA graph would be faster."""
    rows = []
    for L, D, F, B in [(3, 64, 256, 128)] if rehearsal else [(12, 768, F, 4096) for F in (768, 3072, 6144)]:
        batch = torch.randn(B, 2, L, D, device=device_of(rehearsal))
        name = "ours" if rehearsal else "ours_compiled"
        train = step.prepare({"F": F, "precision": "fp32" if rehearsal else "bf16", "variant": name}, batch)
        for _ in range(3):
            train(batch)
        machine.wait(batch.device)
        start = time.perf_counter()
        train(batch)
        issued = time.perf_counter() - start  # nothing is queued before it, so it never waits for the device
        machine.wait(batch.device)
        took = machine.seconds(lambda train=train, batch=batch: [train(batch) for _ in range(5)], batch.device) / 5
        rows.append({"shape": [L, D, F, B], "issue_ms": issued * 1e3, "step_ms": took * 1e3})
    return {"ok": True, "rows": rows}


def _is_a_kernel(event: Any, rehearsal: bool) -> bool:
    """Operators carry the time of the kernels that they launch once more: on a GPU only what ran there counts."""
    wanted = DeviceType.CPU if rehearsal else DeviceType.CUDA
    return event.device_type == wanted and not event.is_user_annotation


def adam(rehearsal: bool) -> Found:
    """The fused update alone, with the gradient scale that a clip needs and without: bytes a parameter, and GB/s."""
    device = device_of(rehearsal)
    weights = [torch.randn(64, 64) if rehearsal else torch.randn(50_000_000, device=device) for _ in range(12)]
    for weight in weights:
        weight.grad = torch.randn_like(weight)
    optimizer = torch.optim.Adam(weights, fused=True)
    numbers, found = sum(weight.numel() for weight in weights), {"parameters": 0}
    for name, scale, moved in (("unscaled", None, 28), ("scaled", torch.ones((), device=device), 32)):
        optimizer.grad_scale = scale  # type: ignore[attr-defined]
        optimizer.found_inf = torch.zeros((), device=device)  # type: ignore[attr-defined]
        optimizer.step()
        took = min(machine.seconds(optimizer.step, device) for _ in range(5))
        found |= {f"{name}_ms": took * 1e3, f"{name}_gb_per_s": moved * numbers / took / 1e9}
    return {"ok": True, **found, "parameters": numbers}


def evaluation(rehearsal: bool) -> Found:
    """What an evaluation of F=32768 takes beside the weights: a few layers' features (B, F), not all layers'."""
    from clt.data.store import DiscBuffer
    from clt.data.writer import write_store
    from clt.train.evaluation import evaluate_activations

    device = device_of(rehearsal)
    L, D, F, rows = (3, 8, 64, 256) if rehearsal else (12, 64, 32768, 4096)
    batch = torch.randn(rows, 2, L, D, device=device)
    transcoder = step.objective(F, batch, "train.compile=false").transcoder
    with tempfile.TemporaryDirectory() as directory:
        write_store(directory, batch.cpu().half())
        before = machine.reset_peak(device)
        dtype = torch.float32 if rehearsal else torch.bfloat16
        took = machine.seconds(lambda: evaluate_activations(transcoder, DiscBuffer(directory), autocast=dtype), device)
        used = machine.peak(device) - before
    return {"ok": rehearsal or used < 2e9, "shape": [L, D, F, rows], "peak_gb": used / 1e9, "eval_seconds": took}


def checkpoint(rehearsal: bool) -> Found:
    """What a checkpoint of 0.28e9 parameters costs the loop: it stands still for less than the copy to the host takes.

    And the checkpoint has the weights of its step, though the next steps were taken during the copy.
    """
    shape = (2, 8, 64, 16) if rehearsal else (12, 768, 4096, 1024)
    found = checkpoints.cost(shape, device_of(rehearsal), rounds=1 if rehearsal else 2, steps=4)
    on_device = torch.empty(int(found["checkpoint_gb"] * 1e9), dtype=torch.uint8, device=device_of(rehearsal))
    on_host = torch.empty(on_device.shape, dtype=torch.uint8, pin_memory=not rehearsal)
    found["copy_seconds"] = machine.seconds(lambda: on_host.copy_(on_device), device_of(rehearsal))
    stall = min(found["begin_seconds"][1:])  # the first takes its memory from the system
    return {"ok": found["saved"] and (rehearsal or stall < found["copy_seconds"]), **found}


def data(rehearsal: bool) -> Found:
    """The reader against plain reads, the loop's wait for it, and extraction against the bare forward pass."""
    device = device_of(rehearsal)
    if rehearsal:
        data_path.SHAPES["quickstart"] = (2, 8, 64, 16)
        rows = [data_path.reader("quickstart", 1, 4, device, "ours")]
    else:
        rows = [data_path.reader(name, 512, 20, device) for name in data_path.SHAPES]
    waits = max(row["stall_share"] for row in rows)
    found: Found = {"ok": rehearsal or waits < 0.02, "reader": rows}
    if not rehearsal:
        found["extraction"] = data_path.extraction("embedded", 60_000, device)
    return found
