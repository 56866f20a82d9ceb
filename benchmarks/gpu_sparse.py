"""The parts of gpu.py that are about the sparse step: is it the dense one, and from how many pairs on is it faster."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks import machine, step, throughput
from benchmarks.gpu_checks import Found, device_of
from benchmarks.gpu_costs import measure
from clt.config import load_config
from clt.model.kernels import AdamSteps, DecoderRows, RowGradient, kernels_for
from clt.model.transcoder import unsharded
from clt.train.metrics import coefficients
from clt.train.optim import Update, make_adam

RULES: dict[str, tuple[str, ...]] = {
    "jumprelu": ("clt.threshold=0.6", "clt.bandwidth=0.4", "loss.sparsity=0.03"),
    "topk": ("clt.activation=topk", "clt.k=8", "loss.sparsity=0"),
    "batchtopk": ("clt.activation=batchtopk", "clt.k=40", "clt.by_norm=true", "loss.sparsity=0"),
}


def sparse(rehearsal: bool) -> Found:
    """The sparse step against the dense one in the same precision: gradients as relative norms of the difference.

    fp32 must be within 1e-4, bf16 within 2^-5: the dense step rounds features and decoder, the sparse one does not.
    There is room for exactly the pairs that there are. Repeated, the bits must be the same, and nothing may wait. With
    half the room, L0 must be the same. Samples of the pairs that do not fire must leave the decoders' gradients as they
    are, and thresholds' must come nearer to the exact ones as the mean of 32 of them (`sampled_thresholds`).
    """
    L, D, F, B = (3, 16, 64, 63) if rehearsal else (6, 256, 4096, 2047)
    torch.manual_seed(0)
    batch, rows, sampled = torch.randn(B, 2, L, D, device=device_of(rehearsal)), [], {}
    for rule, overrides in RULES.items():
        for precision, bar in (("fp32", 1e-4), ("bf16", 2**-5)):
            model = step.objective(F, batch, *overrides, "train.compile=false")
            model.count_pairs = True
            dense, listed = _gradients(model, batch, machine.PRECISIONS[precision])
            model.capacity = int(listed.max())
            first, _ = _gradients(model, batch, machine.PRECISIONS[precision])
            if not rehearsal:
                torch.cuda.set_sync_debug_mode("error")
            again, _ = _gradients(model, batch, machine.PRECISIONS[precision])
            if not rehearsal:
                torch.cuda.set_sync_debug_mode("default")
            rows.append({
                "rule": rule, "precision": precision, "pairs_per_token": model.capacity / B,
                "errors": {name: _difference(first[name], g) for name, g in dense.items()},
                "repeats": all(torch.equal(first[name], again[name]) for name in first),
                "counts": _counts_the_same(model, batch),
            })  # fmt: skip
            rows[-1]["over_bar"] = [name for name, error in rows[-1]["errors"].items() if not error < bar]
            if rule == "jumprelu" and precision == "fp32":
                sampled = _sampled(model, batch, dense)
    ok = not any(row["over_bar"] or not row["repeats"] or not row["counts"] for row in rows)
    return {"ok": ok and sampled["ok"], "rows": rows, "sampled_thresholds": sampled}


def _counts_the_same(model: Any, batch: Tensor) -> bool:
    """Whether L0 and the features that fire do not depend on the room for them."""
    room, found = model.capacity, []
    for capacity in (room, room // 2):
        model.capacity = capacity
        with torch.no_grad():
            losses = model(batch, coefficients(1, 1, model.loss))
        found.append((losses.l0_per_layer, losses.fired))
    return all(torch.equal(*pair) for pair in zip(*found))


def _sampled(model: Any, batch: Tensor, dense: dict[str, Tensor]) -> Found:
    """Errors of the thresholds' gradients, of one sample and of the mean of 32; whether the rest is as it should be."""
    model.sampling, threshold, decoder = 0, "transcoder.threshold", "transcoder.W_dec.0"
    with torch.no_grad():
        needed = int(model(batch, coefficients(1, 1, model.loss)).needed.max())
    model.capacity, samples, decoders = needed + needed // 8, [], []
    for number in range(32):
        model.sampling = number
        found, _ = _gradients(model, batch, torch.float32)
        samples.append(found[threshold].clone())
        decoders.append(_difference(found[decoder], dense[decoder]))
    one, mean = (_difference(found, dense[threshold]) for found in (samples[0], torch.stack(samples).mean(0)))
    return {"ok": mean < one / 2 and max(decoders) < 1e-4, "error_of_one": one, "error_of_mean": mean}


def _difference(found: Tensor, wanted: Tensor) -> float:
    return ((found - wanted).norm() / wanted.norm()).item()


def _gradients(model: Any, batch: Tensor, dtype: torch.dtype) -> tuple[dict[str, Tensor], Tensor]:
    """Loss and gradients by name, and `Losses.listed`."""
    model.zero_grad()
    with torch.autocast(batch.device.type, dtype, enabled=dtype != torch.float32):
        losses = model(batch, coefficients(1, 1, model.loss))
    losses.total.backward()
    named = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": losses.total.detach(), **named}, losses.listed


