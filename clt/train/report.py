"""A run's report: plots as PNG, the table of results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from clt.train.logger import read_metrics


def write_plots(run_dir: str | Path, evaluation: dict[str, Any], name: str = "report") -> None:
    """Write {training,layers,density}.png from metrics.jsonl and an `evaluate_activations` into `run_dir`/`name`."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    directory = Path(run_dir) / name
    directory.mkdir(exist_ok=True)
    lines = [line for line in read_metrics(run_dir) if "train_loss" in line]

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    steps = [line["step"] for line in lines]
    left.plot(steps, [line["train_loss"] for line in lines], label="loss")
    left.plot(steps, [line["train_mse"] for line in lines], label="MSE (normalised)")
    left.set(xlabel="step", yscale="log", title="Loss")
    left.legend(loc="upper right")
    right.plot(steps, [line["L0"] for line in lines], color="C2")
    right.set(xlabel="step", yscale="log", ylabel="features on per token", title="L0, all layers")
    figure.savefig(directory / "training.png", dpi=120)
    plt.close(figure)

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    layers = range(len(evaluation["fve_per_layer"]))
    left.bar(layers, evaluation["fve_per_layer"].tolist())
    left.axhline(
        float(evaluation["fve"]), color="black", linewidth=1, label=f"all layers {float(evaluation['fve']):.3f}"
    )
    left.set(xlabel="layer", ylim=(0, 1), title="Fraction of variance explained, held out", xticks=layers)
    left.legend(loc="lower right")
    right.bar(layers, evaluation["l0_per_layer"].tolist(), color="C2")
    right.set(xlabel="layer", title="L0 per layer, held out", xticks=layers)
    figure.savefig(directory / "layers.png", dpi=120)
    plt.close(figure)

    density = evaluation["density"].flatten().cpu()
    figure, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
    axes.hist(density[density > 0].log10().tolist(), bins=60)
    never = int((density == 0).sum())
    axes.set(
        xlabel="log10 of the share of held-out tokens a feature fires on",
        ylabel="features",
        title=f"Feature density ({never} of {density.numel()} never fire here)",
    )
    figure.savefig(directory / "density.png", dpi=120)
    plt.close(figure)


ROWS = {
    "fve": "fraction of variance explained (held out)",
    "nmse": "normalised MSE (held out)",
    "l0_total": "L0, all layers",
    "l0_per_layer": "L0 per layer",
    "dead_fraction": "dead features",
    "top1_agreement": "top-1 agreement with the original model",
    "kl": "KL(original || replaced), nats",
    "ce_original": "cross-entropy, original model, nats",
    "ce_replaced": "cross-entropy, all MLPs replaced",
    "ce_mean_ablated": "cross-entropy, all MLPs mean-ablated",
    "ce_recovered": "share of that gap recovered",
    "tokens_per_second": "training tokens/s",
    "wall_seconds": "wall time, seconds",
}


def table(summary: dict[str, Any]) -> str:
    """The results as two aligned columns."""

    def show(value: Any) -> str:
        if isinstance(value, list):
            return " ".join(f"{v:.1f}" for v in value)
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"

    rows = [(label, show(summary[key])) for key, label in ROWS.items() if summary.get(key) is not None]
    width = max(len(label) for label, _ in rows)
    return "\n".join(f"{label:<{width}}  {value:>12}" for label, value in rows)
