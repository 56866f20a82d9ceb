"""How near the machine's limits we run: the training step, the reader, the extraction, the stream, the start.

    python benchmarks/throughput.py [--quick] [--json OUT.json] [--compare OLD.json] [--plot OUT.png]
                                    [--shapes 12x768x6144x4000 ..] [--variants ours textbook ..] [--precision bf16]

Everything is measured in one run, on the GPU if there is one: what the machine does at best (matrix products, copies),
then each part as a share of that and of the textbook step. Each step runs in a process of its own, for its memory.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import multiprocessing
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
VARIANTS = ["ours", "ours_compiled", "textbook", "textbook_compiled"]
# Ours with k = 10 a layer; the other variants are of JumpReLU.
RULES = ["topk_compiled", "batchtopk_compiled", "batchtopk_by_norm_compiled"]
STEPS = 10  # timed, after the warm-up
Case = dict[str, Any]


def main() -> None:
    sys.path.insert(0, str(ROOT))
    arguments = _arguments()
    import torch

    from benchmarks import machine, report
    from benchmarks.startup import startup

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if arguments.case:
        from benchmarks import step

        row = step.measure(json.loads(arguments.case), arguments.copy_gb_per_s, STEPS, device, arguments.budget)
        print(json.dumps(row, allow_nan=False))
        return
    old = json.loads(arguments.compare.read_text()) if arguments.compare else None  # a wrong path ends the run here
    result = machine.where()
    budget = 0.1 if arguments.quick else 2.0
    result["matmul_peak_tflops"] = {k: machine.matmul_peak(v, device, budget)[0] for k, v in machine.PRECISIONS.items()}
    result["copy_gb_per_s"] = machine.copy_bandwidth(device)
    if device.type == "cuda":
        torch.cuda.empty_cache()  # the steps run in other processes
    report.print_machine(result)
    result["step"] = []
    for case in cases(arguments, device):
        result["step"].append(measure(case, result["copy_gb_per_s"], budget))
        _save(result, arguments.json)
    ratios(result["step"])
    report.print_ratios(result["step"])
    if arguments.plot:
        rows = sweep(arguments.precision, device)
        result["sweep"] = [measure(case, result["copy_gb_per_s"], budget) for case in rows]
        report.plot(result["sweep"], arguments.plot)
        _save(result, arguments.json)
    if not arguments.step_only:
        result |= _data_path(arguments.quick, device)
        if not arguments.quick:
            result["startup"] = startup()
            report.print_startup(result["startup"])
    _save(result, arguments.json)
    if old:
        report.compare(old, result)


def _save(result: dict[str, Any], path: Path | None) -> None:
    """As each part is done: a later one may fail, or the time be up."""
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")


def ratios(rows: list[dict[str, Any]]) -> None:
    """Add `over_textbook`, `over_textbook_compiled` and `over_ours_compiled` to our steps of the same shape.

    They are how many times as fast ours is as the textbook's, and as a JumpReLU step for the other rules.

    Each beside the peak of its own minutes: a shared machine may have changed its speed from one to the other.
    """
    measured = [row for row in rows if "error" not in row]
    by_case = {(*(row[key] for key in "LDFB"), row["precision"], row["variant"]): row for row in measured}
    for row in measured:
        references = ("ours_compiled",) if row["variant"] in RULES else ("textbook", "textbook_compiled")
        for reference in references:
            theirs = by_case.get((*(row[key] for key in "LDFB"), row["precision"], reference))
            if "textbook" not in row["variant"] and theirs:
                row[f"over_{reference}"] = row["share_of_peak"] / theirs["share_of_peak"]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small: one shape, the embedded model; under 3 minutes")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the figures")
    parser.add_argument("--compare", type=Path, metavar="OLD", help="show what changed since figures written earlier")
    parser.add_argument(
        "--plot", type=Path, metavar="OUT", help="also measure and draw the step's time over F, L and B"
    )
    parser.add_argument("--precision", choices=["auto", "bf16", "fp16", "fp32"], default="auto")
    parser.add_argument("--shapes", nargs="+", metavar="LxDxFxB", help="shapes of the step")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS + RULES, default=VARIANTS)
    parser.add_argument("--step-only", action="store_true", help="leave reader, extraction and stream out")
    parser.add_argument("--case", help=argparse.SUPPRESS)  # one step in this process
    parser.add_argument("--copy-gb-per-s", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--budget", type=float, help=argparse.SUPPRESS)
    return parser.parse_args()


def cases(arguments: argparse.Namespace, device: Any) -> list[Case]:
    """The steps to measure: those of `--shapes`, or the reference sizes.

    On a GPU all fit into 80 GB: the textbook's square decoder and float32 features do at the smallest size alone.
    """
    gpu, whole = device.type == "cuda", not arguments.shapes and not arguments.quick
    if arguments.shapes:
        shapes = [tuple(map(int, shape.split("x"))) for shape in arguments.shapes]
    elif gpu:
        shapes = [(12, 768, 6144, 4096)]
    else:
        shapes = [(6, 256, 512, 512)] if arguments.quick else [(12, 768, 1024, 4000)]
    larger = [(12, 768, F, B) for F, B in ((6144, 16384), (32768, 4096), (32768, 16384))]
    if not gpu:
        larger = [(12, 768, 6144, 4000)]  # does the reference run fit?
    found = [case_of(shape, arguments.precision, variant) for shape in shapes for variant in arguments.variants]
    return found + [case_of(shape, arguments.precision, "ours_compiled") for shape in larger if whole]


def case_of(shape: tuple[int, ...], precision: str, variant: str) -> Case:
    """The case of a shape (L, D, F, B)."""
    return {**dict(zip("LDFB", shape)), "precision": precision, "variant": variant}


def measure(case: Case, copy_gb_per_s: float, budget: float = 2.0) -> dict[str, Any]:
    """`step.measure` in a fresh process; a case that fails says why in `error`, e.g. that the memory was too small."""
    from benchmarks.report import print_step

    command = [sys.executable, __file__, "--case", json.dumps(case), "--copy-gb-per-s", str(copy_gb_per_s)]
    command += ["--budget", str(budget)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        row = json.loads(done.stdout.splitlines()[-1])
    else:
        row = {**case, "error": (done.stderr.strip().splitlines() or [f"ended with status {done.returncode}"])[-1]}
    print_step(row)
    return row


def sweep(precision: str, device: Any) -> list[Case]:
    """Our step with one of F, L and B changed at a time around a middle shape."""
    L, D, F, B = (12, 768, 8192, 4096) if device.type == "cuda" else (6, 256, 512, 512)
    shapes = {(L, D, int(F * factor), B) for factor in (0.5, 1, 2, 4)}
    shapes |= {(int(L * factor), D, F, B) for factor in (0.5, 1, 1.5, 2)}
    shapes |= {(L, D, F, int(B * factor)) for factor in (0.5, 1, 2, 4)}
    return [case_of(shape, precision, "ours_compiled") for shape in sorted(shapes)]


def _data_path(quick: bool, device: Any) -> dict[str, Any]:
    from benchmarks import data_path, report

    megabytes, train_steps = (128, 5) if quick else (1024, 30)
    tokens = {"embedded": 20_000 if quick else 100_000, "SmolLM2-135M": 20_000}
    shapes, extraction = [], []
    for name in data_path.SHAPES:
        shapes.append(data_path.reader(name, megabytes, train_steps, device))
        report.print_reader(shapes[-1])
    for name in ["embedded"] if quick else data_path.models():
        extraction.append(data_path.extraction(name, tokens[name], device))
        report.print_extraction(extraction[-1])
    reader = {  # of the worse shape
        "share_of_raw": min(row["share_of_raw"] for row in shapes),
        "stall_share": max(row["stall_share"] for row in shapes),
        "shapes": shapes,
    }
    found: dict[str, Any] = {"reader": reader, "extraction": extraction}
    if all(importlib.util.find_spec(name) for name in ("starlette", "uvicorn", "uvloop", "xxhash")):
        # From a process without language models: the clients are its forks, and would copy its pages as they write.
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            found["stream"] = pool.submit(data_path.stream, 2 if quick else 15).result()
        report.print_stream(found["stream"])
    return found


if __name__ == "__main__":
    main()
