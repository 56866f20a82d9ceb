"""On paper: memory, FLOPs and bytes on the network per step and per rank, for real models on 8, 64 and 512 GPUs.

    python benchmarks/scale.py [--json benchmarks/results/scale.json]

The formulas are the functions below; tests/test_scale.py holds them against what small runs really take. F features a
layer, B tokens a step over all ranks, on a (data, feature) mesh: each of `feature` ranks holds F / feature features of
every layer, each of `data` groups reads B / data rows. Not counted: the allocator's fragmentation, CUDA's and NCCL's
own buffers, elementwise arithmetic, evaluation.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

FLOAT = 4  # bytes: master weights, gradients, moments, errors, penalty


@dataclass(frozen=True)
class Job:
    """A training step: its sizes, and how it is spread over ranks. `width`: bytes of a multiplied number (bf16: 2)."""

    n_layers: int
    d_acts: int
    d_features: int
    batch_tokens: int
    data: int = 1
    feature: int = 1
    width: int = 2

    @property
    def local(self) -> tuple[int, int, int, int]:
        """L, D, and a rank's own features F and tokens B."""
        return self.n_layers, self.d_acts, self.d_features // self.feature, self.batch_tokens // self.data


def decoder_parameters(job: Job) -> int:
    """Of one rank: sum over source layers s of F * (L - s) * D."""
    L, D, F, _ = job.local
    return F * D * L * (L + 1) // 2


def parameters(job: Job) -> int:
    """Of one rank: encoder, its bias and thresholds, decoder; every rank has the whole decoder bias."""
    L, D, F, _ = job.local
    return L * D * F + 2 * L * F + decoder_parameters(job) + L * D


def optimizer_bytes(job: Job) -> int:
    """Adam's two moments, and one step counter for each of W_enc, b_enc, threshold, b_dec and the L decoder tensors."""
    return 2 * FLOAT * parameters(job) + FLOAT * (job.n_layers + 4)


def state_bytes(job: Job) -> int:
    """What lives from step to step: float32 weights, gradients (DDP's buckets) and moments, 16 bytes a parameter."""
    return 2 * FLOAT * parameters(job) + optimizer_bytes(job)


def saved_bytes(job: Job) -> int:
    """Kept by the forward pass for the backward pass, parameters and batch not counted again.

    (L, B, F): the encoder's products. (L, B, D): normalised inputs and reconstruction, which features that are spread
    over ranks add up in float32. (L, F): the decoder's norms.
    """
    L, D, F, B = job.local
    reconstruction = FLOAT if job.feature > 1 else job.width
    return L * B * F * job.width + L * B * D * (job.width + reconstruction) + FLOAT * L * F


def backward_bytes(job: Job) -> int:
    """The most that a step holds at once beyond `state_bytes`, without torch.compile, which holds less.

    Either in the forward pass at the last layer: all features, what was saved, and beside them that layer's features
    again and all decoders to it, or (B, F) in float32 four times, for the pass over the features. Or at the squared
    error: three float32 tensors of (L, B, D) beside what was saved. Or in the backward pass at some layer, from the
    last to the first: the earlier layers' products and the gradients of the later layers' pre-activations, the inputs,
    the gradient of y~ and the decoders' norms, and beside them either (B, F) in float32 eight times, or the layer's own
    gradients.
    """
    L, D, F, B = job.local
    saved, matrix = saved_bytes(job), B * F
    pair = (job.width + (FLOAT if job.feature > 1 else job.width)) * L * B * D  # x~, and the gradient of y~
    wide = FLOAT if job.width < FLOAT else 0  # what is narrow is widened beside it
    decode = max(matrix * job.width + L * F * D * job.width, 4 * FLOAT * matrix + (wide and job.width * matrix))
    peaks = [saved + 3 * FLOAT * L * B * D, saved + L * matrix * job.width + decode]
    for s in range(L):
        held = L * matrix * job.width + pair + FLOAT * L * F
        decoder = F * (L - s) * D
        gating = matrix * (job.width + 8 * FLOAT + (wide and 2 * job.width))
        own = 3 * matrix * job.width + decoder * (job.width + wide)
        peaks.append(held + max(gating, own))
    return max(peaks)


def flops(job: Job) -> int:
    """Of one rank's matrix products: 6 a decoder weight and token, 4 an encoder weight (no input gradient)."""
    L, D, F, B = job.local
    return B * (6 * decoder_parameters(job) + 4 * L * D * F)


def ring_bytes(size: int, ranks: int) -> int:
    """What each rank sends (and receives) in an all-reduce of `size` bytes over a ring."""
    return 2 * (ranks - 1) * size // ranks


def gradient_bytes(job: Job) -> int:
    """Sent by a rank to sum its float32 gradients over the data dimension, once a step."""
    return ring_bytes(FLOAT * parameters(job), job.data)


def reconstruction_bytes(job: Job) -> int:
    """Sent by a rank to sum the float32 partial y~ (B, L, D) over the feature dimension, in the forward pass alone."""
    L, D, _, B = job.local
    return ring_bytes(FLOAT * B * L * D, job.feature)


# L, D, F, B. GPT-2 has the reference run's features, then those of the open GPT-2 CLTs; batches grow with the model.
MODELS = {
    "GPT-2": Job(12, 768, 6144, 4096),
    "GPT-2, wide": Job(12, 768, 32768, 4096),
    "Llama-3.2-1B": Job(16, 2048, 16384, 16384),
    "Gemma-2-2B": Job(26, 2304, 16384, 16384),
    "Gemma-2-9B": Job(42, 3584, 16384, 16384),
}
LAYOUTS = [(8, 1), (1, 8), (64, 1), (8, 8), (1, 64), (512, 1), (64, 8), (8, 64)]  # (data, feature)
COSTS = [parameters, state_bytes, saved_bytes, backward_bytes, flops, gradient_bytes, reconstruction_bytes]


def rows() -> list[dict[str, Any]]:
    """One row a model and layout: the job, and each of COSTS by its function's name."""
    table = []
    for model, job in MODELS.items():
        for data, feature in LAYOUTS:
            placed = replace(job, data=data, feature=feature)
            table.append({"model": model, "gpus": data * feature, **asdict(placed)})
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
