"""Activations at rest: shards, stores, statistics, the reading order, the loader and the extraction."""
