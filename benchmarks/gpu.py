"""Everything that only a GPU can show of this tree: one command, under ten minutes on one H100.

    python benchmarks/gpu.py --json benchmarks/results/gpu.json [--only gradients steps ..]
    python benchmarks/gpu.py --ranks 8 --json benchmarks/results/gpus.json      # several GPUs: the ranks' layouts
    python benchmarks/gpu.py --rehearse                                         # toy sizes on the CPU

Each part runs in a process of its own with a time limit. A part that fails says why in `error`, and the others go on.
The JSON is written again after each part. Checks share the GPU, four at a time; what measures time or memory then has
it alone. benchmarks/results/README.md says how to read the figures.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))


class Part(NamedTuple):
    """A part: the module with a function of the part's name, its limit in seconds, whether it has the GPU alone."""

    module: str
    limit: float
    alone: bool = True


PARTS = {
    "resume": Part("gpu_runs", 240, alone=False),  # the longest first
    "tests": Part("gpu_checks", 150, alone=False),
    "gradients": Part("gpu_checks", 150, alone=False),
    "waits": Part("gpu_checks", 150, alone=False),
    "wide_index": Part("gpu_checks", 120, alone=False),
    "kernels": Part("gpu_checks", 120, alone=False),
    "sparse": Part("gpu_sparse", 120, alone=False),
    "decoder": Part("gpu_sparse", 90, alone=False),
    "hook": Part("gpu_checks", 90, alone=False),
    "partial_sums": Part("gpu_checks", 90, alone=False),
    "steps": Part("gpu_costs", 300),
    "sparse_steps": Part("gpu_sparse", 210),
    "profile": Part("gpu_costs", 90),
    "layout": Part("gpu_costs", 90),
    "launches": Part("gpu_costs", 60),
    "limits": Part("gpu_costs", 60),
    "evaluation": Part("gpu_costs", 60),
    "checkpoint": Part("gpu_costs", 90),
    "adam": Part("gpu_costs", 45),
    "adam_rows": Part("gpu_sparse", 45),
    "data": Part("gpu_costs", 90),
}
RANKS = {"overlap": Part("gpu_runs", 120), "layouts": Part("gpu_runs", 590)}
WHOLE = 585  # seconds; a part that would begin later is left out
AT_ONCE = 4


def main() -> None:
    arguments = _arguments()
    if arguments.part:
        _run_part(arguments)
        return
    began = time.monotonic()
    found: dict[str, Any] = {"format": 1, "command": " ".join(["python", *sys.argv]), "rehearsal": arguments.rehearse}
    found["parts"] = {}
    parts = {name: (RANKS | PARTS)[name] for name in arguments.only or (RANKS if arguments.ranks else PARTS)}

    def begin(name: str) -> dict[str, Any]:
        left = WHOLE - (time.monotonic() - began)
        limit = WHOLE if arguments.rehearse else min(parts[name].limit, left)  # a CPU may have other work
        return _in_a_process(name, limit, arguments)

    shared = [name for name, part in parts.items() if arguments.rehearse or not part.alone]
    for names, at_once in ((shared, AT_ONCE), ([name for name in parts if name not in shared], 1)):
        with ThreadPoolExecutor(at_once) as pool:
            running = {pool.submit(begin, name): name for name in names}
            for done in as_completed(running):
                _note(found, running[done], done.result(), arguments.json)
    print(f"{time.monotonic() - began:.0f} s in all")
    sys.exit(any(not part["ok"] for part in found["parts"].values()))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="OUT", help="write what was found")
    parser.add_argument("--only", nargs="+", choices=[*PARTS, *RANKS], help="these parts alone")
    parser.add_argument("--ranks", type=int, default=0, metavar="N", help="check N ranks, one on each of N GPUs")
    parser.add_argument("--rehearse", action="store_true", help="toy sizes on the CPU, to see that every part runs")
    parser.add_argument("--part", choices=[*PARTS, *RANKS], help=argparse.SUPPRESS)  # in this process
    arguments = parser.parse_args()
    of_ranks = [name for name in arguments.only or () if name in RANKS]
    if of_ranks and not arguments.ranks:
        parser.error(f"{of_ranks[0]} is a part of --ranks N")
    return arguments


def _run_part(arguments: argparse.Namespace) -> None:
    """One part in this process; the last line of stdout is what it found."""
    import torch

    from benchmarks import machine

    if not arguments.rehearse and torch.cuda.device_count() < max(1, arguments.ranks):
        sys.exit(
            f"error: found {torch.cuda.device_count()} GPUs, wanted {max(1, arguments.ranks)}; "
            "--rehearse runs toy sizes on the CPU"
        )
    part = getattr(
        importlib.import_module(f"benchmarks.{PARTS.get(arguments.part, RANKS['layouts']).module}"), arguments.part
    )
    result = part(arguments.rehearse, *([arguments.ranks] if arguments.part in RANKS else []))
    where = {key: value for key, value in machine.where().items() if key != "command"}
    print("\n" + json.dumps({"machine": where, **result}, allow_nan=False))


def _in_a_process(name: str, limit: float, arguments: argparse.Namespace) -> dict[str, Any]:
    """What the part found, or why it did not; with the seconds that it took."""
    if limit < 5:
        return {"ok": False, "error": f"left out: the {WHOLE} s of the whole command were up", "seconds": 0.0}
    command = [sys.executable, __file__, "--part", name, "--ranks", str(arguments.ranks)]
    env = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True", **os.environ}
    if arguments.rehearse:
        command.append("--rehearse")
        env["CUDA_VISIBLE_DEVICES"] = ""
    began = time.monotonic()
    with subprocess.Popen(
        command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        try:
            output, errors = process.communicate(timeout=limit)
            failed = errors.strip()[-2000:] if process.returncode else None
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # with the processes that it started
            output, failed = process.communicate()[0], f"took longer than {limit:.0f} s"
    result = {"ok": False, "error": failed} if failed is not None else json.loads(output.splitlines()[-1])
    return result | {"seconds": round(time.monotonic() - began, 1)}


def _note(found: dict[str, Any], name: str, result: dict[str, Any], path: Path | None) -> None:
    found.update({"machine": result.pop("machine")} if "machine" in result else {})
    found["parts"][name] = result
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(found, indent=1, allow_nan=False) + "\n")
    last = str(result.get("error", "")).strip().splitlines()[-1:]
    print(f"{name:12} {'ok' if result['ok'] else 'FAILED':6} {result['seconds']:6.1f} s  {''.join(last)}", flush=True)


if __name__ == "__main__":
    main()
