"""Describe and verify a store. Imports no torch, so that `clt inspect` answers at once."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from clt.data.index import STATISTICS, ShardEntry, read_index, read_statistics
from clt.data.shards import checksum, dataset_offsets
from clt.data.survey import survey
from clt.errors import UserError, size_text


def describe(path: str | Path) -> str:
    """A store's size, origin and scales, and the warnings of `survey`, as lines of text.

    Raises UserError when it is unfinished or damaged.
    """
    index = read_index(path)
    statistics = read_statistics(Path(path) / STATISTICS, "np", (index.n_layers, index.d_acts))
    for shard in index.shards:
        dataset_offsets(Path(path) / shard["file"], shard["rows"], *index.shape)
    text = ", ".join(f"{key} {value}" for key, value in index.text.items() if value is not None)
    size = sum((Path(path) / shard["file"]).stat().st_size for shard in index.shards)
    group = "" if index.group_rows is None else f" in groups of {index.group_rows} rows"
    lines = [
        f"store     {path} (format {index.format_version})",
        f"size      {size_text(size)}: {index.rows} rows in {len(index.shards)} shards",
        f"rows      (2, L={index.n_layers}, D={index.d_acts}) {index.dtype}",
        f"model     {index.model}, revision {index.revision}, tokenizer {index.tokenizer_hash}",
        f"sites     {index.input_sites[0]} -> {index.output_sites[0]} (first layer)",
        f"text      {text}",
        f"windows   {index.context} tokens, shuffled{group} with seed {index.seed}",
        "layer     input rms  target rms",
    ]
    inputs, targets = (
        (statistics[f"{side}_mean"] ** 2 + statistics[f"{side}_sd"] ** 2).mean(1) ** 0.5 for side in ("input", "target")
    )
    rms = [f"{layer:5d}    {x:10.4g}  {y:10.4g}" for layer, x, y in zip(index.layers, inputs, targets)]
    odd = [f"warning   {text}" for text in survey(Path(path), index, statistics)]
    return "\n".join(lines + rms + odd)


def verify(path: str | Path) -> None:
    """Recompute the checksum of every shard of a store; raises UserError that names all altered shards."""
    index = read_index(path)

    def intact(shard: ShardEntry) -> bool:
        kind, _, _ = shard["checksum"].partition(":")
        return checksum(Path(path) / shard["file"], kind) == shard["checksum"]

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        altered = [shard["file"] for shard, fine in zip(index.shards, pool.map(intact, index.shards)) if not fine]
    if altered:
        raise UserError(
            f"store {path} has altered shards: {', '.join(altered)} do not have the checksums that index.json "
            "recorded; copy them again, or delete the store and extract it again"
        )
