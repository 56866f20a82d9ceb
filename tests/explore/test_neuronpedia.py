"""The batches for Neuronpedia's converter say what the records say."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clt.errors import UserError
from clt.explore import neuronpedia
from clt.explore.files import ARRAYS, Features, pack, write_layer, write_summary
from clt.explore.neuronpedia import write_batches

# What the converter reads without a default, as of 2026-08.
READ = {
    "feature_index",
    "frac_nonzero",
    *(f"neuron_alignment_{name}" for name in ("indices", "values", "l1")),
    *(f"correlated_{of}_{name}" for of in ("neurons", "features") for name in ("indices", "pearson", "l1")),
    *(f"{of}_{name}" for of in ("neg", "pos") for name in ("str", "values")),
    *(f"{of}_hist_data_bar_{name}" for of in ("freq", "logits") for name in ("heights", "values")),
    "decoder_weights_dist",
    "activations",
}


def batches(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(file.read_text()) for file in sorted(directory.glob("batch-*.json"))]


def test_every_feature_is_in_one_batch_with_what_its_record_says(made, tmp_path, monkeypatch):
    monkeypatch.setattr(neuronpedia, "_BATCH", 4)
    features = Features(made.features.directory)
    features.summary |= {"layers": [1, 4, 7], "model": "/home/me/gpt2"}
    write_batches(features, tmp_path / "out", progress=False)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"layer_1", "layer_4", "layer_7"}
    fired = 0
    for layer, number in enumerate([1, 4, 7]):
        found = batches(tmp_path / "out" / f"layer_{number}")
        assert [len(batch["features"]) for batch in found] == [4, 4, 2]
        for batch in found:
            named = (batch["model_id"], batch["layer"], batch["sae_set"], batch["sae_id_suffix"])
            assert named == ("gpt2", number, features.summary["transcoder_id"], None)
        of_layer = [feature for batch in found for feature in batch["features"]]
        assert [feature["feature_index"] for feature in of_layer] == list(range(10))
        for index, feature in enumerate(of_layer):
            record = features.record(layer, index)
            assert feature.keys() >= READ
            assert "vector" not in feature  # no single one is what a feature writes
            check(feature, record)
            fired += record["count"] > 0
    assert fired > 10


def check(feature: dict[str, Any], record: dict[str, Any]) -> None:
    assert feature["frac_nonzero"] == record["activation_frequency"]
    assert [feature[name] for name in ("pos_str", "pos_values")] == [record["top_logits"], record["top_logit_values"]]
    assert [feature[name] for name in ("neg_str", "neg_values")] == [
        record["bottom_logits"],
        record["bottom_logit_values"],
    ]
    assert sum(feature["freq_hist_data_bar_heights"]) == record["count"]
    assert len(feature["freq_hist_data_bar_values"]) == len(feature["freq_hist_data_bar_heights"])
    examples = [example for group in record["examples_quantiles"] for example in group["examples"]]
    assert len(feature["activations"]) == len(examples)
    top = len(record["examples_quantiles"][0]["examples"])
    for place, (activation, example) in enumerate(zip(feature["activations"], examples)):
        assert activation["tokens"] == example["tokens"]
        assert activation["values"] == example["tokens_acts_list"]
        value = activation["values"][activation["qualifying_token_index"]]
        if place < top:
            assert (activation["bin_min"], activation["bin_contains"]) == (-1, -1)
        else:
            assert activation["bin_contains"] > 0
        assert activation["bin_min"] <= value <= activation["bin_max"] <= record["act_max"]


def test_bounds_and_bars_of_activations_1_to_7(tmp_path):
    """A feature with activations 1 .. 7, one with a single activation, and one that never fires."""
    values = {0: [1, 2, 3, 4, 5, 6, 7], 1: [3], 2: []}
    # From the highest fifth on, ranks 7 k // 5 to 7 (k + 1) // 5.
    fifths = {0: [[7], [6], [5, 4], [3], [2, 1]], 1: [[], [], [], [], [3]], 2: []}

    def record(feature: int) -> dict[str, Any]:
        rising, m = values[feature], len(values[feature])
        groups = [("Top activations", rising[::-1])]
        groups += [(f"Activations {80 - 20 * k} to {100 - 20 * k}%", own) for k, own in enumerate(fifths[feature])]
        example = {"tokens": ["a", "b"], "train_token_ind": 1}
        return {
            "feature": feature,
            "count": m,
            "activation_frequency": m / 100,
            "act_min": min(rising, default=0),
            "act_max": max(rising, default=0),
            "quantile_values": [rising[-(-p * m // 100) - 1] if m else 0 for p in range(1, 101)],
            "histogram": {0: [1, 1, 1, 1, 1, 2], 1: [1, 0, 0, 0, 0, 0], 2: [0] * 6}[feature],
            **{name: [] for name in ("top_logits", "top_logit_values", "bottom_logits", "bottom_logit_values")},
            "examples_quantiles": [
                {"quantile_name": name, "examples": [{**example, "tokens_acts_list": [0, value]} for value in own]}
                for name, own in groups
                if own or name == "Top activations"
            ],
        }

    (tmp_path / "features").mkdir()
    offsets = write_layer(tmp_path / "features", 0, (pack(record(feature)) for feature in values))
    arrays = dict.fromkeys(ARRAYS, np.zeros((1, 3)))
    summary = {"n_layers": 1, "d_features": 3, "tokens": 100, "layers": [0], "windows": 10, "context": 16}
    summary |= {"model": "gpt2", "transcoder_id": "mine-10"}
    write_summary(tmp_path / "features", [offsets], arrays, [], summary)
    features = Features(tmp_path / "features")
    write_batches(features, tmp_path / "out", progress=False)
    ((many, single, dead),) = (batch["features"] for batch in batches(tmp_path / "out/layer_0"))
    bounds = [tuple(a[f"bin_{name}"] for name in ("min", "max", "contains")) for a in many["activations"]]
    assert bounds[:7] == [(-1, 7, -1)] * 7
    fifth_bounds = [(6, 7, 0.01), (5, 6, 0.01), (3, 5, 0.02), (3, 5, 0.02), (2, 3, 0.01), (1, 2, 0.02), (1, 2, 0.02)]
    assert bounds[7:] == fifth_bounds
    assert many["freq_hist_data_bar_values"] == [1.5, 2.5, 3.5, 4.5, 5.5, 6.5]
    assert (single["freq_hist_data_bar_values"], single["freq_hist_data_bar_heights"]) == ([3], [1])
    assert (dead["freq_hist_data_bar_values"], dead["freq_hist_data_bar_heights"], dead["activations"]) == ([], [], [])
    with pytest.raises(UserError, match="exists already"):
        write_batches(features, tmp_path / "out")
