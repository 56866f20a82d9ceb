"""On paper: memory, FLOPs and bytes on the network per step and per rank, for real models on 8, 64 and 512 GPUs.

    python benchmarks/scale.py [--json benchmarks/results/scale.json]

The formulas are those of clt/costs.py. Not counted here: batches on their way to the device.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from clt.costs import (
    Job,
    backward_bytes,
    flops,
    gradient_bytes,
    parameters,
    reconstruction_bytes,
    saved_bytes,
    state_bytes,
)

# L, D, F, B. GPT-2 has the reference run's features, then those of the open GPT-2 CLTs; batches grow with the model.
MODELS = {
    "GPT-2": Job(12, 768, 6144, 4096),
    "GPT-2, wide": Job(12, 768, 32768, 4096),
    "Llama-3.2-1B": Job(16, 2048, 16384, 16384),
    "Gemma-2-2B": Job(26, 2304, 16384, 16384),
    "Gemma-2-9B": Job(42, 3584, 16384, 16384),
}
LAYOUTS = [(8, 1), (1, 8), (64, 1), (8, 8), (1, 64), (512, 1), (64, 8), (8, 64)]  # (data, feature)
SIZES = ("n_layers", "d_acts", "d_features", "batch_tokens", "data", "feature", "width")
COSTS = [parameters, state_bytes, saved_bytes, backward_bytes, flops, gradient_bytes, reconstruction_bytes]


def rows() -> list[dict[str, Any]]:
    """One row a model and layout: the job, and each of COSTS by its function's name."""
    table = []
    for model, job in MODELS.items():
        for data, feature in LAYOUTS:
            placed = replace(job, data=data, feature=feature)
            table.append({"model": model, "gpus": data * feature, **{size: getattr(placed, size) for size in SIZES}})
            table[-1] |= {"memory_bytes": state_bytes(placed) + backward_bytes(placed)}
            table[-1] |= {cost.__name__: cost(placed) for cost in COSTS}
    return table


def markdown(table: list[dict[str, Any]]) -> str:
    """The rows as a Markdown table, in GB (1e9 bytes) and GFLOP."""
    heads = ["model", "L", "D", "F", "B", "GPUs", "data x feature", "parameters", "state GB", "peak GB", "GFLOP"]
    heads += ["gradients sent, GB", "y~ sent, GB"]
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for row in table:
        cells = [row[key] for key in ("model", "n_layers", "d_acts", "d_features", "batch_tokens", "gpus")]
        cells += [f"{row['data']} x {row['feature']}", f"{row['parameters'] / 1e6:,.0f}M"]
        cells += [f"{row[key] / 1e9:,.1f}" for key in ("state_bytes", "memory_bytes")] + [f"{row['flops'] / 1e9:,.0f}"]
        cells += [f"{row[key] / 1e9:,.2f}" for key in ("gradient_bytes", "reconstruction_bytes")]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="where to write the figures")
    arguments = parser.parse_args()
    table = rows()
    print(markdown(table))
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(table, indent=1, allow_nan=False) + "\n")


if __name__ == "__main__":
    main()
