"""The benchmark's figures for people: lines, the comparison with an earlier run, the plot."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def print_machine(result: Row) -> None:
    """What the machine does at best."""
    peaks = ", ".join(f"{name} {value:.3g}" for name, value in result["matmul_peak_tflops"].items())
    print(f"{result['device']}, torch {result['versions']['torch']}, commit {result['commit']}")
    print(f"matrix products TFLOP/s: {peaks}; copy {result['copy_gb_per_s']:.1f} GB/s", flush=True)


def print_step(row: Row) -> None:
    """One line for one step."""
    name = f"step L={row['L']} D={row['D']} F={row['F']} B={row['B']} {row['precision']} {row['variant']}"
    if "error" in row:
        print(f"{name:58s} {row['error']}", flush=True)
        return
    memory, formula = row["peak_memory_gb"], row.get("formula_memory_gb")
    print(
        f"{name:58s} {row['tokens_per_s']:10,.0f} tokens/s {row['tflops']:8.3f} TFLOP/s  "
        f"{row['share_of_peak']:4.0%} of peak, {row['roofline_share']:4.0%} of roofline, "
        f"{memory:.2f} GB" + (f" ({memory / formula:.2f} of formula)" if formula else ""),
        flush=True,
    )


def print_ratios(rows: list[Row]) -> None:
    """How many times as fast as the textbook step ours is."""
    for row in rows:
        for key in ("over_textbook", "over_textbook_compiled", "over_ours_compiled"):
            if key in row:
                print(f"{row['variant']} at F={row['F']} B={row['B']}: {row[key]:.2f} x {key.removeprefix('over_')}")


def print_reader(row: Row) -> None:
    """One line for one shape of the reader."""
    print(
        f"reader {row['shape']:11s} {row['gb_per_s']:.2f} GB/s, {row['share_of_raw']:.0%} of readinto; "
        f"{row['stall_share']:.2%} of the step's time spent waiting",
        flush=True,
    )


def print_extraction(row: Row) -> None:
    """One line for one language model."""
    print(
        f"extraction {row['model']:14s} {row['tokens_per_s']:,.0f} tokens/s, {row['share_of_forward']:.0%} of the bare "
        f"forward ({row['share_of_own_forward']:.0%} of it with our activation); us a row, parts alone: "
        + ", ".join(f"{part.replace('_', ' ')} {took:.1f}" for part, took in row["us_per_row"].items()),
        flush=True,
    )


def print_stream(row: dict[str, float]) -> None:
    """One line for the activation server."""
    print(
        f"stream {row['stream_gb_per_s']:.2f} GB/s, {row['stream_share_of_loopback']:.0%} of the loopback; "
        f"to sixteen clients {row['clients16_share']:.0%}",
        flush=True,
    )


def print_startup(row: dict[str, float]) -> None:
    """One line for the commands' first answers."""
    print(
        "seconds: " + ", ".join(f"{key.removesuffix('_s').replace('_', ' ')} {took:.2f}" for key, took in row.items())
    )


def compare(old: Row, new: Row) -> None:
    """Old and new of every figure that both runs have, with their ratio."""
    before = dict(_figures(old))
    print(f"\nagainst commit {old['commit']} on {old['device']}: old, new, new / old")
    for name, value in _figures(new):
        if name in before:
            ratio = f"{value / before[name]:8.3f}" if before[name] else ""
            print(f"{name:72s} {before[name]:12.4g} {value:12.4g} {ratio}")


def _figures(result: Row) -> Iterator[tuple[str, float]]:
    """Every figure that is not an input, by a name that says of what."""
    for name, value in result["matmul_peak_tflops"].items():
        yield f"matmul_peak_tflops {name}", value
    yield "copy_gb_per_s", result["copy_gb_per_s"]
    parts = {"step": result["step"], "extraction": result.get("extraction", [])}
    parts |= {"reader": result.get("reader", {}).get("shapes", []), "stream": [result.get("stream", {})]}
    parts |= {"startup": [result.get("startup", {})]}
    for part, rows in parts.items():
        for row in rows:
            label = " ".join([part, *(str(value) for value in row.values() if isinstance(value, (int, str)))])
            for key, value in row.items():
                for name, number in value.items() if isinstance(value, dict) else [("", value)]:
                    if isinstance(number, float):
                        yield f"{label} {key} {name}".rstrip(), number


def plot(rows: list[Row], path: Path) -> None:
    """Step time against F, L and B, each with the other two fixed, beside what the roofline gives."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    rows = [row for row in rows if "error" not in row]
    middle = {key: _most_frequent([row[key] for row in rows]) for key in "FLB"}
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.4), layout="constrained", sharey=True)
    for axis, key, label in zip(axes, "FLB", ("features per layer F", "layers L", "tokens B")):
        fixed = [other for other in "FLB" if other != key]
        line = sorted((row for row in rows if all(row[o] == middle[o] for o in fixed)), key=lambda row: row[key])
        x = [row[key] for row in line]
        axis.plot(x, [row["seconds"] for row in line], "o-", label="measured")
        axis.plot(x, [row["roofline_seconds"] for row in line], "k--", label="roofline")
        axis.set(xlabel=label, xscale="log", yscale="log", title=", ".join(f"{o}={middle[o]}" for o in fixed))
        axis.set_xticks(x, [str(value) for value in x], minor=False)
        axis.minorticks_off()
    axes[0].set_ylabel("seconds a step")
    axes[0].legend(loc="upper left")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def _most_frequent(values: list[int]) -> int:
    return max(set(values), key=values.count)
