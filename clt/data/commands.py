"""`clt extract` and `clt inspect`."""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Sequence

from clt.arguments import add_config, read_config
from clt.errors import printable


def extract(parser: ArgumentParser, argv: Sequence[str]) -> None:
    add_config(parser)
    config = read_config(parser.parse_intermixed_args(argv).config)
    from clt.data.extract import extract_all

    for part, index in zip(("train", "heldout"), extract_all(config)):
        print(f"{config.data.store}/{part}: {index.rows} rows in {len(index.shards)} shards")


def inspect(parser: ArgumentParser, argv: Sequence[str]) -> None:
    parser.add_argument("store", help="directory with an index.json")
    parser.add_argument("--verify", action="store_true", help="recompute every shard's checksum")
    arguments = parser.parse_args(argv)
    from clt.data.describe import describe, verify

    print(printable(describe(arguments.store)))
    if arguments.verify:
        verify(arguments.store)
        print("every shard's checksum is as the index says")
