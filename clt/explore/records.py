"""The record of each feature, from the tokens on which it fires. Imports no torch: its processes start quickly."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import numpy as safetensors

from clt.data.index import write_atomically
from clt.explore.files import cantor, pack, write_layer
from clt.explore.firings import Firings

TOP, FIFTHS, FIFTH = 16, 5, 4  # examples with the highest activations; of each fifth of the activations
LOGITS = 10  # tokens promoted most, and suppressed most
BINS = 40  # of the histogram
BEFORE, AFTER = 24, 12  # tokens around that of an example
SAMPLED, COACTIVE = 128, 8  # tokens of a feature that are looked up for others that fire there; others that are told


class RecordInputs(NamedTuple):
    """What the records of all layers are made from."""

    firings: Firings
    counts: np.ndarray  # (L, F) int64: tokens on which each feature fires
    vocabulary: list[str]
    transcoder_id: str
    tokens: int  # that count


def write_records(directory: Path, made: Path, layer: int, source: RecordInputs, direct: dict[str, np.ndarray]) -> None:
    """Write the records of a layer into `directory`, then its arrays of the summary and "offsets" into the file `made`.

    direct: "norms" (F, T) of what each feature writes to each target layer, and the ids and values (F, m) of the tokens
    that it promotes and suppresses most, "top", "top_values", "bottom" and "bottom_values".
    """
    F = source.counts.shape[1]
    arrays: dict[str, np.ndarray] = {
        "count": source.counts[layer],
        "max_activation": np.zeros(F, np.float32),
        "mean_activation": np.zeros(F, np.float32),
        "decoder_norm": np.sqrt(np.square(direct["norms"]).sum(1)),
        "example_tokens": np.full((F, TOP), -1, np.int32),
        "top_logits": direct["top"],
        "bottom_logits": direct["bottom"],
    }

    def packed() -> Iterator[bytes]:
        for feature, (places, values) in enumerate(source.firings.layers[layer].by_feature(F)):
            if len(places):
                arrays["max_activation"][feature] = values.max()
                arrays["mean_activation"][feature] = values.mean(dtype=np.float64)
            order = falling(values)
            groups = choose(order, source.firings.document[places])
            highest = source.firings.token[places[groups[0]]]
            arrays["example_tokens"][feature, : len(highest)] = highest
            of_feature = {name: array[feature].tolist() for name, array in direct.items()}
            yield pack(record(source, layer, feature, places, values, order, groups, of_feature))

    arrays["offsets"] = np.array(write_layer(directory, layer, packed()))
    write_atomically(made, safetensors.save({k: np.ascontiguousarray(a) for k, a in arrays.items()}))


def falling(values: np.ndarray) -> np.ndarray:
    """The order of positive float32 values (m,) from the largest to the smallest, equal ones as they stand."""
    # Positive floats are ordered as the integers of the same bits. Sorting whole keys is faster than a stable argsort.
    keys = (-values.view(np.int32).astype(np.int64) << 32) + np.arange(len(values))
    keys.sort()
    return keys & 0xFFFFFFFF


def choose(order: np.ndarray, documents: np.ndarray) -> list[list[int]]:
    """Which firings of a feature become examples: numbers of the highest, then of each fifth, from the highest fifth.

    order (m,): the firings by activation, highest first; documents (m,): theirs. A list has at most one of a
    document, and no firing is in two lists. The highest are those of the documents' highest activations, the first of
    equal ones. Of a fifth four evenly spaced ones are taken, or instead of one the next lower one that may be.
    """
    owners, m = documents[order], len(order)
    distinct = len(np.unique(owners))
    taken: set[int] = set()

    def take(start: int, end: int, most: int, used: set[int]) -> list[int]:
        """Numbers of the first `most` from `start` on that are not taken, nor of a document in `used`."""
        found = []
        for i in range(start, end):
            if len(found) == most or len(used) == distinct:
                break
            owner = owners.item(i)
            if i not in taken and owner not in used:
                used.add(owner)
                taken.add(i)
                found.append(int(order[i]))
        return found

    groups = [take(0, m, TOP, set())]
    for k in range(FIFTHS):
        start, end, used = m * k // FIFTHS, m * (k + 1) // FIFTHS, set()
        spaced = (start + (2 * j + 1) * (end - start) // (2 * FIFTH) for j in range(FIFTH))
        groups.append([number for first in spaced for number in take(first, end, 1, used)])
    return groups


def record(
    source: RecordInputs,
    layer: int,
    feature: int,
    places: np.ndarray,
    values: np.ndarray,
    order: np.ndarray,
    groups: list[list[int]],
    direct: dict[str, list],
) -> dict[str, Any]:
    """A feature's record, as docs/features.md says. places, values (m,): where and how strongly it fires.

    order, groups: by `falling` and `choose`; direct: the feature's rows of what `write_records` takes.
    """
    m = len(places)
    if m:
        # Five digits of the largest are enough, and half of the bytes.
        values = np.round(values.astype(np.float64), 4 - int(np.floor(np.log10(values.max()))))
    rising = values[order[::-1]]
    low, high = (float(rising[0]), float(rising[-1])) if m else (0.0, 0.0)
    bins = np.minimum((values - low) * BINS / ((high - low) or 1), BINS - 1).astype(np.int64)
    names = ["Top activations"] + [f"Activations {80 - 20 * k} to {100 - 20 * k}%" for k in range(FIFTHS)]
    quantiles = _examples(source, places, values, groups)
    return {
        "transcoder_id": source.transcoder_id,
        "index": cantor(layer, feature),
        "layer": layer,
        "feature": feature,
        "count": m,
        "activation_frequency": m / source.tokens,
        "act_min": low,
        "act_max": high,
        "quantile_values": rising[(np.arange(1, 101) * m + 99) // 100 - 1].tolist() if m else [0.0] * 100,
        "histogram": np.bincount(bins, minlength=BINS).tolist(),
        "top_logits": [source.vocabulary[id] for id in direct["top"]],
        "top_logit_values": _rounded(direct["top_values"]),
        "bottom_logits": [source.vocabulary[id] for id in direct["bottom"]],
        "bottom_logit_values": _rounded(direct["bottom_values"]),
        "decoder_norms": _rounded(direct["norms"]),
        "coactive": coactive(source, layer, feature, places) if m else [],
        "examples_quantiles": [
            {"quantile_name": name, "examples": examples}
            for number, (name, examples) in enumerate(zip(names, quantiles))
            if examples or number == 0
        ],
    }


def _rounded(values: list[float]) -> list[float]:
    return [float(f"{value:.4g}") for value in values]


def _examples(
    source: RecordInputs, places: np.ndarray, values: np.ndarray, groups: list[list[int]]
) -> list[list[dict[str, Any]]]:
    """The examples of each group: windows of text around the chosen tokens, which stay in the model's own window."""
    firings, T, vocabulary, seen = source.firings, source.firings.context, source.vocabulary, set()
    chosen = places[[number for group in groups for number in group]]
    position = chosen % T
    starts, ends = chosen - np.minimum(position, BEFORE), chosen + np.minimum(T - position, AFTER + 1)
    near = np.searchsorted(places, (starts, ends)).T
    examples = []
    for place, start, end, (low, high) in zip(chosen.tolist(), starts.tolist(), ends.tolist(), near.tolist()):
        token, activations = firings.token[start:end], [0] * (end - start)
        for fired, value in zip(places[low:high].tolist(), values[low:high].tolist()):
            activations[fired - start] = value
        text = token.tobytes()
        examples.append(
            {
                "tokens": [vocabulary[id] for id in token.tolist()],
                "tokens_acts_list": activations,
                "train_token_ind": place - start,
                "is_repeated_datapoint": text in seen,
                "document": int(firings.document[place]),
                "position": place % T,
                "window": place // T,
            }
        )
        seen.add(text)
    of_all = iter(examples)
    return [list(islice(of_all, len(group))) for group in groups]


def coactive(source: RecordInputs, layer: int, feature: int, places: np.ndarray) -> list[dict[str, Any]]:
    """The features that fire on the same tokens most, by |both fire| / |one of them fires|, estimated.

    Where the feature fires on more than 128 tokens, the share of them on which another one fires is taken from 128
    evenly spaced ones.
    """
    F, m = source.counts.shape[1], len(places)
    sample = places[np.linspace(0, m - 1, min(m, SAMPLED)).astype(np.int64)]
    others = np.concatenate([of_layer.at(sample) + s * F for s, of_layer in enumerate(source.firings.layers)])
    together = np.bincount(others)
    together[layer * F + feature] = 0
    found = np.flatnonzero(together)
    share, count = together[found] / len(sample), source.counts.flat[found]
    both = np.minimum(share * m, count)
    jaccard = both / (m + count - both)
    best = np.argsort(-jaccard, kind="stable")[:COACTIVE]
    return [
        {"layer": id // F, "feature": id % F, "share": round(part, 3), "jaccard": round(overlap, 3)}
        for id, part, overlap in zip(found[best].tolist(), share[best].tolist(), jaccard[best].tolist())
    ]
