"""The end of a run: its summary, plots as PNG and the table of results, for train_ddp.py and `clt eval`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from clt.config import Config, config_hash
from clt.data.index import write_json
from clt.train.evaluation import Evaluation
from clt.train.logger import read_metrics
from clt.train.state import TrainState


def summary(config: Config, state: TrainState, dtype: torch.dtype, wall_seconds: float) -> dict[str, Any]:
    """What summary.json says of a finished run beside its quality."""
    world, tokens = state.world, config.train.steps * config.train.batch_tokens
    return {
        "dead_window_tokens": min(config.eval.dead_window, tokens),
        "tokens_per_second": tokens / state.busy_seconds,
        "wall_seconds": wall_seconds,
        "steps": config.train.steps,
        "train_tokens": tokens,
        "world_size": world.size,
        "device": torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else "cpu",
        "precision": str(dtype).removeprefix("torch."),
        "torch_version": torch.__version__,
        "config_hash": config_hash(config),
    }


def conclude(run_dir: Path, evaluation: Evaluation, file: str, plots: str, **more: Any) -> None:
    """Write the numbers, and `more`, to `run_dir`/`file`, the plots to `run_dir`/`plots`, and print the table."""
    numbers = evaluation.numbers | more
    (run_dir / file).parent.mkdir(exist_ok=True)
    write_json(run_dir / file, numbers)  # first: a plot that fails must not cost them
    write_plots(run_dir, evaluation.tensors, plots)
    print(f"\n{table(numbers)}\n{remarks(numbers)}\nThe results are in {run_dir}: {file}, {plots}/")


def write_plots(run_dir: str | Path, evaluation: dict[str, Any], name: str = "report") -> None:
    """Write {training,layers,density}.png from metrics.jsonl and an `evaluate_activations` into `run_dir`/`name`."""
    from matplotlib.figure import Figure

    directory = Path(run_dir) / name
    directory.mkdir(exist_ok=True)
    lines = [line for line in read_metrics(run_dir) if "train_loss" in line]

    figure = Figure(figsize=(10, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    steps = [line["step"] for line in lines]
    left.plot(steps, [line["train_loss"] for line in lines], label="loss")
    left.plot(steps, [line["train_mse"] for line in lines], label="MSE (normalised)")
    left.set(xlabel="step", yscale="log", title="Loss")
    left.legend(loc="upper right")
    right.plot(steps, [line["L0"] for line in lines], color="C2")
    right.set(xlabel="step", yscale="log", ylabel="features on per token", title="L0, all layers")
    figure.savefig(directory / "training.png", dpi=120)

    figure = Figure(figsize=(10, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    layers, fve = range(len(evaluation["fve_per_layer"])), float(evaluation["fve"])
    left.bar(layers, evaluation["fve_per_layer"].tolist())  # a layer that never varies has none: nan draws no bar
    left.axhline(fve, color="black", linewidth=1, label=f"all layers {fve:.3f}")
    left.set(xlabel="layer", ylim=(0, 1), title="Fraction of variance explained, held out", xticks=layers)
    left.legend(loc="lower right")
    right.bar(layers, evaluation["l0_per_layer"].tolist(), color="C2")
    right.set(xlabel="layer", title="L0 per layer, held out", xticks=layers)
    figure.savefig(directory / "layers.png", dpi=120)

    density = evaluation["density"].flatten().cpu()
    never = int((density == 0).sum())
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    axes.hist(density[density > 0].log10().tolist(), bins=60)
    axes.set(
        xlabel="log10 of the share of held-out tokens a feature fires on",
        ylabel="features",
        title=f"Feature density ({never} of {density.numel()} never fire here)",
    )
    figure.savefig(directory / "density.png", dpi=120)


ROWS = {
    "fve": "fraction of variance explained (held out)",
    "nmse": "normalised MSE (held out)",
    "l0_total": "L0, all layers",
    "l0_over_k": "L0 over the wanted one",
    "l0_per_layer": "L0 per layer",
    "dead_fraction": "dead features",
    "never_fired": "features that never fire here",
    "dense_fraction": "features that fire on over 10% of tokens",
    "decoder_mass": "decoder mass by distance in layers, %",
    "top1_agreement": "top-1 agreement with the original model",
    "kl": "KL(original || replaced), nats",
    "ce_original": "cross-entropy, original model, nats",
    "ce_replaced": "cross-entropy, all MLPs replaced",
    "ce_mean_ablated": "cross-entropy, all MLPs mean-ablated",
    "ce_recovered": "share of that gap recovered",
    "tokens_per_second": "training tokens/s",
    "wall_seconds": "wall time, seconds",
}


def table(*results: dict[str, Any], names: Sequence[str] = ()) -> str:
    """Each of the results as an aligned column, below its name; a number without a value is "none"."""

    def show(value: Any) -> str:
        if value is None:
            return "none"
        if isinstance(value, list):
            return " ".join(f"{v:.1f}" for v in value)
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"

    rows = [["", *names]] if names else []
    for key, label in ROWS.items():
        if any(key in numbers for numbers in results):
            rows.append([label, *(show(numbers.get(key)) for numbers in results)])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join([f"{row[0]:<{widths[0]}}", *(f"{v:>{max(12, w)}}" for v, w in zip(row[1:], widths[1:]))])
        for row in rows
    )


def remarks(numbers: dict[str, Any]) -> str:
    """Which of the results have no value, and why: a line for each cause, or nothing."""
    lines = []
    if still := [str(layer) for layer, fve in enumerate(numbers["fve_per_layer"]) if fve is None]:
        lines.append(
            f"Layer {', '.join(still)}: the held-out targets never vary, so they have no FVE and no normalised MSE; "
            "the figures for all layers leave them out.\n"
        )
    replacement = ("top1_agreement", "kl", "ce_original", "ce_replaced", "ce_mean_ablated", "ce_recovered")
    if none := [key for key in replacement if numbers.get(key, 0) is None]:
        lines.append(
            f"No value: {', '.join(none)}. Logits are nan, or -inf for a token that counts, or mean ablation changes "
            "nothing.\n"
        )
    return "".join(lines)
