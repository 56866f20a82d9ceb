"""What the page shows of all features: an overview and a table that sorts and filters. No record is opened for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from clt.explore.files import Features
from clt.files import or_null, read_object
from clt.train.report import ROWS

SORTS = ("feature", "count", "max_activation", "mean_activation", "decoder_norm")
_POINTS = 20_000  # of the scatter: with more features, one is drawn for each cell of a grid
_GRID = 400


class Query(NamedTuple):
    """Which features, in which order."""

    sort: str = "feature"  # one of SORTS, with a "-" before it the other way round
    layer: int | None = None
    min: float = 0.0  # share of tokens on which it fires, at least and at most
    max: float = 1.0
    text: str = ""  # part of a token on which one of its highest examples fires, in any case
    logit: str = ""  # part of a token that it promotes
    start: int = 0
    limit: int = 100


class Table:
    """The features of a run, by the arrays of their summary."""

    def __init__(self, features: Features) -> None:
        self.features = features
        self._orders: dict[str, np.ndarray] = {}

    def select(self, query: Query) -> dict[str, Any]:
        """The number of features that the query asks for, and the rows from `start` on, `limit` at most."""
        order = self._order(query.sort)
        found = order[self._mask(query)[order]]
        page = found[query.start : query.start + query.limit].tolist()
        rows = [self.row(*divmod(place, self.features.d_features)) for place in page]
        return {"total": len(found), "rows": rows}

    def row(self, layer: int, feature: int) -> dict[str, Any]:
        """A feature in the table; `tokens` are those on which its highest examples fire, highest first."""
        of = {name: array[layer, feature] for name, array in self.features.arrays.items()}
        return {
            "layer": layer,
            "feature": feature,
            "count": int(of["count"]),
            "max": rounded(of["max_activation"]),
            "mean": rounded(of["mean_activation"]),
            "norm": rounded(of["decoder_norm"]),
            "tokens": self.texts(of["example_tokens"]),
            "top": self.texts(of["top_logits"]),
            "bottom": self.texts(of["bottom_logits"]),
        }

    def texts(self, ids: np.ndarray) -> list[str]:
        """The texts of some token ids; -1 is none."""
        return [self.features.vocabulary[id] for id in ids.tolist() if id >= 0]

    def _order(self, sort: str) -> np.ndarray:
        """All features as places in (L * F), sorted; equal ones by layer and number."""
        if sort not in self._orders:
            name = sort.removeprefix("-")
            arrays = self.features.arrays
            keys = np.arange(arrays["count"].size) if name == "feature" else arrays[name].ravel()
            self._orders[sort] = np.argsort(-keys if sort.startswith("-") else keys, kind="stable")
        return self._orders[sort]

    def _mask(self, query: Query) -> np.ndarray:
        """(L * F,): whether a feature is asked for."""
        arrays, frequency = self.features.arrays, self.features.arrays["count"] / self.features.summary["tokens"]
        mask = (frequency >= query.min) & (frequency <= query.max)  # (L, F)
        if query.layer is not None:
            mask &= np.arange(self.features.n_layers)[:, None] == query.layer
        for text, name in ((query.text, "example_tokens"), (query.logit, "top_logits")):
            if text:
                hits = [text.lower() in token.lower() for token in self.features.vocabulary]
                mask &= np.array([*hits, False])[arrays[name]].any(-1)  # the last is for -1, no token
        return mask.ravel()

    def overview(self, run: Path) -> dict[str, Any]:
        """What the first page shows. The figures are null unless `run` was evaluated at the features' step."""
        arrays, summary = self.features.arrays, self.features.summary
        fired = arrays["count"] > 0
        return {
            "summary": summary,
            "figures": figures(run, summary["step"]),
            "labels": ROWS,
            "l0_per_layer": [rounded(l0) for l0 in arrays["count"].sum(1) / summary["tokens"]],
            "silent_per_layer": (~fired).sum(1).tolist(),
            "points": self._points(),
        }

    def _points(self) -> dict[str, list[Any]]:
        """Layer, feature, count and highest activation of the features that fire, as columns."""
        arrays = self.features.arrays
        layer, feature = arrays["count"].nonzero()
        count, highest = (arrays[name][layer, feature] for name in ("count", "max_activation"))
        if len(layer) > _POINTS:
            drawn = np.random.default_rng(0).permutation(len(layer))  # of a cell any one, not always the first layer's
            cells = _cells(np.log(count[drawn])) * _GRID + _cells(np.log(highest[drawn]))
            kept = np.sort(drawn[np.unique(cells, return_index=True)[1]])
            layer, feature, count, highest = layer[kept], feature[kept], count[kept], highest[kept]
        columns = {"layer": layer, "feature": feature, "count": count}
        return {name: column.tolist() for name, column in columns.items()} | {"max": [rounded(v) for v in highest]}


def _cells(values: np.ndarray) -> np.ndarray:
    """The cell of a grid of _GRID that each value falls into."""
    low, high = values.min(), values.max()
    return ((values - low) / max(high - low, 1e-9) * (_GRID - 1)).astype(np.int64)


def figures(run: Path, step: int) -> dict[str, Any] | None:
    """The quality of a run at a step, from the end of training or `clt eval`; None when it was not evaluated there."""
    remedy = "write it again with `clt eval RUN`"
    for file in (run / f"report_step_{step:08d}" / "evaluation.json", run / "summary.json"):
        if file.is_file():
            found = read_object(file, {"steps": int | None}, remedy)
            if file.name != "summary.json" or found["steps"] == step:
                return {key: found[key] for key in (*ROWS, "fve_per_layer") if key in found}
    return None


def rounded(value: Any) -> float | None:
    """A number with the four digits that the page shows; None for nan and inf."""
    return or_null(float(f"{float(value):.4g}"))
