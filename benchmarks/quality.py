"""The quickstart's quality over seeds and over L0: train it again and again, and write what came out.

    python benchmarks/quality.py --json benchmarks/results/quality.json [--seeds 0 1 2] [--target-l0 10 20 80]

Every run is the real command (`torchrun --nproc_per_node=2 train_ddp.py configs/quickstart.yaml ..`) on the store that
the quickstart extracted. Runs with the config's own `loss.target_l0` give the spread over seeds; seed 0 over the
targets gives the curve of FVE against L0, drawn beside the JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
KEYS = ["fve", "l0_total", "dead_fraction", "top1_agreement", "kl", "ce_recovered"]


def train(overrides: list[str]) -> dict[str, Any]:
    """One run of the quickstart with overrides; returns its summary.json."""
    with tempfile.TemporaryDirectory() as directory:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
        command += ["train_ddp.py", "configs/quickstart.yaml", *overrides, f"run.dir={directory}/run"]
        env = os.environ | {"OMP_NUM_THREADS": "1"}
        subprocess.run(command, cwd=ROOT, check=True, env=env, stdout=subprocess.DEVNULL)
        return json.loads(Path(directory, "run", "summary.json").read_text())


def plot(curve: list[dict[str, Any]], path: Path) -> None:
    """FVE and recovered cross-entropy against total L0, one point a target."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    curve = sorted(curve, key=lambda row: row["l0_total"])
    figure, axes = plt.subplots(figsize=(6, 3.8), layout="constrained")
    for key, label in (("fve", "fraction of variance explained"), ("ce_recovered", "cross-entropy gap recovered")):
        axes.plot([row["l0_total"] for row in curve], [row[key] for row in curve], "o-", label=label)
    for row in curve:
        axes.annotate(
            f"target {row['target_l0']:g}", (row["l0_total"], row["fve"]), (4, -12), textcoords="offset points"
        )
    axes.set(xlabel="L0, all layers", title="Quickstart, held-out text")
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=120)


def main() -> None:
    sys.path.insert(0, str(ROOT))
    from benchmarks.machine import where
    from clt.config import load_config

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, help="where to write the figures")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--target-l0", type=float, nargs="*", default=[10.0, 20.0, 80.0], help="further values of it, with seed 0"
    )
    arguments = parser.parse_args()
    own = load_config(ROOT / "configs" / "quickstart.yaml").loss.target_l0

    rows = []
    for seed, target in [(seed, own) for seed in arguments.seeds] + [(0, value) for value in arguments.target_l0]:
        summary = train([f"run.seed={seed}", f"loss.target_l0={target}"])
        rows.append({"seed": seed, "target_l0": target, **{key: summary[key] for key in KEYS}})
        print(json.dumps(rows[-1], allow_nan=False), flush=True)
    result = {**where(), "runs": rows}
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps(result, indent=2, allow_nan=False) + "\n")
    plot([row for row in rows if row["seed"] == 0], arguments.json.with_suffix(".png"))


if __name__ == "__main__":
    main()
