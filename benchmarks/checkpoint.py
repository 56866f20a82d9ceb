"""What a checkpoint costs the training loop: written while the next steps run, against waiting for it.

    python benchmarks/checkpoint.py --json benchmarks/results/checkpoint.json

One process trains L=4, D=128, F=4096 (7.3M parameters, 0.09 GB a checkpoint) on random rows. Rounds of steps with a
checkpoint under way, rounds that wait for theirs first and rounds without one are taken in turn; the cost of a
checkpoint is the time that its round takes over a round without.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.machine import where

STEPS_IN_A_ROUND, ROUNDS = 12, 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--directory", type=Path, help="where to write checkpoints [a temporary directory]")
    arguments = parser.parse_args()
    import torch

    from clt.model.loss import Objective
    from clt.model.spec import CLTConfig, LossConfig
    from clt.model.transcoder import CrossLayerTranscoder
    from clt.train import checkpoint
    from clt.train.distributed import World

    objective = Objective(CrossLayerTranscoder(4, 128, CLTConfig(d_features=4096)), LossConfig())
    transcoder = objective.transcoder
    optimizer = torch.optim.Adam(objective.parameters(), fused=True)
    batch, sparsity = torch.randn(512, 2, 4, 128), {"sparsity": 1e-3, "pre_activation": 0.0}

    def round_of_steps(checkpoints: checkpoint.Checkpoints, kind: str, number: int) -> float:
        began = time.perf_counter()
        if kind != "none":
            parts = checkpoint.parts(transcoder, optimizer, {})
            checkpoints.begin(parts, transcoder.config, {"step": number})
        if kind == "waited for":
            checkpoints.finish()
        for _ in range(STEPS_IN_A_ROUND):
            objective(batch, sparsity).total.backward()
            optimizer.step()
            optimizer.zero_grad()
        checkpoints.finish()
        return time.perf_counter() - began

    seconds: dict[str, list[float]] = {"none": [], "waited for": [], "under way": []}
    with tempfile.TemporaryDirectory(dir=arguments.directory) as folder:
        world = World(0, 1, torch.device("cpu"))
        with checkpoint.Checkpoints(Path(folder), 1, 0, world) as checkpoints:
            round_of_steps(checkpoints, "none", 0)  # warms up
            for number in range(1, ROUNDS + 1):
                for i, kind in enumerate(seconds):
                    seconds[kind].append(round_of_steps(checkpoints, kind, 3 * number + i))
        file = next(Path(folder).glob("step_*"))
        size = sum(path.stat().st_size for path in file.iterdir())
    medians = {kind: statistics.median(values) for kind, values in seconds.items()}
    cost = {kind: medians[kind] - medians["none"] for kind in ("waited for", "under way")}
    report = {"checkpoint_gb": size / 1e9, "round_seconds": medians, "cost_seconds": cost}
    report["cost_ratio"] = cost["under way"] / cost["waited for"]
    arguments.json.write_text(json.dumps(report | where(), indent=1) + "\n")
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