def sparse_steps(rehearsal: bool) -> Found:
    """Whole steps with k features a token and layer, beside the dense step, whose time does not depend on k.

    Then the dense step and the sparsest with the decoder's own Adam, fused and lazy.
    """
    shape, precision, ks = (
        ((2, 16, 64, 64), "fp32", [4]) if rehearsal else ((12, 768, 32768, 4096), "bf16", [16, 64, 160])
    )
    variant = "topk" if rehearsal else "topk_compiled"
    case = throughput.case_of(shape, precision, variant)
    copy = 10.0 if rehearsal else machine.copy_bandwidth(device_of(rehearsal))
    if not rehearsal:
        torch.cuda.empty_cache()  # the steps run in other processes
    cases = [case | {"k": ks[0]}, *(case | {"k": k, "sparse": True} for k in ks)]
    cases += [cases[0] | {"decoder": "fused"}, cases[1] | {"decoder": "lazy"}]
    rows = [measure(each, copy, rehearsal) for each in cases]
    failed = [row["error"] for row in rows if "error" in row]
    for row in rows[1:] if not failed else ():
        row["over_dense"] = rows[0]["seconds"] / row["seconds"]
    return {"ok": not failed, "rows": rows} | ({"error": failed[0]} if failed else {})


def decoder(rehearsal: bool) -> Found:
    """20 sparse steps with `optim.decoder` of each kind: lazily the same bits as fused, and both near torch's.

    Near is within 1% of how far torch's Adam moves the decoders, as a norm. Nothing may wait in the last ten.
    """
    L, D, F, B = (3, 16, 64, 9) if rehearsal else (6, 256, 4096, 255)  # few tokens: many features do not fire
    torch.manual_seed(0)
    batches, found = torch.randn(20, B, 2, L, D, device=device_of(rehearsal)), {}
    for precision in ("fp32", "bf16"):
        moves = {kind: _moved(kind, precision, F, batches, rehearsal) for kind in ("torch", "fused", "lazy")}
        off = ((moves["fused"] - moves["torch"]).norm() / moves["torch"].norm()).item()
        found[precision] = {"difference": off, "lazy_is_fused": torch.equal(moves["lazy"], moves["fused"])}
    return {"ok": all(row["difference"] < 1e-2 and row["lazy_is_fused"] for row in found.values()), **found}


def _moved(kind: str, precision: str, F: int, batches: Tensor, rehearsal: bool) -> Tensor:
    """How far TopK's steps of the batches have moved all decoders."""
    dtype, config = machine.PRECISIONS[precision], load_config(None, ["train.kernels=sparse", f"optim.decoder={kind}"])
    model = step.objective(F, batches[0], "clt.activation=topk", "clt.k=2", "loss.sparsity=0", "train.compile=false")
    named = {name: p for name, p in model.transcoder.named_parameters() if p.requires_grad}
    adam, model.row_adam = make_adam(named, config.optim, len(batches), dtype)
    update = Update(adam, named, 1.0, unsharded, floor=0.01, fp16=False, stop=True, row_adam=model.row_adam)
    model.capacity = 2 * batches.shape[1]
    before = torch.cat([weight.detach().flatten() for weight in model.transcoder.W_dec])
    for number, batch in enumerate(batches):
        if number == 10 and not rehearsal:
            torch.cuda.set_sync_debug_mode("error")
        model.zero_grad()
        with torch.autocast(batch.device.type, dtype, enabled=dtype != torch.float32):
            losses = model(batch, coefficients(1, 1, model.loss))
        losses.total.backward()
        update(number + 1, config.optim.lr, torch.stack([*losses.values.values()]))
    if not rehearsal:
        torch.cuda.set_sync_debug_mode("default")
    if model.row_adam is not None:
        model.row_adam.catch_up()
    return torch.cat([weight.detach().flatten() for weight in model.transcoder.W_dec]) - before


def adam_rows(rehearsal: bool) -> Found:
    """The update of decoder rows alone, with their bf16 copy and norms: 30 bytes a parameter."""
    device, shape = device_of(rehearsal), (64, 2, 16) if rehearsal else (32768, 12, 768)
    weight, norms = torch.randn(shape, device=device), torch.zeros(shape[0], device=device)
    moments, through_norm = (torch.zeros_like(weight), torch.zeros_like(weight)), torch.zeros_like(norms)
    last = torch.zeros(shape[0], dtype=torch.int32, device=device)
    rows = DecoderRows(weight, *moments, norms, torch.empty_like(weight, dtype=torch.bfloat16), last)
    one, no = torch.ones((), device=device), torch.zeros((), dtype=torch.bool, device=device)
    gradient = RowGradient(torch.randn_like(weight), through_norm, one, no)
    steps = AdamSteps(one.int(), torch.ones(2, 2, device=device), (0.9, 0.999), 1e-8)

    def update() -> None:
        kernels_for(device).adam_rows(rows, steps, gradient, False)

    update()
    took = min(machine.seconds(update, device) for _ in range(5))
    return {"ok": True, "ms": took * 1e3, "gb_per_s": 30 * weight.numel() / took / 1e9, "parameters": weight.numel()}
