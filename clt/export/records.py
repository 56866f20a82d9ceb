"""The names of what circuit-tracer's page reads beside an export. Imports no torch, so that processes start quickly."""

FEATURES, RECORDS_INDEX = "features", "index.json.gz"


def records_file(layer: int) -> str:
    """The name of the file with the records of a layer's features."""
    return f"layer_{layer}.bin"
