"""A run's features as SAEDashboard's batch files, from which Neuronpedia's converter makes what Neuronpedia imports.

DIR/layer_0/batch-0.json ..: 128 features each, in a directory for each layer, which is what the converter takes. The
fields are those of SAEDashboard's NeuronpediaDashboardBatch; those that we do not compute are empty lists.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from clt.explore.files import Features
from clt.export.directory import new_directory

_BATCH = 128
_ABSENT = [
    *(f"neuron_alignment_{name}" for name in ("indices", "values", "l1")),
    *(f"correlated_{of}_{name}" for of in ("neurons", "features") for name in ("indices", "l1", "pearson")),
    *(f"logits_hist_data_bar_{name}" for name in ("heights", "values")),  # of all tokens' logits
    "decoder_weights_dist",  # over attention heads
]


def write_batches(features: Features, directory: Path, progress: bool = True) -> None:
    """Write the features into a new directory, batch by batch. Raises UserError when it exists, and as `Features`."""
    summary, F = features.summary, features.d_features
    with (
        new_directory(directory) as partial,
        tqdm(total=features.n_layers * F, unit="feature", desc="batches", disable=not progress) as bar,
    ):
        for layer, number in enumerate(summary["layers"]):
            folder = partial / f"layer_{number}"
            folder.mkdir()
            for start in range(0, F, _BATCH):
                stop = min(start + _BATCH, F)
                batch = {
                    "model_id": Path(summary["model"]).name,  # an organisation or a path is no part of their ids
                    "layer": number,
                    "sae_set": summary["transcoder_id"],
                    "sae_id_suffix": None,
                    "features": [_feature(features.record(layer, f), summary) for f in range(start, stop)],
                }
                text = json.dumps(batch, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
                (folder / f"batch-{start // _BATCH}.json").write_text(text, encoding="utf-8")
                bar.update(stop - start)


def _feature(record: dict[str, Any], summary: dict[str, Any]) -> dict[str, Any]:
    low, high, bars = record["act_min"], record["act_max"], len(record["histogram"])
    width = (high - low) / bars
    bars = bars if width else min(record["count"], 1)  # one value needs one bar; none needs none
    return {
        "feature_index": record["feature"],
        "n_prompts_total": summary["windows"],
        "n_tokens_in_prompt": summary["context"],
        "frac_nonzero": record["activation_frequency"],
        "freq_hist_data_bar_heights": record["histogram"][:bars],
        "freq_hist_data_bar_values": [low + width * (i + 0.5) for i in range(bars)],  # the bars' middles
        "pos_str": record["top_logits"],
        "pos_values": record["top_logit_values"],
        "neg_str": record["bottom_logits"],
        "neg_values": record["bottom_logit_values"],
        "activations": list(_activations(record, summary["tokens"])),
        **{name: [] for name in _ABSENT},
    }


def _activations(record: dict[str, Any], tokens: int) -> Iterator[dict[str, Any]]:
    """The examples, each with the bounds of its list's activations and the share of all tokens that are within."""
    count, quantiles = record["count"], record["quantile_values"]
    for group in record["examples_quantiles"]:
        # "Activations 80 to 100%", or the highest examples, which their page knows by -1
        bounds = {"bin_min": -1, "bin_max": record["act_max"], "bin_contains": -1}
        if percents := [int(digits) for digits in re.findall(r"\d+", group["quantile_name"])]:
            low, high = percents
            within = -(-count * high // 100) - -(-count * low // 100)
            bounds["bin_min"] = quantiles[low - 1] if low else record["act_min"]
            bounds |= {"bin_max": quantiles[high - 1], "bin_contains": within / tokens}
        for example in group["examples"]:
            yield {
                **bounds,
                "tokens": example["tokens"],
                "values": example["tokens_acts_list"],
                "qualifying_token_index": example["train_token_ind"],
            }
