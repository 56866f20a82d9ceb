"""The same numbers in every layout of the ranks: trains one job in each (data, feature) layout and compares.

    python benchmarks/parity.py --json benchmarks/results/parity.json
    python benchmarks/parity.py --json benchmarks/results/parity-topk.json \
        --set clt.activation=topk clt.k=6 clt.by_norm=true loss.sparsity=0 loss.target_l0=null

Every run is train_ddp.py in processes of its own: 20 steps of fp32 on the embedded model's activations, with a global
batch (127 tokens) that no number of ranks divides, and two micro-batches. Compared with one process: the loss and the
clipped norm at every step, the gradients of the first step and the mean gradients of the run (Adam's first moment,
which the checkpoints hold), the final weights, L0 per layer at every step and dead features at the end. The relative
difference of two tensors is the norm of their difference over the norm of the reference.

What remains is float32 addition in another order, about 1e-7 a step. It has two amplifiers. Adam divides a gradient by
its own size, so the few weights whose gradient is almost zero move by its rounding (`max_rel_weight_element`, over the
largest weight of the tensor, shows them). And JumpReLU's gradients end at the edges of a rectangle: rounding may put a
pre-activation inside it in one layout and outside it in another, and a threshold's gradient then differs by one
token's part. With half a million pre-activations a step this happened once in 20 steps, with 32,000 it did not.

The transcoder has a skip connection, which every feature shard holds and updates whole.

Memory is what a rank keeps between steps (weights, gradients, optimizer state; without the skip connection, in a model
this small the largest tensor) as a share of one process's; bytes are those that the loopback device of a network
namespace carried per step, against the formula (they need root).
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks import ranks
from benchmarks.job import ROOT, small_job
from benchmarks.machine import where

LAYOUTS = [(1, 1), (2, 1), (1, 2), (4, 1), (2, 2), (1, 4)]
BAR = 1e-5
TOKENS, FEATURES = 127, 64


def run(job: Sequence[str], directory: Path, data: int, feature: int, *overrides: str) -> None:
    """Train in one layout into `directory`."""
    layout = [f"parallel.feature_shards={feature}", f"run.dir={directory}"]
    ranks.train(*job, *layout, *overrides, processes=data * feature)


def outcome(directory: Path) -> dict[str, Any]:
    """What a run computed: metric lines, and the checkpoints of the first and the last step."""
    from safetensors.torch import load_file

    steps = sorted((directory / "checkpoints").glob("step_*"))
    first, last = (load_file(step / "optimizer.safetensors") for step in (steps[0], steps[-1]))
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return {
        "train": [line for line in lines if "train_loss" in line],
        "evaluation": [line for line in lines if "eval_fve" in line][-1],
        "gradients": [{k: v for k, v in file.items() if k.endswith("exp_avg")} for file in (first, last)],
        "weights": load_file(steps[-1] / "model.safetensors"),
    }


def difference(ours: dict[str, Any], theirs: dict[str, Any], order: float = 2) -> float:
    """Largest relative difference over a dictionary of tensors, in the vector norm of this order."""
    assert ours.keys() == theirs.keys()
    pairs = [(ours[key].double().flatten(), theirs[key].double().flatten()) for key in ours]
    return max(((a - b).norm(order) / b.norm(order).clamp_min(1e-30)).item() for a, b in pairs)


def compare(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
    """The comparison's line for one layout."""
    curves = [
        abs(a[key] - b[key]) / abs(b[key])
        for a, b in zip(ours["train"], theirs["train"], strict=True)
        for key in ("train_loss", "train_mse", "train_sparsity", "grad_norm")
        if b[key]
    ]
    layers = [key for key in theirs["train"][0] if key.startswith("L0")]
    # A count over the tokens differs by at least 1 / TOKENS; the floats that carry it differ in their last digits.
    equal = [
        abs(a[key] - b[key]) < 1e-3 / TOKENS * max(1.0, b[key])
        for a, b in zip(ours["train"], theirs["train"], strict=True)
        for key in layers
    ]
    dead = "eval_dead_fraction"
    return {
        "max_rel_loss": max(curves),
        "max_rel_grad": max(difference(a, b) for a, b in zip(ours["gradients"], theirs["gradients"])),
        "max_rel_weight": difference(ours["weights"], theirs["weights"]),
        "max_rel_weight_element": difference(ours["weights"], theirs["weights"], float("inf")),
        "l0_equal": all(equal),
        "dead_equal": ours["evaluation"][dead] == theirs["evaluation"][dead],
        "dead_fraction": theirs["evaluation"][dead],
    }


def state_bytes(feature: int) -> int:
    """Bytes of weights, gradients and Adam's moments of one shard, counted on the tensors of a real step."""
    import torch

    from clt.model.loss import Objective
    from clt.model.spec import CLTConfig, LossConfig
    from clt.model.transcoder import CrossLayerTranscoder

    objective = Objective(
        CrossLayerTranscoder(4, 128, CLTConfig(d_features=FEATURES), shard=(0, feature)), LossConfig()
    )
    optimizer = torch.optim.Adam(objective.parameters(), fused=True)
    objective(torch.randn(8, 2, 4, 128), {"sparsity": 0.1, "pre_activation": 0.0, "aux": 0.0}).total.backward()
    optimizer.step()
    tensors = [t for p in objective.parameters() for t in (p, p.grad, *optimizer.state[p].values())]
    return sum(t.nbytes for t in [*tensors, *objective.buffers()] if t is not None)


