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
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks import machine

KINDS = ("none", "waited for", "under way")


def cost(
    shape: tuple[int, int, int, int], device: Any, rounds: int, steps: int, directory: Path | None = None
) -> dict[str, Any]:
    """Seconds of rounds of `steps` steps of a shape (L, D, F, B), in float32, and what a checkpoint adds to them.

    begin_seconds: how long the loop stands still in each `begin`; the first takes its memory from the system.
    saved: whether every checkpoint has the weights of its step, though training went on.
    """
    import torch
    from safetensors.torch import load_file

    from benchmarks import step
    from clt.train import checkpoint
    from clt.train.distributed import World
    from clt.train.metrics import coefficients
    from clt.train.spec import CheckpointConfig
    from clt.train.writer import Checkpoints

    L, D, F, B = shape
    batch = torch.randn(B, 2, L, D, device=device)
    objective = step.objective(F, batch, "train.compile=false")
    transcoder, terms = objective.transcoder, coefficients(1, 1, objective.loss)
    optimizer = torch.optim.Adam(objective.parameters(), fused=True)
    begin_seconds: list[float] = []
    saved = True

    def round_of_steps(checkpoints: Checkpoints, kind: str, number: int) -> float:
        weights = {name: tensor.to("cpu", copy=True) for name, tensor in transcoder.state_dict().items()}
        machine.wait(device)
        began = time.perf_counter()
        if kind != "none":
            slices = checkpoint.slices(transcoder, optimizer, {})
            checkpoints.begin(slices, transcoder.config, {"step": number})
            begin_seconds.append(time.perf_counter() - began)
        if kind == "waited for":
            checkpoints.finish()
        for _ in range(steps):
            objective(batch, terms).total.backward()
            checkpoints.wait_for_copy()
            optimizer.step()
            optimizer.zero_grad()
        machine.wait(device)
        checkpoints.finish()
        took = time.perf_counter() - began
        if kind != "none":
            nonlocal saved
            file = load_file(checkpoints.directory / f"step_{number:08d}" / checkpoint.MODEL)
            saved &= all(torch.equal(file[name], tensor) for name, tensor in weights.items())
        return took

    seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
    with tempfile.TemporaryDirectory(dir=directory) as folder:
        with Checkpoints(Path(folder), CheckpointConfig(keep=1), World(0, 1, device)) as checkpoints:
            round_of_steps(checkpoints, "none", 0)  # warms up
            for number in range(1, rounds + 1):
                for i, kind in enumerate(KINDS):
                    seconds[kind].append(round_of_steps(checkpoints, kind, 3 * number + i))
        file = next(Path(folder).glob("step_*"))
        size = sum(path.stat().st_size for path in file.iterdir())
    medians = {kind: statistics.median(values) for kind, values in seconds.items()}
    costs = {kind: medians[kind] - medians["none"] for kind in KINDS[1:]}
    found = {"checkpoint_gb": size / 1e9, "round_seconds": medians, "begin_seconds": begin_seconds, "saved": saved}
    return found | {"cost_seconds": costs, "cost_ratio": costs["under way"] / costs["waited for"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--directory", type=Path, help="where to write checkpoints [a temporary directory]")
    arguments = parser.parse_args()
    import torch

    report = cost((4, 128, 4096, 512), torch.device("cpu"), rounds=5, steps=12, directory=arguments.directory)
    arguments.json.write_text(json.dumps(report | machine.where(), indent=1, allow_nan=False) + "\n")
    print(json.dumps(report, indent=1, allow_nan=False))


if __name__ == "__main__":
    main()