def bytes_per_step(data: int, feature: int, tokens: int) -> int:
    """The formula: what all ranks together send in a step, with ring all-reduces, in fp32.

    n ranks that all-reduce b bytes send 2 (n - 1) b together. Gradients: F / feature features a rank, along data.
    Partial reconstructions: (tokens / data, L, D) a rank, along feature; batches: twice that in float16, from one rank.
    """
    L, D, F = 4, 128, 256 // feature
    parameters = F * (L * D + 2 * L + D * L * (L + 1) // 2) + L * D + L * D * D
    return 4 * (feature * 2 * (data - 1) * parameters + data * 2 * (feature - 1) * (tokens // data) * L * D) + (
        (feature - 1) * tokens * 2 * L * D * 2
    )


def measured_bytes(job: list[str], directory: Path, data: int, feature: int) -> float | None:
    """Bytes on the wire in a step: the difference between two lengths of the same run, without evaluation.

    None where there is no network namespace to measure in.
    """
    if subprocess.run(["unshare", "--net", "true"], capture_output=True).returncode:
        return None
    script = 'ip link set lo up && exec "$@"'
    code = "import sys; from benchmarks.parity import print_bytes; print_bytes(*sys.argv[1:])"
    command = ["unshare", "--net", "bash", "-c", script, "-", sys.executable, "-c", code]
    command += [str(directory / "bytes"), str(data), str(feature), *job]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if result.returncode:
        raise SystemExit(f"the bytes of layout {data}x{feature} were not counted:\n{result.stderr}")
    return float(result.stdout)


def print_bytes(directory: str, data: str, feature: str, *job: str) -> None:
    """The same in the network namespace of this process, by the counter of its loopback device."""
    ranks.FORKS.set_forkserver_preload(["clt.train.run", "torch._dynamo"])  # no transformers: these ranks find a store
    length = ["train.batch_tokens=512", "train.accumulate=1", "clt.d_features=256", "log.every=1000"]
    counts = []
    for steps in (10, 40):
        run(job, Path(f"{directory}-{steps}"), int(data), int(feature), *length, f"train.steps={steps}")
        (line,) = re.findall(r"^ *lo: *(\d+)", Path("/proc/self/net/dev").read_text(), re.MULTILINE)
        counts.append(int(line))
    print((counts[1] - 2 * counts[0]) / 30)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    names = [f"{data}x{feature}" for data, feature in LAYOUTS]
    parser.add_argument("--layouts", nargs="+", choices=names, default=names, help="these alone, beside one process")
    parser.add_argument("--bytes", nargs="*", metavar="LAYOUT", help="count bytes in these layouts only, e.g. 2x1")
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="KEY=VALUE", help="of the job, e.g. clt.activation=relu"
    )
    arguments = parser.parse_args()
    rows, missed, reference = [], [], None
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        job = [*small_job(directory), "train.precision=fp32", "train.accumulate=2", "eval.replacement_tokens=0"]
        job += [
            f"clt.d_features={FEATURES}",
            f"train.batch_tokens={TOKENS}",
            f"eval.dead_window={2 * TOKENS}",
            "clt.threshold=1.5",
            "clt.skip=true",
            *arguments.set,
        ]
        for data, feature in LAYOUTS:
            if data * feature > 1 and f"{data}x{feature}" not in arguments.layouts:
                continue
            every = ["checkpoint.every=1", "checkpoint.keep=100"]
            run(job, directory / f"{data}x{feature}", data, feature, *every)
            ours = outcome(directory / f"{data}x{feature}")
            reference = reference or ours
            share = state_bytes(feature) / state_bytes(1)
            row = {"layout": f"{data}x{feature}", "world_size": data * feature, **compare(ours, reference)}
            row |= {"memory_share": share, "memory_over_ideal": share * feature}
            if data * feature > 1 and (arguments.bytes is None or row["layout"] in arguments.bytes):
                row |= {"bytes_per_step": measured_bytes(job, directory, data, feature)}
                row |= {"bytes_formula": bytes_per_step(data, feature, 512)}
            close = max(row["max_rel_loss"], row["max_rel_grad"], row["max_rel_weight"]) < BAR
            if not (close and row["l0_equal"] and row["dead_equal"] and row["memory_over_ideal"] < 1.15):
                missed.append(row["layout"])
            rows.append(row)
            print(json.dumps(row, allow_nan=False), flush=True)
    arguments.json.write_text(
        json.dumps([row | {"set": arguments.set} | where() for row in rows], indent=1, allow_nan=False) + "\n"
    )
    if missed:
        raise SystemExit(f"a bar is missed in {', '.join(missed)}")


if __name__ == "__main__":
    main()
